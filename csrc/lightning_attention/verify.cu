// SPDX-License-Identifier: Apache-2.0
// A draft tree over a recurrent state, of which nothing is stored per node:
//
//   o_i = scale (e^(-s (depth_i + 1)) q_i S + sum over i and its ancestors j of e^(-s (depth_i - depth_j)) (q_i k_j)
//   v_j)
//
// A block has a slice of the state and up to kBlockRows query rows. It reads the slice once, then takes tiles of 16
// rows: products with the state, products with the keys of possible ancestors, and a walk up the tree that adds the
// values. A walk counts its steps, which is the difference of depths, and what it does not meet has no influence.
#include "lightning_attention/verify.cuh"

#include "cuda/dtypes.cuh"
#include "lightning_attention/kernels.h"

namespace torch_kernels {
namespace {

constexpr int kBlockRows = 64, kWalks = 4;

// Offsets in shared memory.
struct VerifyShared {
  int partial, scores, sums, decay, next, steps, parents, bytes;

  HOST_DEVICE VerifyShared(int warps, int nodes) {
    partial = 0;
    scores = partial + warps * kTileRows * kPartialStride * 4;
    sums = scores + kTileRows * kScoreStride * 4;
    decay = sums + kTileRows * kSliceColumns * 4;
    next = decay + (nodes + 1) * 4;
    steps = next + kTileRows * 4;
    parents = steps + kTileRows * 4;
    bytes = parents + nodes * 2;
  }
};

template <class T>
__global__ void __launch_bounds__(kMaxSliceThreads, 2)
    verify_kernel(LightningVerifyParams p, SliceGrid grid, int row_blocks, bool aligned) {
  StateSlice slice(grid, blockIdx.x / row_blocks, p.state, p.state_indices);
  const float slope = *p.slopes.at<const float>(slice.head);
  const int nodes = int(p.q.size[1]), group = int(p.q.size[2]) / grid.heads, lane = slice.lane;
  const int first_row = int(blockIdx.x % row_blocks) * kBlockRows, end_row = min(first_row + kBlockRows, nodes * group);
  const int column = slice.first_column + lane;
  const bool writes = column < p.v.size[3];
  auto output = [&](int row) {
    return p.out.at<T>(slice.batch, row / group, slice.head * group + row % group, column);
  };
  if (slice.index < 0) {
    for (int row = first_row + slice.warp; row < end_row && writes; row += slice.warps)
      *output(row) = from_float<T>(0.f);
    return;
  }
  const bool forget = slope == INFINITY;
  slice.load(p.state, grid.aligned);

  const VerifyShared at(slice.warps, nodes);
  const Shared<float> partial = shared_array<float>(at.partial, slice.warps * kTileRows * kPartialStride),
                      scores = shared_array<float>(at.scores, kTileRows * kScoreStride),
                      sums = shared_array<float>(at.sums, kTileRows * kSliceColumns),
                      decay = shared_array<float>(at.decay, nodes + 1);
  const Shared<int> next = shared_array<int>(at.next, kTileRows), steps = shared_array<int>(at.steps, kTileRows);
  const Shared<int16_t> parents = shared_array<int16_t>(at.parents, nodes);
  for (int i = threadIdx.x; i < nodes; i += blockDim.x) {
    int64_t parent = p.parents ? p.parents.index(slice.batch, i) : i - 1;
    parents[i] = int16_t(parent >= -1 && parent < i ? parent : -2);
  }
  for (int i = threadIdx.x; i <= nodes; i += blockDim.x) decay[i] = i == 0 ? 1.f : expf(-slope * float(i));

  VerifyRows<T> rows{p, slice, group, nodes, int(p.q.size[3]), first_row, aligned};
  const StateProduct<T> product(slice);
  const T* values = p.v.at<const T>(slice.batch, 0, slice.head) + column;
  for (; rows.first < end_row; rows.first += kTileRows) {
    product.multiply(rows, partial + slice.warp * kTileRows * kPartialStride);
    if (threadIdx.x < kTileRows) {
      next[threadIdx.x] = rows.exists(threadIdx.x) ? rows.node(threadIdx.x) : -1;
      steps[threadIdx.x] = 0;
    }
    for (int i = threadIdx.x; i < kTileRows * kSliceColumns; i += blockDim.x) sums[i] = 0;
    __syncthreads();

    while (true) {
      int last = -1;
      for (int row = 0; row < kTileRows; row++) {
        int node = next[row];
        last = max(last, node);
      }
      if (last < 0) break;
      const int first = last / kTileKeys * kTileKeys;
      multiply_keys(rows, first, last, scores);
      __syncthreads();

      // A warp walks up from kWalks rows at once, to keep loads in flight.
      for (int base = slice.warp * kWalks; base < kTileRows; base += slice.warps * kWalks) {
        int node[kWalks], step[kWalks], highest = -1;
        float sum[kWalks];
#pragma unroll
        for (int i = 0; i < kWalks; i++) {
          node[i] = next[base + i], step[i] = steps[base + i];
          sum[i] = sums[(base + i) * kSliceColumns + lane];
          highest = max(highest, node[i]);
        }
        while (highest >= first) {
          highest = -1;
#pragma unroll
          for (int i = 0; i < kWalks; i++) {
            if (node[i] >= first) {
              float weight = scores[(base + i) * kScoreStride + node[i] - first], faded = decay[step[i]];
              if (writes && (!forget || step[i] == 0))
                sum[i] = fmaf(weight * faded, to_float(values[node[i] * p.v.stride[1]]), sum[i]);
              int16_t parent = parents[node[i]];
              node[i] = parent, step[i]++;
            }
            highest = max(highest, node[i]);
          }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kWalks; i++) {
          sums[(base + i) * kSliceColumns + lane] = sum[i];
          if (lane == 0) next[base + i] = node[i], steps[base + i] = step[i];
        }
      }
      __syncthreads();
    }

    // A walk that did not end at a root began at padding, or below it. Its steps are the node's depth, plus one.
    for (int row = slice.warp; row < kTileRows && rows.exists(row); row += slice.warps) {
      int end = next[row], step = steps[row];
      float of_state = 0, of_tree = sums[row * kSliceColumns + lane], faded = decay[step];
      for (int w = 0; w < slice.warps; w++) of_state += partial[(w * kTileRows + row) * kPartialStride + lane];
      float result = float(p.scale) * (forget ? of_tree : fmaf(faded, of_state, of_tree));
      if (writes) *output(rows.first + row) = from_float<T>(end == -1 ? result : 0.f);
    }
    __syncthreads();
  }
}

}  // namespace

namespace cuda {

void lightning_verify(const LightningVerifyParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  SliceGrid grid(p.state);
  bool aligned = rows_aligned(p.q, 16) && rows_aligned(p.k, 16);
  int64_t rows = p.q.size[1] * (p.q.size[2] / grid.heads), row_blocks = (rows + kBlockRows - 1) / kBlockRows;
  VerifyShared shared(grid.threads / 32, int(p.q.size[1]));
  for_each_dtype(p.q.dtype, [&]<class T>(T) {
    launch(verify_kernel<T>, grid.blocks(p.q.size[0] * row_blocks), dim3(unsigned(grid.threads)), size_t(shared.bytes),
           context.stream, p, grid, int(row_blocks), aligned);
  });
}

}  // namespace cuda
}  // namespace torch_kernels
