// SPDX-License-Identifier: Apache-2.0
// A tile of a product of int8 matrices, sums in int32: x [M, K] times weight [N, K], both rows along K.
//
// Both travel through a ring of stages in shared memory, filled by cp.async. Several blocks may share a tile, each with
// a part of K: each writes its sums, and the last to finish adds them up. No block waits for another.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"
#include "int8_linear/plan.h"

namespace torch_kernels {

// Rows of a matrix of int8, and how wide its copies may be.
struct Int8Rows {
  const int8_t* data;
  int64_t stride, rows;
  int width;

  static Int8Rows of(const Tensor& matrix) {
    Int8Rows rows{matrix.at<const int8_t>(), matrix.stride[0], matrix.size[0], 0};
    rows.width = copy_width(reinterpret_cast<uint64_t>(rows.data) | uint64_t(rows.rows > 1 ? rows.stride : 0));
    // Copies of 4 bytes are whole ones: where a row ends within one, they would bring what lies behind it.
    if (rows.width == 4) rows.width = copy_width(4 | uint64_t(matrix.size[1]));
    return rows;
  }

  // 16 columns to shared memory, zeros where there are none.
  DEVICE void copy_chunk(char* to, int64_t row, int64_t column, int64_t columns) const {
    int64_t left = row < rows ? columns - column : 0;
    int valid = left >= 16 ? 16 : left > 0 ? int(left) : 0;
    const char* from = reinterpret_cast<const char*>(data + (valid ? row * stride + column : 0));
    if (width == 16)
      ptx::cp_async_16(to, from, valid);
    else
      torch_kernels::copy_chunk(to, from, valid, width);
  }
};

struct Int8Product {
  Int8Rows x, weight;
  int columns;
  Int8Plan plan;
  int4* partials;  // per block and register quadruple, one per thread
  int* counters;   // per tile: blocks that have finished; 0 before
};

// One thread's part in copying a tile of 128 columns, stage after stage: 16 columns of every 32nd row.
struct TileCopy {
  const Int8Rows& matrix;
  const char* from;
  int count;  // rows that exist

  DEVICE TileCopy(const Int8Rows& rows, int64_t row, int column)
      : matrix(rows),
        from(reinterpret_cast<const char*>(rows.data) + (row < rows.rows ? row * rows.stride + column : 0)),
        count(int(max(min((rows.rows - row + 31) / 32, int64_t(4)), int64_t(0)))) {}

  // kRows rows, `left` columns from the first on: zeros where there are no elements. No address is formed for rows that
  // do not exist.
  template <int kRows>
  DEVICE void copy(char* to, int skipped, int left) const {
    int valid = max(min(left, 16), 0);
    auto source = [&](int i) { return from + skipped + (i < count ? i * 32 * matrix.stride : 0); };
    if (matrix.width == 16) {
#pragma unroll
      for (int i = 0; i < kRows; i++) ptx::cp_async_16(to + i * 32 * kInt8Depth, source(i), i < count ? valid : 0);
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows; i++)
        copy_chunk(to + i * 32 * kInt8Depth, source(i), i < count ? valid : 0, matrix.width);
    }
  }
};

template <int kRowTile>
struct Int8Tile {
  static constexpr int kStages = int8_stages(kRowTile), kStageBytes = int8_stage_bytes(kRowTile);
  static constexpr int kWarpsM = kRowTile >= 64 ? 2 : 1, kWarpsN = 8 / kWarpsM;
  static constexpr int kRowSixteens = kRowTile / kWarpsM / 16;       // of a warp
  static constexpr int kSixteens = kInt8FeatureTile / kWarpsN / 16;  // of features
  static constexpr int kShared = kStages * kStageBytes;

