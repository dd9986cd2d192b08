// SPDX-License-Identifier: Apache-2.0
// Tree attention: picks the kernel for the dtypes, then joins the splits of those sequences that have several.
#include "core/error.h"
#include "tree_attention/kernels.h"
#include "tree_attention/work.cuh"

namespace torch_kernels {

template <class T, class Cache>
void launch_tree_attention(const TreeAttentionParams& p, const TreeAttentionPlan& plan, Partials partials,
                           void* stream);
void launch_tree_attention_float32(const TreeAttentionParams& p, const TreeAttentionPlan& plan, Partials partials,
                                   void* stream);

namespace {

// One warp per row of the output: the splits' states and accumulators in ascending order.
template <class T>
__global__ void __launch_bounds__(128, 8)
    tree_attention_combine_kernel(TreeAttentionParams p, TreeAttentionPlan plan, Partials partials) {
  int nodes = int(p.q.size[1]), query_heads = int(p.q.size[2]), kv_heads = int(p.k_cache.size[2]),
      value_size = int(p.v_cache.size[3]);
  int lane = threadIdx.x % 32, group = query_heads / kv_heads, rows = nodes * group;
  int64_t item = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (item >= p.q.size[0] * kv_heads * rows) return;
  int row = int(item % rows), node = row / group;
  int64_t batch = item / rows / kv_heads, kv_head = item / rows % kv_heads, head = kv_head * group + row % group;
  int splits = plan.splits(plan.clamp_prefix(p.prefix_lens.index(batch)));
  if (splits == 1) return;  // written already

  int64_t first = (batch * kv_heads + kv_head) * plan.grid_splits * rows + row;
  // A lane has the states of splits lane, lane + 32, ...: they are loaded together.
  float m = -INFINITY, l = 0;
  for (int s = lane; s < splits; s += 32) {
    float2 state = partials.state[first + int64_t(s) * rows];
    if (state.y != 0) m = fmaxf(m, state.x);
  }
  for (int step = 16; step > 0; step /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
  auto weight_of = [&](int s) {
    float2 state = s < splits ? partials.state[first + int64_t(s) * rows] : make_float2(0, 0);
    return make_float2(state.y == 0 ? 0.f : expf(shift_of(state.x) - shift_of(m)), state.y);
  };
  for (int s = lane; s < splits; s += 32) {
    float2 weight = weight_of(s);
    l += weight.x * weight.y;
  }
  for (int step = 16; step > 0; step /= 2) l += __shfl_xor_sync(0xffffffffu, l, step);
  bool padding = isnan(partials.state[first].x);
  float lse, sink = p.sinks && !padding ? *p.sinks.at<const float>(head) : -INFINITY;
  float factor = finish_row(m, l, sink, lse);
  if (lane == 0) *p.lse.at<float>(batch, head, node) = lse;

  for (int start = 0; start < value_size; start += 128) {
    int column = start + lane * 4;
    bool inside = column < value_size;
    float4 total = make_float4(0, 0, 0, 0);
    for (int group = 0; group < splits; group += 32) {
      float2 mine = weight_of(group + lane);
      if (mine.y == 0) mine.x = -1;  // saw nothing: what its accumulator holds does not count
#pragma unroll 8
      for (int i = 0; i < min(splits - group, 32); i++) {
        float weight = __shfl_sync(0xffffffffu, mine.x, i);
        if (!inside) continue;
        const float* from = partials.out + (first + int64_t(group + i) * rows) * value_size + column;
        float4 x = *reinterpret_cast<const float4*>(from);
        if (weight < 0) continue;
        total.x += weight * x.x, total.y += weight * x.y, total.z += weight * x.z, total.w += weight * x.w;
      }
    }
    if (!inside) continue;
    T* to = p.out.at<T>(batch, node, head, column);
    if (l == 0) factor = 0;
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float4*>(to) =
          make_float4(factor * total.x, factor * total.y, factor * total.z, factor * total.w);
    else
      *reinterpret_cast<uint2*>(to) =
          make_uint2(pack<T>(factor * total.x, factor * total.y), pack<T>(factor * total.z, factor * total.w));
  }
}

template <class T>
void run(const TreeAttentionParams& p, const TreeAttentionPlan& plan, Partials partials, void* stream) {
  if constexpr (sizeof(T) == 4) {
    launch_tree_attention_float32(p, plan, partials, stream);
  } else {
    if (p.k_cache.dtype == DType::int8)
      launch_tree_attention<T, int8_t>(p, plan, partials, stream);
    else if (p.k_cache.dtype == DType::float8_e4m3)
      launch_tree_attention<T, __nv_fp8_e4m3>(p, plan, partials, stream);
    else
      launch_tree_attention<T, T>(p, plan, partials, stream);
  }
  if (plan.grid_splits == 1) return;
  int64_t rows = p.q.size[0] * p.q.size[1] * p.q.size[2];
  launch(tree_attention_combine_kernel<T>, dim3(unsigned((rows + 3) / 4)), dim3(128), 0, stream, p, plan, partials);
}

}  // namespace

namespace cuda {

void tree_attention(const TreeAttentionParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  if (p.out.elements() == 0) return;
  TreeAttentionPlan plan = make_plan(p);
  int64_t rows = int64_t(partial_rows(p, plan)), value_size = p.v_cache.size[3];
  float* out = rows ? static_cast<float*>(context.allocate(rows * (value_size + 2) * int64_t(sizeof(float)))) : nullptr;
  Partials partials{out, reinterpret_cast<float2*>(out + rows * value_size)};
  if (p.q.dtype == DType::float16)
    run<__half>(p, plan, partials, context.stream);
  else if (p.q.dtype == DType::bfloat16)
    run<__nv_bfloat16>(p, plan, partials, context.stream);
  else
    run<float>(p, plan, partials, context.stream);
}

}  // namespace cuda
}  // namespace torch_kernels
