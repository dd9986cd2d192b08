// SPDX-License-Identifier: Apache-2.0
// C[M, N] = A[M, K] · B[K, N], or C += with `accumulate`: the one matrix product of the CPU attention kernels. Small
// operands, all in cache.
//
// A `Unit` is what one multiply-add consumes: a float, a double, or a pair of bfloat16 neighbours along K (dot products
// of pairs, accumulated in float). A is row-major in units with any strides; B is packed [K, N] in units, so vectors
// run along N; C is row-major float or double.
#pragma once
#include "cpu/simd.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

struct Pair {
  BFloat16 low, high;
};

#if defined(__AVX512BF16__)
inline constexpr bool kHasPairs = true;
inline Vector<float> multiply_add(Pair a, Vector<float> b, Vector<float> c) {
  __m512i both = _mm512_set1_epi32(std::bit_cast<int>(a));
  return Vector<float>(_mm512_dpbf16_ps(__m512(c), std::bit_cast<__m512bh>(both), std::bit_cast<__m512bh>(b)));
}
#else
inline constexpr bool kHasPairs = false;
#endif
inline Vector<float> multiply_add(float a, Vector<float> b, Vector<float> c) { return a * b + c; }
inline Vector<double> multiply_add(double a, Vector<double> b, Vector<double> c) { return a * b + c; }

template <class Unit>
using AccumulatorOf = std::conditional_t<std::is_same_v<Unit, double>, double, float>;

#if defined(__AVX512F__)
inline constexpr int kTileM = 8, kTileN = 2;  // accumulators of the register tile: rows, vectors
#elif defined(__AVX__)
inline constexpr int kTileM = 4, kTileN = 2;
#else
inline constexpr int kTileM = 2, kTileN = 4;
#endif

// Of the last vector only lanes before column `columns` are stored.
template <bool accumulate, bool row_major, int Rows, int Vectors, class Unit>
inline void matmul_tile(const Unit* a, int64_t a_stride, const Unit* b, int64_t ldb, AccumulatorOf<Unit>* c,
                        int64_t ldc, int columns, int k) {
  using Accumulator = AccumulatorOf<Unit>;
  constexpr int lanes = kLanes<Accumulator>;
  Vector<Accumulator> sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; j++) sum[i][j] = Vector<Accumulator>{};
  auto step = [&](int64_t p) __attribute__((always_inline)) {
    Vector<Accumulator> row[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; j++) std::memcpy(&row[j], b + p * ldb + j * lanes, sizeof row[j]);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; i++) {
      Unit value = row_major ? a[i * a_stride + p] : a[i + p * a_stride];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; j++) sum[i][j] = multiply_add(value, row[j], sum[i][j]);
    }
  };
  int64_t p = 0;
  for (; p + 4 <= k; p += 4) step(p), step(p + 1), step(p + 2), step(p + 3);
  for (; p < k; p++) step(p);
#pragma GCC unroll 8
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; j++) {
      auto* at = c + i * ldc + j * lanes;
      Vector<Accumulator> result = accumulate ? load(at) + sum[i][j] : sum[i][j];
      if (columns < (j + 1) * lanes) result = first_lanes<Accumulator>(columns - j * lanes) ? result : load(at);
      store(at, result);
    }
}

// k counts units. Where N is no multiple of 16, B and C need room for one: what lies there is read, and in C kept. Long
// sums are added up in parts, which keeps their rounding errors small.
template <bool accumulate, bool row_major, class Unit>
inline void matmul(const Unit* a, int64_t a_stride, const Unit* b, int64_t ldb, AccumulatorOf<Unit>* c, int64_t ldc,
                   int m, int n, int k) {
  constexpr int lanes = kLanes<AccumulatorOf<Unit>>, kPart = 64;
  if (k > kPart) {
    matmul<accumulate, row_major>(a, a_stride, b, ldb, c, ldc, m, n, kPart);
    matmul<true, row_major>(row_major ? a + kPart : a + kPart * a_stride, a_stride, b + kPart * ldb, ldb, c, ldc, m, n,
                            k - kPart);
    return;
  }
  auto rows = [&]<int Rows>(int i) {
    auto tile = [&]<int Vectors>(int j) {
      matmul_tile<accumulate, row_major, Rows, Vectors>(row_major ? a + i * a_stride : a + i, a_stride, b + j, ldb,
                                                        c + i * ldc + j, ldc, n - j, k);
    };
    int j = 0;
    for (; j + kTileN * lanes <= n; j += kTileN * lanes) tile.template operator()<kTileN>(j);
    for (; j < n; j += lanes) tile.template operator()<1>(j);
  };
  int i = 0;
  for (; i + kTileM <= m; i += kTileM) rows.template operator()<kTileM>(i);
  if (kTileM > 4 && i + 4 <= m) rows.template operator()<4>(i), i += 4;
  for (; i < m; i++) rows.template operator()<1>(i);
}

