// SPDX-License-Identifier: Apache-2.0
// Tree attention on tensor cores, for 16-bit queries.
#pragma once
#include "cuda/attention.cuh"
#include "tree_attention/tree_tiles.cuh"

namespace torch_kernels {

template <class T, class Cache, int kHeadTile, int kRowTile>
__global__ void __launch_bounds__(128, 2)
    tree_attention_kernel(TreeAttentionParams p, TreeAttentionPlan plan, Partials partials) {
  TreeAttentionWork work(p, plan);
  if (work.split >= work.splits) return;
  AttentionBlock<T, TreeTiles<kHeadTile, kRowTile>, kHeadTile, kRowTile> block(work);
  block.start_rows();
  if constexpr (sizeof(Cache) == 2) {
    block.template attend<T>(0, work.tiles, p.scale);
  } else {
    int64_t scale_index = p.k_scale.size[0] == 1 ? 0 : work.head;
    int cached = p.k_tree ? work.prefix_tiles : work.tiles;
    block.template attend<Cache>(0, cached, p.scale * *p.k_scale.at<const float>(scale_index));
    block.to_16_bit_order(*p.v_scale.at<const float>(p.v_scale.size[0] == 1 ? 0 : work.head));
    block.template attend<T>(cached, work.tiles, p.scale);
  }
  block.write(partials);
}

// The launch for one query dtype; the rest of the choice is made at run time.
template <class T, class Cache>
void launch_tree_attention(const TreeAttentionParams& p, const TreeAttentionPlan& plan, Partials partials,
                           void* stream) {
  auto start = [&]<int kHeadTile, int kRowTile>() {
    unsigned blocks = unsigned(p.q.size[0] * p.k_cache.size[2] * plan.grid_splits * plan.row_tiles);
    size_t shared = TreeTiles<kHeadTile, kRowTile>::kParents + size_t(p.q.size[1]) * sizeof(int16_t);
    launch(tree_attention_kernel<T, Cache, kHeadTile, kRowTile>, dim3(blocks), dim3(128), shared, stream, p, plan,
           partials);
  };
  auto with_rows = [&]<int kHeadTile>() {
    if constexpr (kHeadTile < 256 || sizeof(Cache) == sizeof(T))
      if (plan.row_tile == 64) return start.template operator()<kHeadTile, 64>();
    if (plan.row_tile == 32) return start.template operator()<kHeadTile, 32>();
    if constexpr (kHeadTile < 256) start.template operator()<kHeadTile, 16>();
  };
  if (plan.head_tile == 64) return with_rows.template operator()<64>();
  if (plan.head_tile == 128) return with_rows.template operator()<128>();
  with_rows.template operator()<256>();
}

}  // namespace torch_kernels
