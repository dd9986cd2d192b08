// SPDX-License-Identifier: Apache-2.0
// How a tree attention call is cut into thread blocks: plain arithmetic, the same on the host and on the device.
//
// A block owns `row_tile` of the T * G rows that share a KV head, and one split of the keys. How many splits a sequence
// has follows from its own prefix length and from the heads and T of the call, never from the batch, so its bits do not
// depend on its company. A split's fp32 partial result costs memory traffic too: min_split_keys keeps it near an eighth
// of the keys' and values' traffic.
#pragma once
#include <algorithm>

#include "tree_attention/params.h"

namespace torch_kernels {

struct TreeAttentionPlan {
  int head_tile;       // D and Dv rounded up to 64, 128 or 256
  int row_tile;        // rows of a block
  int key_tile;        // keys a block handles at a time
  int row_tiles;       // blocks that share one (sequence, KV head, split)
  int min_split_keys;  // a split is at least this long
  int max_splits;      // enough to fill a large GPU with one sequence
  int grid_splits;     // splits of the longest prefix the cache can hold
  int capacity;        // cache slots a sequence has
  int page_size;       // slots per page; of a contiguous cache, all of them
  int64_t window;

  // The prefix tiles of a sequence: those from first_tile() on can be seen by some node.
  TORCH_KERNELS_HOST_DEVICE int first_tile(int prefix) const {
    int64_t first_key = window > 0 ? prefix - window + 1 : 0;
    return first_key > 0 ? int(first_key / key_tile) : 0;
  }
  TORCH_KERNELS_HOST_DEVICE int prefix_tiles(int prefix) const {
    return (prefix + key_tile - 1) / key_tile - first_tile(prefix);
  }
  TORCH_KERNELS_HOST_DEVICE int splits(int prefix) const {
    int wanted = int((int64_t(prefix_tiles(prefix)) * key_tile + min_split_keys - 1) / min_split_keys);
    return wanted < 1 ? 1 : wanted < max_splits ? wanted : max_splits;
  }
  // Where a split starts among the prefix tiles; splits(prefix) is where the last one ends.
  TORCH_KERNELS_HOST_DEVICE int split_begin(int prefix, int split) const {
    return int(int64_t(prefix_tiles(prefix)) * split / splits(prefix));
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
  plan.min_split_keys = int(std::clamp<int64_t>(16 * rows, 256, 1024));
  constexpr int64_t kBlocks = 256;
  plan.max_splits = int(std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, kv_heads * plan.row_tiles)));

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
