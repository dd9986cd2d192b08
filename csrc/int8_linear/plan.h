// SPDX-License-Identifier: Apache-2.0
// How an int8 product is cut into thread blocks: plain arithmetic, on the host.
//
// A block owns `row_tile` rows of x, 128 output features and one split of K. Integer sums are exact, so nothing here
// changes a bit of the result: the cut may follow M.
#pragma once
#include <algorithm>
#include <cstdint>

#include "core/tensor.h"

namespace torch_kernels {

constexpr int kInt8FeatureTile = 128, kInt8Depth = 128;  // of a block; columns of x and weight per stage
constexpr int kInt8Threads = 256;

// 72 to 98 KB of shared memory: one block on a GPU with 100 KB, two or three on one with 228.
constexpr int int8_blocks(int row_tile) { return row_tile == 16 ? 3 : 2; }
constexpr int int8_stages(int row_tile) { return row_tile == 128 ? 3 : 4; }
constexpr int int8_stage_bytes(int row_tile) { return (row_tile + kInt8FeatureTile) * kInt8Depth; }

struct Int8Plan {
  int row_tile, row_tiles, feature_tiles;
  int depth_tiles;  // stages that K takes
  int splits;

  int tiles() const { return row_tiles * feature_tiles; }
  int64_t blocks() const { return int64_t(tiles()) * splits; }
  // The int32 sums of every block, where a tile has several.
  int64_t partial_bytes() const { return splits > 1 ? blocks() * row_tile * kInt8FeatureTile * 4 : 0; }
  int64_t counter_count() const { return splits > 1 ? tiles() : 0; }

  // Where a split starts among the stages; `splits` is where the last one ends.
  TORCH_KERNELS_HOST_DEVICE int split_begin(int split) const { return int(int64_t(depth_tiles) * split / splits); }
};

inline Int8Plan plan_int8(int64_t rows, int64_t features, int64_t columns) {
  Int8Plan plan;
  plan.row_tile = rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
  plan.row_tiles = int((rows + plan.row_tile - 1) / plan.row_tile);
  plan.feature_tiles = int((features + kInt8FeatureTile - 1) / kInt8FeatureTile);
  plan.depth_tiles = int((columns + kInt8Depth - 1) / kInt8Depth);
  // As many blocks as an H200 holds at a time, but at least 1024 columns each: sums cost traffic too.
  int64_t resident = 132 * int8_blocks(plan.row_tile), tiles = std::max<int64_t>(1, plan.tiles());
  plan.splits = int(std::clamp<int64_t>(resident / tiles, 1, std::max<int64_t>(1, columns / 1024)));
  return plan;
}

}  // namespace torch_kernels
