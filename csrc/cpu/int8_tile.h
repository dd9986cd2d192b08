// SPDX-License-Identifier: Apache-2.0
// Sums of products of int8 numbers for many left rows: those are packed, sixteen to a block, so that the right factor
// is read as it lies and no sum runs across a vector. VNNI multiplies four numbers of sixteen left rows at once, AMX
// 64 numbers of sixteen left rows by sixteen right ones.
#pragma once
#include "cpu/int8_dot.h"
#include "cpu/matmul.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

inline constexpr int kBlockRows = 16;  // left rows of a block
inline constexpr int kStripRows = 32;  // right rows that are multiplied together
inline constexpr int kPackStep = 64;   // numbers along K are padded to a multiple of this

#if defined(__AVX512VNNI__)
#if defined(__AMX_INT8__)
inline constexpr uint8_t kPackBias = 0;
#else
inline constexpr uint8_t kPackBias = kLeftBias;
#endif

// to[k / 4][16 rows][4] = 16 rows of int8, plus kPackBias. n % 64 == 0.
inline void pack_block(const int8_t* from, int64_t row, int64_t n, uint8_t* to) {
  for (int64_t k = 0; k < n; k += kPackStep) {
    Vector<int32_t> x[kBlockRows];
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; r++)
      x[r] = bit_cast_vector<Vector<int32_t>>(load(from + r * row + k) ^ int8_t(kPackBias));
    transpose_block(x);
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; r++) store(reinterpret_cast<int32_t*>(to + k * kBlockRows) + r * 16, x[r]);
  }
}

// sums[16 right rows][16 left rows] -> put(r, the 16 sums of left row r) for the first `rows` left rows.
template <class Put>
inline void transpose_sums(const int32_t* sums, int rows, const Put& put) {
  Vector<int32_t> x[16];
#pragma GCC unroll 16
  for (int f = 0; f < 16; f++) x[f] = load(sums + f * 16);
  transpose_block(x);
  if (rows == kBlockRows) {
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; r++) put(r, x[r]);
  } else {
    for (int r = 0; r < rows; r++) put(r, x[r]);
  }
}
#endif

#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
// sums[block][f][16] = packed blocks · right rows f - excess[f].
template <int Features, int Blocks, class Meanwhile>
inline void vnni_tile(const uint8_t* packed, int64_t block, const int8_t* right, int64_t right_row, int64_t n,
                      const int32_t* excess, int32_t* sums, int64_t sums_block, const Meanwhile& meanwhile) {
  __m512i sum[Blocks][Features];
#pragma GCC unroll 16
  for (int f = 0; f < Features; f++)
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; b++) sum[b][f] = _mm512_set1_epi32(-excess[f]);
  auto step = [&](int64_t k, auto load_four) __attribute__((always_inline)) {
    __m512i x[Blocks];
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; b++) x[b] = _mm512_load_si512(packed + b * block + k * kBlockRows);
#pragma GCC unroll 16
    for (int f = 0; f < Features; f++) {
      __m512i w = _mm512_set1_epi32(load_four(right + f * right_row + k));
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; b++) sum[b][f] = _mm512_dpbusd_epi32(sum[b][f], x[b], w);
    }
  };
  auto whole = [](const int8_t* from) __attribute__((always_inline)) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return four;
  };
  int64_t k = 0;
  for (; k + kPackStep <= n; k += kPackStep) {
    meanwhile();
#pragma GCC unroll 2
    for (int i = 0; i < kPackStep; i += 4) step(k + i, whole);
  }
  for (; k + 4 <= n; k += 4) step(k, whole);
  if (k < n)
    step(k, [&](const int8_t* from) {
      int32_t four = 0;
      std::memcpy(&four, from, size_t(n - k));
      return four;
    });
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; b++)
#pragma GCC unroll 16
    for (int f = 0; f < Features; f++) _mm512_store_si512(sums + b * sums_block + f * 16, sum[b][f]);
}

// excess[r] = kPackBias times the sum of right row r.
template <int Rows>
inline void row_excess(const int8_t* right, int64_t row, int64_t n, int32_t* excess) {
  __m512i sum[Rows], ones = _mm512_set1_epi8(1);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++) sum[r] = _mm512_setzero_si512();
  for (int64_t k = 0; k < n; k += 64) {
    __mmask64 present = n - k >= 64 ? ~0ull : (1ull << (n - k)) - 1;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
      sum[r] = _mm512_dpbusd_epi32(sum[r], ones, _mm512_maskz_loadu_epi8(present, right + r * row + k));
  }
  for (int r = 0; r < Rows; r++) excess[r] = int32_t(uint32_t(sum_lanes(Vector<int32_t>(sum[r]))) * kPackBias);
}
#endif

#if defined(__AMX_INT8__)
inline constexpr int64_t kTileBytes = 1024;

// kStripRows right rows as two columns of tiles, each 16 rows by 64 numbers.
struct RightTiles {
  const int8_t* data;
  int64_t row, step, half;  // distances in bytes: of rows, of tiles along K, and of the two columns
};

// Lines that come into the second-level cache meanwhile, kLines with each step. More at a time would take the line fill
// buffers from the tiles.
struct TilePrefetch {
  static constexpr int kLines = 4;
  const int8_t *next, *end;
  int64_t distance;
};

// Tiles 0 to 3 += right rows · packed blocks, from step `begin` to `end`.
template <int Blocks, bool kPrefetch>
inline void amx_steps(const RightTiles& right, const uint8_t* packed, int64_t block, int64_t begin, int64_t end,
                      TilePrefetch& ahead) {
  for (int64_t s = begin; s < end; s++) {
    const int8_t* from = right.data + s * right.step;
    const uint8_t* left = packed + s * kTileBytes;
    _tile_loadd(6, left, 64);
    _tile_loadd(4, from, right.row);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, from + right.half, right.row);
    _tile_dpbssd(1, 5, 6);
    if constexpr (Blocks == 2) {
      _tile_loadd(7, left + block, 64);
      _tile_dpbssd(2, 4, 7);
      _tile_dpbssd(3, 5, 7);
    }
    if constexpr (kPrefetch) {
#pragma GCC unroll 4
      for (int i = 0; i < TilePrefetch::kLines; i++) _mm_prefetch(ahead.next + i * ahead.distance, _MM_HINT_T1);
      ahead.next += TilePrefetch::kLines * ahead.distance;
    }
  }
}

// sums[Blocks][2][16 right rows][16] = right rows · packed blocks, over `steps` times 64 numbers. Calls meanwhile()
// four times: work for which the arithmetic leaves room. A call after each step would cost more than the work.
template <int Blocks, class Meanwhile>
inline void amx_tile(const RightTiles& right, const uint8_t* packed, int64_t block, int64_t steps, int32_t* sums,
                     TilePrefetch& ahead, const Meanwhile& meanwhile) {
  asm volatile("" ::: "memory");  // the compiler does not see that tile instructions read and write memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  constexpr int kParts = 5;
  for (int part = 0; part < kParts; part++) {
    int64_t begin = steps * part / kParts, end = steps * (part + 1) / kParts;
    if (ahead.next < ahead.end) {
      amx_steps<Blocks, true>(right, packed, block, begin, end, ahead);
    } else {
      amx_steps<Blocks, false>(right, packed, block, begin, end, ahead);
    }
    if (part + 1 < kParts) meanwhile();
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if constexpr (Blocks == 2) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
  asm volatile("" ::: "memory");
}
#endif

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
