// SPDX-License-Identifier: Apache-2.0
// What one block of a tree attention kernel works on: which rows, which key tiles in which order, where each key is
// stored, which rows see it, and where the result goes. Shared by the tensor core kernel and the fp32 kernel.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile.cuh"
#include "tree_attention/plan.h"
#include "tree_attention/tree.cuh"

namespace torch_kernels {

// Rows of partial results: [B, Hk, splits, T * G]. The maximum of a padding row is NaN, which no other row's is.
inline int64_t partial_rows(const TreeAttentionParams& p, const TreeAttentionPlan& plan) {
  return plan.grid_splits == 1 ? 0 : p.q.size[0] * p.q.size[1] * p.q.size[2] * plan.grid_splits;
}

// Row r of a KV head is query head r % G of node r / G. Tiles are counted from 0: the split's prefix tiles in ascending
// order, then, in the last split, the tree's tiles in descending order, so that each row walks up its chain of
// ancestors once.
struct TreeAttentionWork {
  const TreeAttentionParams& p;
  const TreeAttentionPlan& plan;
  int batch, head, split, splits;
  int group, row0, rows;          // rows: of the whole KV head; this block's are row0 .. row0 + row_tile - 1
  int prefix, first_prefix_tile;  // in the cache
  int prefix_tiles, tiles;

  DEVICE TreeAttentionWork(const TreeAttentionParams& params, const TreeAttentionPlan& the_plan)
      : p(params), plan(the_plan) {
    unsigned block = blockIdx.x;
    int kv_heads = int(p.k_cache.size[2]);
    row0 = int(block % plan.row_tiles) * plan.row_tile, block /= plan.row_tiles;
    split = int(block % plan.grid_splits), block /= plan.grid_splits;
    head = int(block % kv_heads), batch = int(block / kv_heads);
    group = int(p.q.size[2]) / kv_heads;
    rows = int(p.q.size[1]) * group;
    prefix = plan.clamp_prefix(p.prefix_lens.index(batch));
    splits = plan.splits(prefix);
    int begin = plan.split_begin(prefix, split);
    first_prefix_tile = plan.first_tile(prefix) + begin;
    prefix_tiles = split < splits ? plan.split_begin(prefix, split + 1) - begin : 0;
    int last_row = min(row0 + plan.row_tile, rows) - 1;
    tiles = prefix_tiles + (split == splits - 1 ? last_row / group / plan.key_tile + 1 : 0);
  }

  DEVICE bool is_tree(int tile) const { return tile >= prefix_tiles; }
  DEVICE int first_node(int tile) const { return (tiles - 1 - tile) * plan.key_tile; }
  // The cache slot of key 0 of a tile; a side buffer's tree tiles have node numbers instead.
  DEVICE int first_slot(int tile) const {
    return is_tree(tile) ? prefix + first_node(tile) : (first_prefix_tile + tile) * plan.key_tile;
  }
  DEVICE bool in_cache(int tile) const { return !is_tree(tile) || !p.k_tree; }
  DEVICE const Tensor& source(int tile, bool is_v) const {
    return in_cache(tile) ? (is_v ? p.v_cache : p.k_cache) : (is_v ? p.v_tree : p.k_tree);
  }

  // Looking up a key takes a block table entry from global memory, so it comes in two steps with time to pass between
  // them.
  DEVICE int64_t table_entry(int tile, int key) const {
    if (!p.block_table || tile >= tiles || !in_cache(tile)) return batch;
    int page = (first_slot(tile) + key) / plan.page_size;
    return page < p.block_table.size[1] ? p.block_table.index(batch, page) : -1;
  }
  // (page or sequence, slot in it) of a key, or (-1, 0) when there is none.
  DEVICE int2 place(int tile, int key, int64_t entry) const {
    if (tile >= tiles) return make_int2(-1, 0);
    if (is_tree(tile) && first_node(tile) + key >= int(p.q.size[1])) return make_int2(-1, 0);
    if (!in_cache(tile)) return make_int2(batch, first_node(tile) + key);
    int slot = first_slot(tile) + key;
    if (slot >= plan.capacity || (!is_tree(tile) && slot >= prefix)) return make_int2(-1, 0);
    if (!p.block_table) return make_int2(batch, slot);
    if (entry < 0 || entry >= p.k_cache.size[0]) return make_int2(-1, 0);
    return make_int2(int(entry), slot % plan.page_size);
  }

  // The first of 32 prefix slots that a node of this depth sees: bit i says that slot + i is near enough.
  DEVICE unsigned window_bits(int slot, int depth) const {
    if (plan.window <= 0) return 0xffffffffu;
    int64_t hidden = int64_t(prefix) + depth - plan.window + 1 - slot;
    return hidden <= 0 ? 0xffffffffu : hidden < 32 ? 0xffffffffu << hidden : 0;
  }
  // Whether every row sees all of a prefix tile's slots.
  DEVICE bool window_covers(int tile, int deepest) const {
    return plan.window <= 0 || first_slot(tile) >= int64_t(prefix) + deepest - plan.window + 1;
  }

  DEVICE int node(int row) const { return row / group; }
  DEVICE int query_head(int row) const { return head * group + row % group; }
  DEVICE int64_t partial_row(int row) const {
    return ((int64_t(batch) * p.k_cache.size[2] + head) * plan.grid_splits + split) * rows + row;
  }

  DEVICE const Tensor& q() const { return p.q; }
  template <class T>
  DEVICE const T* q_at(int row, int column) const {
    return p.q.at<const T>(batch, node(row), query_head(row), column);
  }
  template <class T>
  DEVICE T* out_at(int row, int column) const {
    return p.out.at<T>(batch, node(row), query_head(row), column);
  }
  DEVICE float* lse_at(int row) const { return p.lse.at<float>(batch, query_head(row), node(row)); }
  DEVICE float sink(int row) const { return p.sinks ? *p.sinks.at<const float>(query_head(row)) : -INFINITY; }
  // What a stored key or value is multiplied by.
  DEVICE float factor(int tile, bool is_v) const {
    const Tensor& scale = is_v ? p.v_scale : p.k_scale;
    if (!scale || !in_cache(tile)) return 1;
    return *scale.at<const float>(scale.size[0] == 1 ? 0 : head);
  }
  DEVICE int value_size() const { return int(p.v_cache.size[3]); }
  DEVICE double softcap() const { return p.softcap; }
};

// One row's way from its node up to the root. Ancestors come in descending order, as the tree's tiles do.
struct AncestorWalk {
  int next = -1;      // the node to visit
  int remaining = 0;  // how many more nodes are within the window

  // Starts at `node` and returns its depth, or -1 for a padding node, which sees nothing.
  DEVICE int start(const Shared<int16_t>& parents, int node, int64_t window) {
    int depth = -1, at = node;
    for (; at >= 0; depth++) {
      int16_t parent = parents[at];
      at = parent;
    }
    bool padding = at != -1;
    next = padding ? -1 : node;
    remaining = window > 0 && window < 1 << 30 ? int(window) : 1 << 30;
    return padding ? -1 : depth;
  }
  // The ancestors among nodes first .. first + 31, as bits.
  DEVICE unsigned bits(const Shared<int16_t>& parents, int first) {
    unsigned seen = 0;
    for (; next >= first && remaining > 0; remaining--) {
      if (next < first + 32) seen |= 1u << (next - first);
      int16_t parent = parents[next];
      next = parent;
    }
    return seen;
  }
};

}  // namespace torch_kernels