// Whether the left operand has to be row-major, M and N multiples of 16 or below, and K one of 16.
template <class Unit>
inline constexpr bool kMultipliesTiles = false;

#if defined(__AMX_TILE__)
template <>
inline constexpr bool kMultipliesTiles<Pair> = true;

// The tile unit multiplies 16x32 by 32x16 bfloat16 at once, or as many rows by as many columns as its registers are
// told to have: 0-3 are of C, 4 and 5 of A, 6 and 7 of B.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  explicit TileConfiguration(int m = 16, int n = 16) {
    for (int i = 0; i < 8; i++) {
      rows[i] = uint8_t(i < 6 ? m : 16);
      bytes_per_row[i] = uint16_t(i < 4 || i > 5 ? 4 * n : 64);
    }
  }
};

// Holds this thread's tile registers while it multiplies.
struct MatmulSession {
  MatmulSession() { shape(16, 16); }
  ~MatmulSession() { _tile_release(); }

  // Has to be called before products with other m or n below 16; takes as long as a few products of tiles.
  void shape(int new_m, int new_n) {
    if (new_m == m && new_n == n) return;
    m = new_m, n = new_n;
    TileConfiguration configuration(m, n);
    asm volatile("" : : "r"(&configuration) : "memory");  // GCC's intrinsic does not say that it reads all of it
    _tile_loadconfig(&configuration);
  }

 private:
  int m = 0, n = 0;
};

template <bool accumulate, int Rows, int Columns>
inline void matmul_amx_tile(const Pair* a, int64_t a_row, const Pair* b, int64_t ldb, float* c, int64_t ldc, int k) {
  if constexpr (accumulate) {
    _tile_loadd(0, c, ldc * 4);
    if constexpr (Columns == 2) _tile_loadd(1, c + 16, ldc * 4);
    if constexpr (Rows == 2) _tile_loadd(2, c + 16 * ldc, ldc * 4);
    if constexpr (Rows == 2 && Columns == 2) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int p = 0; p < k; p += 16) {
    _tile_loadd(4, a + p, a_row * 4);
    _tile_loadd(6, b + p * ldb, ldb * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Columns == 2) {
      _tile_loadd(7, b + p * ldb + 16, ldb * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows == 2) {
      _tile_loadd(5, a + 16 * a_row + p, a_row * 4);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Columns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, ldc * 4);
  if constexpr (Columns == 2) _tile_stored(1, c + 16, ldc * 4);
  if constexpr (Rows == 2) _tile_stored(2, c + 16 * ldc, ldc * 4);
  if constexpr (Rows == 2 && Columns == 2) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

template <bool accumulate, bool row_major>
inline void matmul(const Pair* a, int64_t a_row, const Pair* b, int64_t ldb, float* c, int64_t ldc, int m, int n,
                   int k) {
  auto rows = [&]<int Rows>(int i) {
    int j = 0;
    for (; j + 32 <= n; j += 32)
      matmul_amx_tile<accumulate, Rows, 2>(a + i * a_row, a_row, b + j, ldb, c + i * ldc + j, ldc, k);
    if (j < n) matmul_amx_tile<accumulate, Rows, 1>(a + i * a_row, a_row, b + j, ldb, c + i * ldc + j, ldc, k);
  };
  int i = 0;
  for (; i + 32 <= m; i += 32) rows.template operator()<2>(i);
  if (i < m) rows.template operator()<1>(i);
}
#else
struct MatmulSession {
  void shape(int, int) {}
};
#endif

// Where interleave() puts a column: of every 32, the processor unpacks first 0-3 of each eight, then 4-7 of each eight.
constexpr int interleaved_place(int column) {
  return column / 32 * 32 + column / 4 % 2 * 16 + column / 8 % 4 * 4 + column % 4;
}

#if defined(__AVX512BW__)
// x becomes its 16x16 transpose in four rounds; each exchanges blocks of 1, 2, 4 and 8.
inline void transpose_block(Vector<int32_t> (&x)[16]) {
  using Int = Vector<int32_t>;
  Int y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = Int(_mm512_unpacklo_epi32(__m512i(x[i]), __m512i(x[i + 1])));
    y[i + 1] = Int(_mm512_unpackhi_epi32(__m512i(x[i]), __m512i(x[i + 1])));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = Int(_mm512_unpacklo_epi64(__m512i(y[i + j]), __m512i(y[i + j + 2])));
      x[i + 2 * j + 1] = Int(_mm512_unpackhi_epi64(__m512i(y[i + j]), __m512i(y[i + j + 2])));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    y[j] = Int(_mm512_shuffle_i32x4(__m512i(x[j]), __m512i(x[j + 4]), 0x88));
    y[j + 4] = Int(_mm512_shuffle_i32x4(__m512i(x[j]), __m512i(x[j + 4]), 0xdd));
    y[j + 8] = Int(_mm512_shuffle_i32x4(__m512i(x[j + 8]), __m512i(x[j + 12]), 0x88));
    y[j + 12] = Int(_mm512_shuffle_i32x4(__m512i(x[j + 8]), __m512i(x[j + 12]), 0xdd));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    x[j] = Int(_mm512_shuffle_i32x4(__m512i(y[j]), __m512i(y[j + 8]), 0x88));
    x[j + 8] = Int(_mm512_shuffle_i32x4(__m512i(y[j]), __m512i(y[j + 8]), 0xdd));
    x[j + 4] = Int(_mm512_shuffle_i32x4(__m512i(y[j + 4]), __m512i(y[j + 12]), 0x88));
    x[j + 12] = Int(_mm512_shuffle_i32x4(__m512i(y[j + 4]), __m512i(y[j + 12]), 0xdd));
  }
}

// to[c, r] = from[r, c] for 16x16 units of four bytes.
template <class Unit>
inline void transpose(const Unit* from, int64_t from_row, Unit* to, int64_t to_row) {
  Vector<int32_t> x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) std::memcpy(&x[i], from + i * from_row, sizeof x[i]);
  transpose_block(x);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) std::memcpy(to + i * to_row, &x[i], sizeof x[i]);
}

