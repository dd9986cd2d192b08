// SPDX-License-Identifier: Apache-2.0
// How a tree attention call is cut into thread blocks: plain arithmetic, the same on the host and on the device. A
// block owns `row_tile` of the T * G rows that share a KV head, and one split of the keys.
#pragma once
#include <algorithm>

#include "cuda/splits.h"
#include "tree_attention/params.h"

namespace torch_kernels {

struct TreeAttentionPlan : KeySplits {
  int head_tile;    // D and Dv rounded up to 64, 128 or 256
  int row_tile;     // rows of a block
  int row_tiles;    // blocks that share one (sequence, KV head, split)
  int grid_splits;  // splits of the longest prefix the cache can hold
  int capacity;     // cache slots a sequence has
  int page_size;    // slots per page; of a contiguous cache, all of them
  int64_t window;

  // The prefix tiles of a sequence: those from first_tile() on can be seen by some node.
  TORCH_KERNELS_HOST_DEVICE int first_tile(int prefix) const {
    int64_t first_key = window > 0 ? prefix - window + 1 : 0;
    return first_key > 0 ? int(first_key / key_tile) : 0;
  }
  TORCH_KERNELS_HOST_DEVICE int prefix_tiles(int prefix) const {
    return (prefix + key_tile - 1) / key_tile - first_tile(prefix);
  }
  TORCH_KERNELS_HOST_DEVICE int splits(int prefix) const { return splits_of(prefix_tiles(prefix)); }
  // Where a split starts among the prefix tiles; splits(prefix) is where the last one ends.
  TORCH_KERNELS_HOST_DEVICE int split_begin(int prefix, int split) const {
    return first_of(split, prefix_tiles(prefix));
  }
  TORCH_KERNELS_HOST_DEVICE int clamp_prefix(int64_t prefix) const {
    return prefix < 0 ? 0 : prefix < capacity ? int(prefix) : capacity;
  }
};

inline TreeAttentionPlan make_plan(const TreeAttentionParams& p) {
  TreeAttentionPlan plan;
  int64_t kv_heads = p.k_cache.size[2], rows = kv_heads ? p.q.size[1] * (p.q.size[2] / kv_heads) : 0;
  int64_t head = std::max(p.q.size[3], p.v_cache.size[3]);
  bool fp32 = p.q.dtype == DType::float32;

  plan.head_tile = head <= 64 ? 64 : head <= 128 ? 128 : 256;
  // 64 rows of 256 channels and a decoder of 8-bit keys need more registers than there are.
  bool narrow = head > 128 && p.k_scale;
  plan.row_tile = fp32 ? 16 : rows <= 16 && head <= 128 ? 16 : rows <= 32 || narrow ? 32 : 64;
  plan.key_tile = fp32 || head > 128 ? 32 : 64;
  plan.row_tiles = int((rows + plan.row_tile - 1) / plan.row_tile);
  plan.divide(rows, kv_heads * plan.row_tiles);

  constexpr int64_t kMaxSlots = (int64_t(1) << 31) - (1 << 12);
  int64_t pages = p.block_table ? p.block_table.size[1] : 1;
  plan.page_size = int(std::min(p.k_cache.size[1], kMaxSlots));
  plan.capacity = int(std::min(pages * plan.page_size, kMaxSlots));
  plan.window = p.window;
  plan.grid_splits = 1;
  int64_t reach = p.window > 0 ? std::min<int64_t>(plan.capacity, p.window + 2 * plan.key_tile) : plan.capacity;
  TreeAttentionPlan all = plan;
  all.window = 0;
  plan.grid_splits = all.splits(int(reach));
  return plan;
}

}  // namespace torch_kernels
