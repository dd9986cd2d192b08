// SPDX-License-Identifier: Apache-2.0
// What one block of a tree attention kernel works on: which rows, which key tiles in which order, where each key is
// stored, which rows see it, and where the result goes. Shared by the tensor core kernel and the fp32 kernel.
#pragma once
#include <math.h>

#include "cuda/launch.cuh"
#include "cuda/tile.cuh"
#include "tree_attention/plan.h"
#include "tree_attention/tree.cuh"

namespace torch_kernels {

// Partial results of splits: O [B, Hk, splits, T * G, Dv] unnormalised, then (maximum, sum) [B, Hk, splits, T * G],
// natural exponents; the maximum of a padding row is NaN, which no other row's is.
struct Partials {
  float* out;
  float2* state;
};

inline size_t partial_rows(const TreeAttentionParams& p, const TreeAttentionPlan& plan) {
  return plan.grid_splits == 1 ? 0 : size_t(p.q.size[0] * p.q.size[1] * p.q.size[2]) * plan.grid_splits;
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

// A softmax state is a maximum m and a sum l of exp(score - m); l == 0 means that nothing was seen. Shifting by the
// maximum must not make NaN of an empty state, nor hide NaN scores, which leave m at -inf.
DEVICE float shift_of(float m) { return m == -INFINITY ? 0.f : m; }

// Joins the sink, if any, to a finished row, natural exponents: returns the factor for its accumulator and sets lse.
DEVICE float finish_row(float m, float l, float sink, float& lse) {
  float joint = shift_of(fmaxf(m, sink));
  float scaled = l == 0 ? 0.f : expf(shift_of(m) - joint), total = l * scaled + expf(sink - joint);
  lse = total == 0 ? -INFINITY : joint + logf(total);
  return l == 0 ? 0.f : scaled / total;
}

}  // namespace torch_kernels
