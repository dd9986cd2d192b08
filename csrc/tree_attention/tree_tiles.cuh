// SPDX-License-Identifier: Apache-2.0
// What tree attention adds to the tiles of keys: which rows see them.
#pragma once
#include "cuda/key_tiles.cuh"
#include "tree_attention/work.cuh"

namespace torch_kernels {

template <int kHeadTile, int kRowTile>
struct TreeTiles : KeyTiles<TreeAttentionWork, kHeadTile, kRowTile> {
  using Base = KeyTiles<TreeAttentionWork, kHeadTile, kRowTile>;
  using Base::kTables, Base::kThreads, Base::kWords, Base::present;
  using Base::work, Base::thread, Base::lane, Base::warp_m;

  static constexpr int kAncestors = Base::kShared;                        // unsigned [2][kRowTile][kWords]
  static constexpr int kDepths = kAncestors + 2 * kRowTile * kWords * 4;  // int [kRowTile]
  static constexpr int kParents = kDepths + kRowTile * 4;                 // int16 [T]

  const Shared<unsigned> ancestors = shared_array<unsigned>(kAncestors, 2 * kRowTile * kWords);
  const Shared<int> depths = shared_array<int>(kDepths, kRowTile);
  const Shared<int16_t> parents;

  AncestorWalk walk;  // of row `thread`
  int deepest = 0;    // of all rows

  DEVICE explicit TreeTiles(TreeAttentionWork& w) : Base(w), parents(shared_array<int16_t>(kParents, w.p.q.size[1])) {}

  // Reads the tree and finds how deep each row's node is.
  DEVICE void start_rows() {
    for (int i = thread; i < int(work.p.q.size[1]); i += kThreads)
      parents[i] = int16_t(checked_parent(work.p.parents, work.batch, i));
    __syncthreads();
    if (thread < kRowTile) {
      int row = work.row0 + thread;
      depths[thread] = row < work.rows ? walk.start(parents, work.node(row), work.plan.window) : -1;
    }
    __syncthreads();
    if (work.plan.window > 0)
      for (int i = 0; i < kRowTile; i++) deepest = max(deepest, int(depths[i]));
  }

  // Of this thread's rows, lane / 4 and lane / 4 + 8 of its warp's 16: -1 for padding, or no row at all.
  DEVICE int depth(int half) const { return depths[warp_m * 16 + half * 8 + lane / 4]; }
  DEVICE bool is_padding(int half) const { return depth(half) < 0; }

  // Finds which nodes of a tree tile each row sees.
  DEVICE void prepare_rows(int tile) {
    if (thread < kRowTile && work.is_tree(tile))
      for (int word = kWords - 1; word >= 0; word--)
        ancestors[(tile % 2 * kRowTile + thread) * kWords + word] =
            walk.bits(parents, work.first_node(tile) + word * 32);
  }

  // The keys of a tile that this thread's row `half` sees.
  DEVICE void visible_bits(int tile, int half, unsigned (&bits)[kWords]) {
#pragma unroll
    for (int word = 0; word < kWords; word++) {
      bits[word] = present[tile % kTables * kWords + word];
      unsigned seen;
      if (work.is_tree(tile))
        seen = ancestors[(tile % 2 * kRowTile + warp_m * 16 + half * 8 + lane / 4) * kWords + word];
      else
        seen = work.window_bits(work.first_slot(tile) + word * 32, depth(half));
      bits[word] &= seen;
    }
  }
  DEVICE bool needs_mask(int tile) {
    return work.is_tree(tile) || !work.window_covers(tile, deepest) || !this->is_full(tile);
  }
};

}  // namespace torch_kernels