// Two rows as one row of pairs, `columns` padded with zeros to a multiple of 32, in the order of interleaved_place().
inline void interleave(const BFloat16* even, const BFloat16* odd, int columns, Pair* to) {
  for (int c = 0; c < columns; c += 32) {
    __mmask32 present = columns - c >= 32 ? ~0u : (1u << (columns - c)) - 1;
    __m512i low = _mm512_maskz_loadu_epi16(present, even + c), high = _mm512_maskz_loadu_epi16(present, odd + c);
    _mm512_storeu_si512(to + c, _mm512_unpacklo_epi16(low, high));
    _mm512_storeu_si512(to + c + 16, _mm512_unpackhi_epi16(low, high));
  }
}

#if defined(__AVX512BF16__)
// Two rows as one row of pairs, in their order. `columns` is a multiple of 16.
inline void interleave_in_order(const BFloat16* even, const BFloat16* odd, int columns, Pair* to) {
  auto wide = [](const BFloat16* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  for (int c = 0; c < columns; c += 16)
    _mm512_storeu_si512(to + c, _mm512_or_si512(wide(even + c), _mm512_slli_epi32(wide(odd + c), 16)));
}
inline void interleave_in_order(const float* even, const float* odd, int columns, Pair* to) {
  auto wide = [](const float* from) {
    return _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(_mm512_loadu_ps(from))));
  };
  for (int c = 0; c < columns; c += 16)
    _mm512_storeu_si512(to + c, _mm512_or_si512(wide(even + c), _mm512_slli_epi32(wide(odd + c), 16)));
}
#endif

// Puts columns that came from interleave() into their order, in place.
inline void restore_order(float* row, int columns) {
  for (int c = 0; c < columns; c += 32) {
    Vector<float> a = load(row + c), b = load(row + c + 16);
    store(row + c, __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
    store(row + c + 16, __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
  }
}
#endif

// to[c, r] = from[r, c] for units; rows and columns are multiples of 16.
template <class Unit>
inline void transpose_units(const Unit* from, int64_t from_row, Unit* to, int64_t to_row, int64_t rows,
                            int64_t columns) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(Unit) == 4) {
    for (int64_t r = 0; r < rows; r += 16)
      for (int64_t c = 0; c < columns; c += 16)
        transpose(from + r * from_row + c, from_row, to + c * to_row + r, to_row);
    return;
  }
#endif
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) to[c * to_row + r] = from[r * from_row + c];
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
