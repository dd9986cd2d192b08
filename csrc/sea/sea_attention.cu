// SPDX-License-Identifier: Apache-2.0
// Attention to gathered columns, for few rows. A block has one row of one head. It expands the cells that the row keeps
// into lists of columns, and its groups of lanes share the lists' keys: each group has a softmax state of its own, and
// they are joined in order at the end.
#include "cuda/dtypes.cuh"
#include "cuda/floats.cuh"
#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "sea/columns.cuh"
#include "sea/kernels.h"

namespace torch_kernels {
namespace {

// A lane has kLane elements of a key and of a value; so groups have as many lanes as the longer of the two asks for.
constexpr int kLane = 8, kKeys = 4;

// The softmax state and the unnormalised output of a group.
struct GroupState {
  float highest = -INFINITY, sum = 0, out[kLane] = {};

  template <class T>
  DEVICE void add(const float (&scores)[kKeys], const Pack<T, kLane> (&values)[kKeys], int count) {
    float above = highest;
#pragma unroll
    for (int i = 0; i < kKeys; i++)
      if (i < count) above = fmaxf(above, scores[i]);
    float shift = above == -INFINITY ? 0.f : above, decay = expf(highest - shift);
    highest = above, sum *= decay;
#pragma unroll
    for (int j = 0; j < kLane; j++) out[j] *= decay;
#pragma unroll
    for (int i = 0; i < kKeys; i++) {
      if (i >= count) break;
      float weight = expf(scores[i] - shift);
      sum += weight;
#pragma unroll
      for (int j = 0; j < kLane; j++) out[j] = fmaf(weight, values[i][j], out[j]);
    }
  }
};

struct AttentionShared {
  static constexpr int kStates = ColumnLists::kBytes, kOut = kStates + kRowThreads / 8 * 8,
                       kBytes = kOut + kRowThreads * kLane * 4;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads) attention_kernel(SeaAttentionParams p, int lanes, bool aligned) {
  const int64_t rows = p.q.size[1], heads = p.q.size[2];
  const int64_t row = blockIdx.x % rows, head = blockIdx.x / rows % heads, batch = blockIdx.x / rows / heads;
  const int size = int(p.q.size[3]), value_size = int(p.v.size[3]);
  const int groups = kRowThreads / lanes, group = threadIdx.x / lanes, first = threadIdx.x % lanes * kLane;
  const T* keys = p.k.at<const T>(batch, 0, head) + first;
  const T* values = p.v.at<const T>(batch, 0, head) + first;
  const int key_part = min(max(size - first, 0), kLane), value_part = min(max(value_size - first, 0), kLane);

  Pack<T, kLane> query;
  query.load(p.q.at<const T>(batch, row, head) + first, key_part, aligned);
  GroupState state;
  ColumnLists lists(p.cells, p.widths, batch, row, head, int(p.num_cells), p.max_columns, p.k.size[1]);
  for (int count = lists.next(); count > 0; count = lists.next()) {
    for (int entry = group; entry < count; entry += groups * kKeys) {
      Pack<T, kLane> k[kKeys], v[kKeys];
      float scores[kKeys];
      const int present = min((count - entry + groups - 1) / groups, kKeys);
#pragma unroll
      for (int i = 0; i < kKeys; i++) {
        int column = lists.column(i < present ? entry + i * groups : entry);
        k[i].load(keys + column * p.k.stride[1], key_part, aligned);
        v[i].load(values + column * p.v.stride[1], value_part, aligned);
      }
#pragma unroll
      for (int i = 0; i < kKeys; i++) {
        scores[i] = 0;
#pragma unroll
        for (int j = 0; j < kLane; j++) scores[i] = fmaf(query[j], k[i][j], scores[i]);
      }
      for (int lane = 1; lane < lanes; lane *= 2)
#pragma unroll
        for (int i = 0; i < kKeys; i++) scores[i] += __shfl_xor_sync(lists.group_mask(lanes), scores[i], lane);
#pragma unroll
      for (int i = 0; i < kKeys; i++) scores[i] *= float(p.scale);
      state.add(scores, v, present);
    }
  }

  const Shared<float2> states = shared_array<float2>(AttentionShared::kStates, kRowThreads / 8);
  const Shared<float> outs = shared_array<float>(AttentionShared::kOut, kRowThreads * kLane);
  if (first == 0) states[group] = make_float2(state.highest, state.sum);
#pragma unroll
  for (int j = 0; j < kLane; j++) outs[threadIdx.x * kLane + j] = state.out[j];
  __syncthreads();
  float highest = -INFINITY, sum = 0;
  for (int i = 0; i < groups; i++) highest = fmaxf(highest, float2(states[i]).x);
  const float shift = highest == -INFINITY ? 0.f : highest;
  for (int i = 0; i < groups; i++) {
    float2 other = states[i];
    sum += expf(other.x - shift) * other.y;
  }
  const bool empty = sum == 0;
  if (threadIdx.x == 0) *p.lse.at<float>(batch, head, row) = empty ? -INFINITY : shift + logf(sum);
  const float gain = p.row_gain ? load_float(p.row_gain, batch, head, row) : 1.f;
  const float share = p.mix ? load_float(p.mix, batch, head, row) : 1.f;
  for (int column = threadIdx.x; column < value_size; column += kRowThreads) {
    float context = 0;
    for (int i = 0; i < groups; i++)
      context = fmaf(expf(float2(states[i]).x - shift), outs[i * lanes * kLane + column], context);
    context = gain * (empty ? 0.f : context / sum);
    if (p.mix) {
      float pooled = load_float(p.pooled, batch, p.pooled.size[1] == 1 ? 0 : row, head, column);
      context = share * context + (1 - share) * pooled;
    }
    *p.out.at<T>(batch, row, head, column) = from_float<T>(context);
  }
}

bool rows_aligned(const Tensor& x) {
  uint64_t bits = uint64_t(x.data) | uint64_t(x.stride[0] | x.stride[1] | x.stride[2]) * uint64_t(size_of(x.dtype));
  return bits % 16 == 0;
}

}  // namespace

void cuda::sea_attention(const SeaAttentionParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  int64_t size = std::max(p.q.size[3], p.v.size[3]), blocks = p.q.size[0] * p.q.size[1] * p.q.size[2];
  int lanes = size <= 64 ? 8 : size <= 128 ? 16 : 32;
  bool aligned = rows_aligned(p.q) && rows_aligned(p.k) && rows_aligned(p.v);
  for_each_dtype(p.q.dtype, [&]<class T>(T) {
    launch(attention_kernel<T>, dim3(unsigned(blocks)), dim3(kRowThreads), AttentionShared::kBytes, context.stream, p,
           lanes, aligned);
  });
}

}  // namespace torch_kernels