  const Int8Product& p;
  char* const shared = dynamic_shared();
  const int thread = threadIdx.x, lane = thread % 32;
  const int warp_m = thread / 32 / kWarpsN, warp_n = thread / 32 % kWarpsN;
  // Blocks that share features are neighbours, so that the weight comes from memory once.
  const int row_tile = blockIdx.x % p.plan.row_tiles, rest = blockIdx.x / p.plan.row_tiles;
  const int split = rest % p.plan.splits, feature_tile = rest / p.plan.splits;
  const int tile = feature_tile * p.plan.row_tiles + row_tile;
  const int64_t row0 = int64_t(row_tile) * kRowTile, feature0 = int64_t(feature_tile) * kInt8FeatureTile;
  const TileCopy x_copy{p.x, row0 + thread / 8, thread % 8 * 16};
  const TileCopy weight_copy{p.weight, feature0 + feature_of(thread / 8), thread % 8 * 16};
  // Of sixteen rows and sixteen features; then half h holds rows lane / 4 + 8 h and features lane % 4 * 4 + 0 .. 3.
  int sums[kRowSixteens][kSixteens][2][4] = {};

  DEVICE explicit Int8Tile(const Int8Product& product) : p(product) {}

  // The row of the tile in shared memory that holds a feature is such that the two mma of sixteen features give a lane
  // four adjacent ones.
  static DEVICE int feature_of(int slot) { return (slot & ~15) + slot % 8 / 2 * 4 + slot / 8 % 2 * 2 + slot % 2; }

  DEVICE char* slot_of(int buffer) const {
    return shared + buffer * kStageBytes + swizzled<kInt8Depth>(thread / 8, thread % 8);
  }
  DEVICE void copy_x(int stage, int buffer) const {
    int skipped = stage * kInt8Depth;
    if (kRowTile >= 32 || thread < kRowTile * 8)
      x_copy.template copy<(kRowTile + 31) / 32>(slot_of(buffer), skipped, p.columns - skipped - thread % 8 * 16);
  }
  DEVICE void copy_weight(int stage, int buffer) const {
    int skipped = stage * kInt8Depth;
    weight_copy.template copy<kInt8FeatureTile / 32>(slot_of(buffer) + kRowTile * kInt8Depth, skipped,
                                                     p.columns - skipped - thread % 8 * 16);
  }

  DEVICE void multiply(const char* stage) {
    const char* weight = stage + kRowTile * kInt8Depth;
    int x_at = swizzled<kInt8Depth>(warp_m * (kRowTile / kWarpsM) + lane % 16, lane / 16);
    int weight_at =
        swizzled<kInt8Depth>(warp_n * (kInt8FeatureTile / kWarpsN) + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < kInt8Depth / 32; step++) {
      unsigned a[kRowSixteens][4];
#pragma unroll
      for (int m = 0; m < kRowSixteens; m++)
        ptx::ldmatrix_x4(a[m], stage + swizzled_step<kInt8Depth>(x_at, m * 16, step * 2));
#pragma unroll
      for (int n = 0; n < kSixteens; n++) {
        unsigned b[4];
        ptx::ldmatrix_x4(b, weight + swizzled_step<kInt8Depth>(weight_at, n * 16, step * 2));
#pragma unroll
        for (int m = 0; m < kRowSixteens; m++) {
          multiply_sixteen(sums[m][n], a[m], b);
        }
      }
    }
  }

