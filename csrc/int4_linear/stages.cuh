// SPDX-License-Identifier: Apache-2.0
// What an int4 linear block gets, and the ring of shared memory buffers through which it streams: weights, the rows of
// x, scales and zero points of some columns make a stage.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"
#include "int4_linear/plan.h"

namespace torch_kernels {

struct Int4LinearWork {
  Int4LinearPlan plan;
  const char* x;          // rows whose starts are 16-byte aligned
  int64_t x_row_bytes;    // from one row to the next
  int columns;            // of x that exist
  int rows;               // of this launch
  int features;           // N
  const float* x_scales;  // int8 x: [x_scale_rows, x_scale_stride]
  int64_t x_scale_stride;
  Tensor weight, scales, zeros, bias;
  Tensor out;       // from this launch's first row on
  float* partials;  // [splits, rows, N] when there are several splits

  DEVICE int tiles() const { return int(weight.size[1]); }  // of 64 columns
};

// out[row, feature] = value + bias, rounded once.
DEVICE void finish_element(const Tensor& out, const Tensor& bias, int64_t row, int feature, float value) {
  if (bias.dtype == DType::float32)
    value += *bias.at<const float>(feature);
  else if (bias.dtype == DType::float16)
    value += to_float(*bias.at<const __half>(feature));
  else if (bias.dtype == DType::bfloat16)
    value += to_float(*bias.at<const __nv_bfloat16>(feature));
  if (out.dtype == DType::float32)
    *out.at<float>(row, feature) = value;
  else if (out.dtype == DType::float16)
    *out.at<__half>(row, feature) = from_float<__half>(value);
  else
    *out.at<__nv_bfloat16>(row, feature) = from_float<__nv_bfloat16>(value);
}

// The weight in shared memory, of every kernel: each lane copies the 16 bytes that it will read itself.
DEVICE void copy_weight_tile(char* to, const Tensor& weight, int tile_n, int tile_k, int lane) {
  if (tile_n >= weight.size[0] || tile_k >= weight.size[1]) return;
  const char* from =
      static_cast<const char*>(weight.data) + (int64_t(tile_n) * weight.size[1] + tile_k) * kInt4TileBytes + lane * 16;
  ptx::cp_async_16(to + lane * 16, from);
  ptx::cp_async_16(to + 512 + lane * 16, from + 512);
}

// `groups` rows of [G, N] scales or zero points, `width` features from `feature` on; zeros where there are none.
template <int kThreads>
DEVICE void copy_parameters(char* to, const Tensor& from, int group, int groups, int feature, int width, int features) {
  if (!from) return;
  int size = from.dtype == DType::float32 ? 4 : 2, chunks = width * size / 16;
  int aligned = copy_width(reinterpret_cast<uint64_t>(from.data) | uint64_t(from.stride[0] * size));
  for (int i = threadIdx.x; i < groups * chunks; i += kThreads) {
    int row = group + i / chunks, offset = i % chunks * 16, valid = min((features - feature) * size - offset, 16);
    bool exists = row < from.size[0] && valid > 0;
    const char* base = static_cast<const char*>(from.data);
    if (exists) base += (row * from.stride[0] + feature) * size + offset;
    copy_chunk(to + i * 16, base, exists ? valid : 0, aligned);
  }
}

// Element i of what copy_parameters put at byte `offset`.
DEVICE float load_parameter(int offset, DType dtype, int i) {
  if (dtype == DType::float32) return shared_array<float>(offset, i + 1)[i];
  unsigned short bits = shared_array<unsigned short>(offset, i + 1)[i];
  return dtype == DType::float16 ? unpack<__half>(bits, 0) : unpack<__nv_bfloat16>(bits, 0);
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
  for (int stage = 0; stage < ring - 1; stage++) {
    if (stage < count) copy(stage, shared + stage * bytes);
    ptx::cp_async_commit();
  }
  int slot = 0, next = ring - 1;
#pragma unroll 1
  for (int stage = 0; stage < count; stage++) {
    wait_for_copies<kInt4MaxStages - 2>(ring - 2);
    __syncthreads();
    if (stage + ring - 1 < count) copy(stage + ring - 1, shared + next * bytes);
    ptx::cp_async_commit();
    compute(stage, slot * bytes);
    next = slot;
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
  char* const shared = dynamic_shared<char>();

  DEVICE explicit Int4LinearStages(const Int4LinearWork& w) : work(w) {
    unsigned block = blockIdx.x;
    unsigned row_tiles = unsigned(work.rows + kRows - 1) / kRows;
    row0 = int(block % row_tiles) * kRows, block /= row_tiles;
    feature0 = int(block % work.plan.column_tiles) * kColumnTile;
    split = int(block / work.plan.column_tiles);
    rows = min(work.rows - row0, kRows);
    first_tile = split * work.plan.split_tiles;
    last_tile = min(first_tile + work.plan.split_tiles, work.tiles());
  }

  DEVICE int stages() const { return (last_tile - first_tile + kTiles - 1) / kTiles; }
  DEVICE int warp_feature() const { return feature0 + warp * kInt4TileFeatures; }
  // The group of a sixteen of columns, relative to the first group of its stage.
  DEVICE int group_in_stage(int sixteen, int shift) const {
    int stage_start = sixteen - (sixteen - first_tile * 4) % (kColumns / 16);
    return (sixteen >> shift) - (stage_start >> shift);
  }

  // Starts the copies of stage `stage` into a buffer.
  DEVICE void copy_stage(int stage, char* to) const {
    int tile = first_tile + stage * kTiles, column = tile * kInt4TileColumns;
#pragma unroll
    for (int i = 0; i < kTiles; i++)
      if (tile + i < last_tile)
        copy_weight_tile(to + (warp * kTiles + i) * kInt4TileBytes, work.weight, feature0 / kInt4TileFeatures + warp,
                         tile + i, lane);

    constexpr int kChunks = kRowBytes / 16;
    int chunk = thread % kChunks;
    int valid = (work.columns - column) * int(sizeof(X)) - chunk * 16;
    valid = min(max(valid, 0), 16);
    const char* x = work.x + row0 * work.x_row_bytes + (valid ? int64_t(column) * int(sizeof(X)) + chunk * 16 : 0);
#pragma unroll
    for (int row = thread / kChunks; row < kRows; row += kThreads / kChunks)
      if (row < rows)
        ptx::cp_async_16(to + work.plan.stage.x + swizzled<kRowBytes>(row, chunk), x + row * work.x_row_bytes, valid);

    constexpr int kSixteens = kColumns / 16;
    int groups = max(1, kSixteens >> work.plan.group_shift), group = column / 16 >> work.plan.group_shift;
    copy_parameters<kThreads>(to + work.plan.stage.scales, work.scales, group, groups, feature0, kColumnTile,
                              work.features);
    copy_parameters<kThreads>(to + work.plan.stage.zeros, work.zeros, group, groups, feature0, kColumnTile,
                              work.features);
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
