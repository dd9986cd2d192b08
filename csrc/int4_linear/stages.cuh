// SPDX-License-Identifier: Apache-2.0
// What an int4 linear block gets, and the ring of shared memory buffers through which it streams: weights, the rows of
// x, scales and zero points of some columns make a stage.
#pragma once
#include "cuda/floats.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"
#include "int4_linear/parameters.cuh"
#include "int4_linear/plan.h"

namespace torch_kernels {

struct Int4LinearWork {
  Int4LinearPlan plan;
  bool x_prepared;        // by the kernel before
  const char* x;          // rows whose starts are 16-byte aligned
  int64_t x_row_bytes;    // from one row to the next
  int columns;            // of x that exist
  int rows;               // of this launch
  int features;           // N
  const float* x_scales;  // int8 x: [x_scale_rows, x_scale_stride]
  int64_t x_scale_stride;
  Tensor weight;
  Int4Parameters scales, zeros;
  Tensor bias;
  Tensor out;       // from this launch's first row on
  float* partials;  // [splits, rows, N] when there are several splits
};

// out[row, feature] = value + bias, rounded once.
DEVICE void finish_element(const Tensor& out, const Tensor& bias, int64_t row, int feature, float value) {
  if (bias) value += load_float(bias, feature);
  store_float(out, value, row, feature);
}

// Where a lane reads the packed weight's tile: the 16 bytes it copies are those it will read itself.
DEVICE const char* weight_tile(const Tensor& weight, int tile_n, int tile_k, int lane) {
  return static_cast<const char*>(weight.data) + (int64_t(tile_n) * weight.size[1] + tile_k) * kInt4TileBytes +
         lane * 16;
}
DEVICE void copy_weight_tile(char* to, const char* from, int lane) {
  ptx::cp_async_16(to + lane * 16, from);
  ptx::cp_async_16(to + 512 + lane * 16, from + 512);
}

// Waits until at most `pending` of this thread's committed groups are in flight; more than `most` counts as `most`.
template <int most>
DEVICE void wait_for_copies(int pending) {
  if (pending >= most)
    ptx::cp_async_wait<most>();
  else if constexpr (most > 0)
    wait_for_copies<most - 1>(pending);
}

// Calls compute(stage, byte offset of its buffer) for each stage in turn, while copy(stage, buffer) has started those
// after it.
template <class Copy, class Compute>
DEVICE void run_stages(int count, int ring, int bytes, Copy copy, Compute compute) {
  char* shared = dynamic_shared<char>();
  int slot = 0, next = 0;
#pragma unroll 1
  for (int stage = 1 - ring; stage < count; stage++) {
    if (stage >= 0) {
      wait_for_copies<kInt4MaxStages - 2>(ring - 2);
      __syncthreads();
    }
    if (stage + ring - 1 < count) copy(stage + ring - 1, shared + next * bytes);
    ptx::cp_async_commit();
    next = next + 1 == ring ? 0 : next + 1;
    if (stage < 0) continue;
    compute(stage, slot * bytes);
    slot = slot + 1 == ring ? 0 : slot + 1;
  }
}

// X is the type that enters the products: __half or __nv_bfloat16, int8_t, or float without tensor cores.
template <class X, int kRows, int kWarps>
struct Int4LinearStages {
  static constexpr int kThreads = 32 * kWarps, kColumnTile = kInt4TileFeatures * kWarps;
  static constexpr int kColumns = int4_stage_columns(kRows, sizeof(X)), kTiles = kColumns / kInt4TileColumns;
  static constexpr int kRowBytes = kColumns * int(sizeof(X));

  const Int4LinearWork& work;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int row0, rows;  // of x in this block
  int feature0, split;
  int first_tile, last_tile;  // of 64 columns
  bool active;                // whether this warp has features
  const char* weights;        // this lane's, of the first tile
  char* const shared = dynamic_shared<char>();

  DEVICE explicit Int4LinearStages(const Int4LinearWork& w) : work(w) {
    unsigned block = blockIdx.x;
    unsigned row_tiles = unsigned(work.rows + kRows - 1) / kRows;
    row0 = int(block % row_tiles) * kRows, block /= row_tiles;
    feature0 = int(block % work.plan.column_tiles) * kColumnTile;
    split = int(block / work.plan.column_tiles);
    rows = min(work.rows - row0, kRows);
    first_tile = split * work.plan.split_tiles;
    last_tile = min(first_tile + work.plan.split_tiles, int(work.weight.size[1]));
    active = warp_feature() < work.features;
    weights = active ? weight_tile(work.weight, warp_feature() / kInt4TileFeatures, first_tile, lane) : nullptr;
  }

  DEVICE int stages() const { return (last_tile - first_tile + kTiles - 1) / kTiles; }
  DEVICE int warp_feature() const { return feature0 + warp * kInt4TileFeatures; }

  // Starts the copies of stage `stage` into a buffer.
  DEVICE void copy_stage(int stage, char* to) const {
    int tile = first_tile + stage * kTiles, column = tile * kInt4TileColumns;
    if (active) {
      const char* from = weights + int64_t(stage) * (kTiles * kInt4TileBytes);
#pragma unroll
      for (int i = 0; i < kTiles; i++)
        if (tile + i < last_tile)
          copy_weight_tile(to + (warp * kTiles + i) * kInt4TileBytes, from + i * kInt4TileBytes, lane);
    }

    constexpr int kChunks = kRowBytes / 16, kRowsAtOnce = kThreads / kChunks;
    int chunk = thread % kChunks, first_row = thread / kChunks;
    int valid = min(max((work.columns - column) * int(sizeof(X)) - chunk * 16, 0), 16);
    const char* x = work.x + (row0 + first_row) * work.x_row_bytes;
    if (valid) x += int64_t(column) * int(sizeof(X)) + chunk * 16;
#pragma unroll
    for (int i = 0; i < (kRows + kRowsAtOnce - 1) / kRowsAtOnce; i++, x += kRowsAtOnce * work.x_row_bytes) {
      int row = first_row + i * kRowsAtOnce;
      if (row >= rows) break;
      ptx::cp_async_16(to + work.plan.stage.x + swizzled<kRowBytes>(row, chunk), x, valid);
    }

    constexpr int kSixteens = kColumns / 16;
    int groups = max(1, kSixteens >> work.plan.group_shift), group = column / 16 >> work.plan.group_shift;
    work.scales.template copy<kThreads, kColumnTile>(to + work.plan.stage.scales, group, groups, feature0);
    work.zeros.template copy<kThreads, kColumnTile>(to + work.plan.stage.zeros, group, groups, feature0);
    if constexpr (sizeof(X) == 1) {
      int sums = kSixteens >> work.plan.sum_shift, sum = column / 16 >> work.plan.sum_shift;
      for (int i = thread; i < sums * (kRows / 4); i += kThreads) {
        int row = i % (kRows / 4) * 4, count = sum + i / (kRows / 4) < work.plan.x_scale_rows ? min(rows - row, 4) : 0;
        const float* from = work.x_scales;
        if (count > 0) from += (sum + i / (kRows / 4)) * work.x_scale_stride + row0 + row;
        ptx::cp_async_16(to + work.plan.stage.x_scales + i * 16, from, max(count, 0) * 4);
      }
    }
  }
};

}  // namespace torch_kernels