  // Lane q of a quad gets columns 2 q and 2 q + 1 of each mma: features 4 q, 4 q + 1 and 4 q + 2, 4 q + 3.
  static DEVICE void multiply_sixteen(int (&sum)[2][4], const unsigned (&a)[4], const unsigned (&b)[4]) {
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      int d[4] = {sum[0][pair * 2], sum[0][pair * 2 + 1], sum[1][pair * 2], sum[1][pair * 2 + 1]};
      ptx::mma_m16n8k32_s8(d, a, b[pair * 2], b[pair * 2 + 1]);
      sum[0][pair * 2] = d[0], sum[0][pair * 2 + 1] = d[1], sum[1][pair * 2] = d[2], sum[1][pair * 2 + 1] = d[3];
    }
  }

  // This block's part of K. The first weights are on their way before the kernel that writes x has ended; `meanwhile`
  // runs while x is. Ends with all threads past a barrier and shared memory free.
  template <class Meanwhile>
  DEVICE void run(Meanwhile meanwhile) {
    int stage = p.plan.split_begin(split), last = p.plan.split_begin(split + 1), buffer = 0;
    for (int i = 0; i < kStages - 1; i++)
      if (stage + i < last) copy_weight(stage + i, i);
    ptx::wait_for_previous_kernel();
    for (int i = 0; i < kStages - 1; i++) {
      if (stage + i < last) copy_x(stage + i, i);
      ptx::cp_async_commit();
    }
    meanwhile();
    for (; stage < last; stage++) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      int next = stage + kStages - 1, free = buffer == 0 ? kStages - 1 : buffer - 1;
      if (next < last) {
        copy_weight(next, free);
        copy_x(next, free);
      }
      ptx::cp_async_commit();
      multiply(shared + buffer * kStageBytes);
      buffer = buffer + 1 == kStages ? 0 : buffer + 1;
    }
    ptx::cp_async_wait_all();
    __syncthreads();
  }

  // Adds the other splits' sums. False in all blocks of a tile but the last to come here.
  DEVICE bool join_splits() {
    if (p.plan.splits == 1) return true;
    constexpr int kQuads = kRowSixteens * kSixteens * 2;
    auto partial = [&](int s, int i) -> int4* {
      return p.partials + ((int64_t(tile) * p.plan.splits + s) * kQuads + i) * kInt8Threads + thread;
    };
    auto each_quad = [&](auto&& visit) {
#pragma unroll
      for (int i = 0; i < kQuads; i++) visit(i, sums[i / 2 / kSixteens][i / 2 % kSixteens][i % 2]);
    };
    each_quad([&](int i, int (&sum)[4]) { *partial(split, i) = make_int4(sum[0], sum[1], sum[2], sum[3]); });
    __threadfence();
    int finished = 0;
    __syncthreads();
    if (thread == 0) finished = atomicAdd(&p.counters[tile], 1) + 1;
    if (!__syncthreads_or(finished == p.plan.splits)) return false;
    __threadfence();
#pragma unroll 1
    for (int s = 0; s < p.plan.splits; s++) {
      if (s == split) continue;
      each_quad([&](int i, int (&sum)[4]) {
        int4 other = __ldcg(partial(s, i));
        sum[0] += other.x, sum[1] += other.y, sum[2] += other.z, sum[3] += other.w;
      });
    }
    return true;
  }

  // visit(m, n, half, row, feature) for each quadruple sums[m][n][half]; row and feature count from the tile's first.
  template <class Visit>
  DEVICE void each_quadruple(Visit visit) const {
#pragma unroll
    for (int m = 0; m < kRowSixteens; m++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < kSixteens; n++)
          visit(m, n, half, warp_m * (kRowTile / kWarpsM) + m * 16 + half * 8 + lane / 4,
                warp_n * (kInt8FeatureTile / kWarpsN) + n * 16 + lane % 4 * 4);
  }
};

// Four adjacent values of a row, of which the first `valid` exist. `aligned`: their address suits one store.
template <class T>
DEVICE void store_four(T* to, const T (&values)[4], int64_t valid, bool aligned) {
  if (aligned && valid >= 4) {
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<uint4*>(to) = same_bits<uint4>(values);
    else
      *reinterpret_cast<uint2*>(to) = same_bits<uint2>(values);
  } else {
    for (int i = 0; i < 4; i++)
      if (i < valid) to[i] = values[i];
  }
}

// run<kRowTile>() for the row tile of a plan.
template <class Run>
void with_row_tile(const Int8Plan& plan, Run&& run) {
  if (plan.row_tile == 16) return run.template operator()<16>();
  if (plan.row_tile == 32) return run.template operator()<32>();
  if (plan.row_tile == 64) return run.template operator()<64>();
  run.template operator()<128>();
}

}  // namespace torch_kernels
