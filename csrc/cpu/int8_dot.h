// SPDX-License-Identifier: Apache-2.0
// Sums of products of int8 numbers, exact, with vectors along the rows of both factors: right where one of them has few
// rows, and everywhere when there is no better instruction.
#pragma once
#include <algorithm>

#include "cpu/simd.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

// An int8 number of the left factor is stored as a LeftElement with kLeftBias added. VNNI multiplies unsigned by signed
// bytes: each dot product is then too large by kLeftBias times the sum of the right row, which is summed alongside.
#if defined(__AVX512VNNI__)
using LeftElement = uint8_t;
inline constexpr int kLeftBias = 128;
inline constexpr int kDotStep = 64;  // elements of a vector
using RightVector = Vector<int8_t>;
inline RightVector load_right(const int8_t* from) { return load(from); }
inline Vector<int32_t> dot(Vector<int32_t> sum, Vector<uint8_t> left, RightVector right) {
  return Vector<int32_t>(_mm512_dpbusd_epi32(__m512i(sum), __m512i(left), __m512i(right)));
}
#else
using LeftElement = int16_t;
inline constexpr int kLeftBias = 0;
inline constexpr int kDotStep = kLanes<int16_t>;
using RightVector = Vector<int16_t>;
inline RightVector load_right(const int8_t* from) {
  typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 2)));
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, RightVector);
}
inline Vector<int32_t> dot(Vector<int32_t> sum, Vector<int16_t> left, RightVector right) {
#if defined(__AVX2__)
  return sum + Vector<int32_t>(_mm256_madd_epi16(__m256i(left), __m256i(right)));
#elif defined(__SSE2__)
  return sum + Vector<int32_t>(_mm_madd_epi16(__m128i(left), __m128i(right)));
#else
  for (int i = 0; i < kDotStep; i++) sum[i / 2] += int32_t(left[i]) * right[i];
  return sum;
#endif
}
#endif

inline RightVector load_right(const int8_t* from, int64_t count) {
  int8_t padded[kDotStep] = {};
  std::copy(from, from + count, padded);
  return load_right(padded);
}

// Bytes as left elements, followed by what stands for zeros up to a multiple of kDotStep.
inline void to_left(const int8_t* from, int64_t n, LeftElement* to) {
  for (int64_t i = 0; i < n; i++) to[i] = LeftElement(from[i] + kLeftBias);
  std::fill(to + n, to + (n + kDotStep - 1) / kDotStep * kDotStep, LeftElement(kLeftBias));
}

inline int32_t sum_lanes(Vector<int32_t> v) {
#pragma GCC unroll 4
  for (int half = kLanes<int32_t> / 2; half > 0; half /= 2) {
    Vector<int32_t> partner;
    for (int i = 0; i < kLanes<int32_t>; i++) partner[i] = i ^ half;
    v += __builtin_shuffle(v, partner);
  }
  return v[0];
}

// sums[r * sums_row + f] = left row r · right row f, while the right rows at `ahead` come into the cache (their first
// `ahead_bytes` bytes).
template <int Rows, int Features>
inline void dot_tile(const LeftElement* left, int64_t left_row, const int8_t* right, int64_t right_row, int64_t n,
                     int32_t* sums, int64_t sums_row, const int8_t* ahead, int64_t ahead_bytes) {
  Vector<int32_t> sum[Rows][Features], bias[Features];
#pragma GCC unroll 8
  for (int f = 0; f < Features; f++) {
    bias[f] = Vector<int32_t>{};
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) sum[r][f] = Vector<int32_t>{};
  }
  auto step = [&](int64_t k, auto load_at) __attribute__((always_inline)) {
    Vector<LeftElement> x[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) x[r] = load(left + r * left_row + k);
#pragma GCC unroll 8
    for (int f = 0; f < Features; f++) {
      RightVector w = load_at(right + f * right_row + k);
      if constexpr (kLeftBias != 0) bias[f] = dot(bias[f], Vector<LeftElement>{} + LeftElement(1), w);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; r++) sum[r][f] = dot(sum[r][f], x[r], w);
    }
  };
  int64_t k = 0;
  for (; k + kDotStep <= n; k += kDotStep) {
    if (k < ahead_bytes) {
#pragma GCC unroll 8
      for (int f = 0; f < Features; f++) prefetch(ahead + f * right_row + k);
    }
    step(k, [](const int8_t* from) __attribute__((always_inline)) { return load_right(from); });
  }
  if (k < n) step(k, [&](const int8_t* from) { return load_right(from, n - k); });
  for (int f = 0; f < Features; f++) {
    int32_t excess = kLeftBias != 0 ? kLeftBias * sum_lanes(bias[f]) : 0;
    for (int r = 0; r < Rows; r++) sums[r * sums_row + f] = int32_t(uint32_t(sum_lanes(sum[r][f])) - uint32_t(excess));
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
