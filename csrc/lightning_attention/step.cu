// SPDX-License-Identifier: Apache-2.0
// One token per sequence, and the tokens that verification accepted: the state is read once and written once.
#include "cuda/dtypes.cuh"
#include "lightning_attention/kernels.h"
#include "lightning_attention/state_slice.cuh"

namespace torch_kernels {
namespace {

template <class T>
__global__ void __launch_bounds__(kMaxSliceThreads) step_kernel(LightningStepParams p, SliceGrid grid, bool aligned) {
  StateSlice slice(grid, blockIdx.x, p.state, p.state_indices);
  const float slope = *p.slopes.at<const float>(slice.head);
  const int warps = slice.warps, own_column = slice.first_column + slice.lane;
  const bool writes = own_column < p.v.size[2];
  const int group = int(p.q.size[1]) / grid.heads;
  auto output = [&](int i) { return p.out.at<T>(slice.batch, slice.head * group + i, own_column); };
  if (slice.index < 0) {
    for (int i = slice.warp; i < group && writes; i += warps) *output(i) = from_float<T>(0.f);
    return;
  }
  Pack<T, kLaneRows> q;
  auto load_query = [&](int i) {
    q.load(p.q.at<const T>(slice.batch, slice.head * group + i) + slice.row, slice.inside ? kLaneRows : 0, aligned);
  };
  slice.load(p.state, grid.aligned);
  load_query(0);
  slice.advance(p.k.at<const T>(slice.batch, slice.head), p.v.at<const T>(slice.batch, slice.head), slope, aligned);
  slice.store(p.state, grid.aligned);

  // Each query head's products with the block's columns: over a lane's rows, the lanes of a column, then the warps. Of
  // two buffers, one is summed while the next head fills the other.
  for (int i = 0; i < group; i++) {
    const Shared<float> partial = shared_array<float>(size_t(i % 2 * warps) * kSliceColumns * 4, warps * kSliceColumns);
    float sums[kLaneColumns] = {};
#pragma unroll
    for (int r = 0; r < kLaneRows; r++)
#pragma unroll
      for (int c = 0; c < kLaneColumns; c++) sums[c] = fmaf(q[r], slice.x[r][c], sums[c]);
    if (i + 1 < group) load_query(i + 1);
#pragma unroll
    for (int c = 0; c < kLaneColumns; c++) sums[c] = quad_sum(sums[c]);
    if (slice.lane % 4 == 0)
      partial.store(slice.warp * kSliceColumns + slice.lane, make_float4(sums[0], sums[1], sums[2], sums[3]));
    __syncthreads();
    if (i % warps != slice.warp || !writes) continue;
    float sum = 0;
    for (int w = 0; w < warps; w++) sum += partial[w * kSliceColumns + slice.lane];
    *output(i) = from_float<T>(float(p.scale) * sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxSliceThreads)
    commit_kernel(LightningCommitParams p, SliceGrid grid, bool aligned) {
  StateSlice slice(grid, blockIdx.x, p.state, p.state_indices);
  if (slice.index < 0) return;
  const float slope = *p.slopes.at<const float>(slice.head);
  int64_t nodes = p.k.size[1], last = p.num_accepted.index(slice.batch);
  int64_t places = last < 0 ? 0 : last < nodes ? last + 1 : nodes;
  auto node_at = [&](int64_t place) {
    int64_t node = place < places ? p.path.index(slice.batch, place) : -1;
    return node < nodes ? node : -1;
  };
  int64_t node = node_at(0);
  if (node < 0) return;
  slice.load(p.state, grid.aligned);
  for (int64_t place = 0; node >= 0; node = node_at(++place))
    slice.advance(p.k.at<const T>(slice.batch, node, slice.head), p.v.at<const T>(slice.batch, node, slice.head), slope,
                  aligned);
  slice.store(p.state, grid.aligned);
}

}  // namespace

namespace cuda {

void lightning_step(const LightningStepParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  SliceGrid grid(p.state);
  bool aligned = rows_aligned(p.q, 16) && rows_aligned(p.k, 16) && rows_aligned(p.v, 16);
  for_each_dtype(p.q.dtype, [&]<class T>(T) {
    launch(step_kernel<T>, grid.blocks(p.q.size[0]), dim3(unsigned(grid.threads)), size_t(grid.threads) * 2 * 4,
           context.stream, p, grid, aligned);
  });
}

void lightning_commit(const LightningCommitParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  SliceGrid grid(p.state);
  bool aligned = rows_aligned(p.k, 16) && rows_aligned(p.v, 16);
  for_each_dtype(p.k.dtype, [&]<class T>(T) {
    launch(commit_kernel<T>, grid.blocks(p.k.size[0]), dim3(unsigned(grid.threads)), 0, context.stream, p, grid,
           aligned);
  });
}

}  // namespace cuda
}  // namespace torch_kernels
