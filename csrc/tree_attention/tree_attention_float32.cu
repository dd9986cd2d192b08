// SPDX-License-Identifier: Apache-2.0
// Tree attention for float32 queries.
#include "cuda/attention_float32.cuh"
#include "tree_attention/work.cuh"

namespace torch_kernels {
namespace {

// The row's chain is walked by all of its threads; to the prefix only its depth matters.
struct TreeRow {
  const TreeAttentionWork& work;
  const Shared<int16_t> parents;
  AncestorWalk walk;
  int depth = -1;

  DEVICE void start(int row) {
    for (int i = threadIdx.x; i < int(work.p.q.size[1]); i += Float32Attention::kThreads)
      parents[i] = int16_t(checked_parent(work.p.parents, work.batch, i));
    __syncthreads();
    if (row < work.rows) depth = walk.start(parents, work.node(row), work.plan.window);
  }
  DEVICE void turn_queries(int, const Shared<float>&, int) {}
  DEVICE unsigned visible(int tile, unsigned present) {
    if (work.is_tree(tile)) return present & walk.bits(parents, work.first_node(tile));
    return present & work.window_bits(work.first_slot(tile), depth);
  }
  DEVICE bool is_padding() const { return depth < 0; }
};

__global__ void __launch_bounds__(Float32Attention::kThreads)
    tree_attention_float32_kernel(TreeAttentionParams p, TreeAttentionPlan plan, Partials partials) {
  TreeAttentionWork work(p, plan);
  if (work.split >= work.splits) return;
  int stride = Float32Attention::stride_of(plan.head_tile);
  TreeRow row{work, shared_array<int16_t>(Float32Attention::shared_bytes(stride), p.q.size[1])};
  Float32Attention::run(work, row, stride, p.scale, partials);
}

}  // namespace

void launch_tree_attention_float32(const TreeAttentionParams& p, const TreeAttentionPlan& plan, Partials partials,
                                   void* stream) {
  unsigned blocks = unsigned(p.q.size[0] * p.k_cache.size[2] * plan.grid_splits * plan.row_tiles);
  size_t shared = size_t(Float32Attention::shared_bytes(Float32Attention::stride_of(plan.head_tile))) +
                  size_t(p.q.size[1]) * sizeof(int16_t);
  launch(tree_attention_float32_kernel, dim3(blocks), dim3(Float32Attention::kThreads), shared, stream, p, plan,
         partials);
}

}  // namespace torch_kernels
