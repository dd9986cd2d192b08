// SPDX-License-Identifier: Apache-2.0
// How an int4 linear call is cut into thread blocks: plain arithmetic, on the host.
//
// A block owns `row_tile` rows of x, `column_tile` output features and one split of K. The splits follow from N, K and
// the group size alone, and within a split every tile adds in the same order: a row's bits do not depend on M. All
// else (tiles, stages) may follow M, because it changes no bit.
#pragma once
#include <algorithm>
#include <cstdint>

#include "core/tensor.h"

namespace torch_kernels {

// The packed weight, int32 [ceil(N / 32), ceil(K / 64), 2, 32, 4]: see layout_gpu.py.
constexpr int kInt4TileFeatures = 32, kInt4TileColumns = 64, kInt4TileBytes = 1024;

// The H200's: enough blocks to fill it, and shared memory that leaves room for a second block there and for one on
// GPUs with 100 KB.
constexpr int kMultiprocessors = 132, kSharedBytes = 99 << 10, kMultiprocessorSharedBytes = 216 << 10;
constexpr int kInt4MaxStages = 8;
constexpr int64_t kInt4Workspace = 64 << 20;  // bytes; more rows are handled one slab after another

// Columns of x and of the weight that a block handles between two barriers.
constexpr int int4_stage_columns(int row_tile, int64_t x_size) { return x_size == 1 || row_tile <= 16 ? 128 : 64; }

// Groups of columns, counted in sixteens: the group of column k is k / 16 >> shift. One group for all of K is 1 << 30.
inline int int4_group_shift(int64_t group_size) {
  int shift = 0;
  if (group_size < 0) return 30;
  while (16 << shift < group_size) shift++;
  return shift;
}

// One buffer of the ring in shared memory: byte offsets of what a stage holds besides its weights.
struct Int4Stage {
  int x, scales, zeros, x_scales, bytes;
};

struct Int4LinearPlan {
  int splits, split_tiles;  // of K; a split is so many tiles of 64 columns
  int row_tile, row_tiles;
  int warps, column_tiles;  // a warp owns 32 output features
  int stages;
  Int4Stage stage;
  int group_shift;       // of the weight's groups
  int sum_shift;         // of the groups that are summed before a scale is applied: x's are finer where x is int8
  int64_t slab_rows;     // rows per launch, to bound the workspace
  int64_t x_scale_rows;  // rows of x's scales, one per such group

  int column_tile() const { return warps * kInt4TileFeatures; }
  int shared_bytes() const { return stages * stage.bytes; }
};

inline void plan_splits(Int4LinearPlan& plan, int64_t features, int64_t columns, int64_t group_size) {
  // About 256 blocks of 128 features: two per multiprocessor. A split has at least 256 columns, since its fp32 result
  // costs memory traffic too, and whole groups.
  int64_t unit = std::max<int64_t>(group_size, 128), units = (columns + unit - 1) / unit;
  int64_t tiles = std::max<int64_t>(1, (features + 127) / 128);
  int64_t wanted = std::min(std::max<int64_t>(1, (256 + tiles / 2) / tiles), std::max<int64_t>(1, units * unit / 256));
  int64_t units_each = std::max<int64_t>(1, (units + wanted - 1) / wanted);
  plan.split_tiles = int(units_each * unit / kInt4TileColumns);
  plan.splits = int(std::max<int64_t>(1, (units + units_each - 1) / units_each));
}

inline Int4Stage plan_stage(const Int4LinearPlan& plan, int64_t x_size, int64_t scale_size, int64_t zero_size) {
  int64_t columns = int4_stage_columns(plan.row_tile, x_size), sixteens = columns / 16;
  int64_t groups = std::max<int64_t>(1, sixteens >> plan.group_shift) * plan.column_tile();
  int64_t x = plan.column_tile() * columns / 2, scales = x + plan.row_tile * columns * x_size;
  int64_t zeros = scales + groups * scale_size, x_scales = zeros + groups * zero_size;
  int64_t bytes = x_scales + (x_size == 1 ? (sixteens >> plan.sum_shift) * plan.row_tile * 4 : 0);
  return {int(x), int(scales), int(zeros), int(x_scales), int(bytes)};
}

// x_size: bytes per element of x as the tensor cores see it, 1 when it is quantised; 4 has no tensor cores. `copied`:
// whether x goes through the workspace.
inline Int4LinearPlan plan_int4_linear(int64_t rows, int64_t features, int64_t columns, int64_t group_size,
                                       int64_t x_size, int64_t scale_size, int64_t zero_size, bool copied) {
  Int4LinearPlan plan = {};
  plan_splits(plan, features, columns, group_size);
  plan.group_shift = int4_group_shift(group_size);
  plan.sum_shift = x_size == 1 ? std::min(plan.group_shift, 3) : plan.group_shift;
  plan.row_tile = x_size == 4 || rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64;

  int64_t tiles = (columns + kInt4TileColumns - 1) / kInt4TileColumns;
  plan.x_scale_rows = std::max<int64_t>(1, (tiles * 4 + (1 << plan.sum_shift) - 1) >> plan.sum_shift);
  int64_t row_bytes = (plan.splits > 1 ? 4 * plan.splits * features : 0) +
                      (copied ? tiles * kInt4TileColumns * x_size + plan.x_scale_rows * 4 : 0);
  plan.slab_rows = std::max<int64_t>(1, row_bytes ? kInt4Workspace / row_bytes / 64 : rows / 64 + 1) * 64;
  plan.slab_rows = std::min(plan.slab_rows, rows);
  plan.row_tiles = int((plan.slab_rows + plan.row_tile - 1) / plan.row_tile);

  // Twice as many features share a block's x where that leaves no multiprocessor with more to do.
  auto blocks = [&](int64_t tile) { return (features + tile - 1) / tile * plan.splits * plan.row_tiles; };
  auto most = [&](int64_t tile) { return (blocks(tile) + kMultiprocessors - 1) / kMultiprocessors * tile; };
  plan.warps = plan.row_tile >= 32 && blocks(256) >= kMultiprocessors - 12 && most(256) <= most(128) ? 8 : 4;
  plan.column_tiles = int((features + plan.column_tile() - 1) / plan.column_tile());

  plan.stage = plan_stage(plan, x_size, scale_size, zero_size);
  int64_t resident = std::clamp<int64_t>(most(plan.column_tile()) / plan.column_tile(), 2, 4);
  int64_t shared = std::min<int64_t>(kSharedBytes, kMultiprocessorSharedBytes / resident);
  int64_t fit = std::min<int64_t>(kInt4MaxStages, kSharedBytes / plan.stage.bytes);
  plan.stages = int(std::clamp<int64_t>(shared / plan.stage.bytes, std::min<int64_t>(3, fit), fit));
  return plan;
}

}  // namespace torch_kernels
