// SPDX-License-Identifier: Apache-2.0
// Tree attention: picks the kernel for the dtypes, then joins the splits of those sequences that have several.
#include "core/error.h"
#include "cuda/dtypes.cuh"
#include "tree_attention/kernels.h"
#include "tree_attention/work.cuh"

namespace torch_kernels {

template <class T, class Cache>
void launch_tree_attention(const TreeAttentionParams& p, const TreeAttentionPlan& plan, Partials partials,
                           void* stream);
void launch_tree_attention_float32(const TreeAttentionParams& p, const TreeAttentionPlan& plan, Partials partials,
                                   void* stream);

namespace {

template <class T>
__global__ void __launch_bounds__(128, 8)
    tree_attention_combine_kernel(TreeAttentionParams p, TreeAttentionPlan plan, Partials partials) {
  int query_heads = int(p.q.size[2]), kv_heads = int(p.k_cache.size[2]), group = query_heads / kv_heads,
      rows = int(p.q.size[1]) * group;
  int64_t item = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (item >= p.q.size[0] * kv_heads * rows) return;
  int row = int(item % rows), node = row / group;
  int64_t batch = item / rows / kv_heads, kv_head = item / rows % kv_heads, head = kv_head * group + row % group;
  int splits = plan.splits(plan.clamp_prefix(p.prefix_lens.index(batch)));
  if (splits == 1) return;  // written already
  int64_t first = (batch * kv_heads + kv_head) * plan.grid_splits * rows + row;
  bool padding = isnan(partials.state[first].x);
  float sink = p.sinks && !padding ? *p.sinks.at<const float>(head) : -INFINITY;
  partials.combine<T>(first, rows, splits, sink, int(p.v_cache.size[3]), p.lse.at<float>(batch, head, node),
                      p.out.at<T>(batch, node, head));
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
  Partials partials(context, partial_rows(p, plan), p.v_cache.size[3]);
  for_each_dtype(p.q.dtype, [&]<class T>(T) { run<T>(p, plan, partials, context.stream); });
}

}  // namespace cuda
}  // namespace torch_kernels
