// SPDX-License-Identifier: Apache-2.0
// Rows of floats as int8.
#pragma once
#include <atomic>
#include <limits>

#include "cpu/floats.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

// As bits, magnitudes sort like integers: finite numbers, infinity, NaN.
inline constexpr int32_t kInfinityBits = 0x7f800000;

template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 2, int16_t, int32_t>;

// The largest magnitude in a row; NaN if it holds one.
template <class T>
inline float absmax(const T* x, int64_t n) {
  using Bits = BitsOf<T>;
  constexpr int lanes = kLanes<Bits>;
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  const Bits* bits = reinterpret_cast<const Bits*>(x);
  Vector<Bits> highest[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) highest[j] = maximum(highest[j], load(bits + i + j * lanes) & kMagnitude);
  Vector<Bits> all = maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3]));
  Bits result = 0;
  for (int lane = 0; lane < lanes; lane++) result = std::max(result, all[lane]);
  for (; i < n; i++) result = std::max(result, Bits(bits[i] & kMagnitude));
  return to_float(std::bit_cast<T>(result));
}

inline bool any_reaches(Vector<int32_t> bits, int32_t limit) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask(__m512i(bits), _mm512_set1_epi32(limit)) != 0;
#else
  bool any = false;
  for (int lane = 0; lane < kLanes<int32_t>; lane++) any |= bits[lane] >= limit;
  return any;
#endif
}

// The largest magnitude among the numbers of a row below the threshold; NaN if the row holds one. The columns of the
// others are marked in `outliers`; several rows may mark at once.
template <class T>
inline float absmax_below(const T* x, int64_t n, float threshold, uint8_t* outliers) {
  using Int = Vector<int32_t>;
  constexpr int lanes = kLanes<float>, kTogether = 4;
  int32_t limit = std::bit_cast<int32_t>(threshold), result = 0;
  Int highest = {};
  for (int64_t i = 0; i < n; i += kTogether * lanes) {
    Int high = {};
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; j++)
      high = maximum(high, bit_cast_vector<Int>(load_float(x + i + j * lanes, n - i - j * lanes)) & 0x7fffffff);
    if (!any_reaches(high, limit)) {
      highest = maximum(highest, high);
      continue;
    }
    for (int64_t k = i; k < std::min(n, i + kTogether * lanes); k++) {
      int32_t bits = std::bit_cast<int32_t>(to_float(x[k])) & 0x7fffffff;
      bool is_outlier = bits >= limit && bits <= kInfinityBits;
      if (is_outlier) std::atomic_ref<uint8_t>(outliers[k]).store(1, std::memory_order_relaxed);
      if (!is_outlier) result = std::max(result, bits);
    }
  }
  for (int lane = 0; lane < lanes; lane++) result = std::max(result, highest[lane]);
  return std::bit_cast<float>(result);
}

// x / scale, correctly rounded, when inverse = 1 / scale and neither is near the ends of the range: the remainder of
// the first quotient is exact, and corrects it.
#if defined(__FMA__)
inline Vector<float> corrected_quotient(Vector<float> x, Vector<float> first, Vector<float> scale,
                                        Vector<float> inverse) {
#if defined(__AVX512F__)
  __m512 remainder = _mm512_fnmadd_ps(__m512(first), __m512(scale), __m512(x));
  return Vector<float>(_mm512_fmadd_ps(remainder, __m512(inverse), __m512(first)));
#else
  __m256 remainder = _mm256_fnmadd_ps(__m256(first), __m256(scale), __m256(x));
  return Vector<float>(_mm256_fmadd_ps(remainder, __m256(inverse), __m256(first)));
#endif
}
#else
inline Vector<float> corrected_quotient(Vector<float> x, Vector<float>, Vector<float> scale, Vector<float>) {
  return x / scale;
}
#endif

// How the numbers of a row become integers. Their scale is either theirs, absmax / limit, or given.
struct Rounding {
  float scale, inverse, limit;
  bool zero;   // scale is 0 or not finite: every number becomes 0
  bool plain;  // divide plainly
  bool clamp;

  Rounding(float scale, bool given, float limit) : scale(scale), inverse(1 / scale), limit(limit) {
    zero = scale == 0 || !is_finite(scale);
    plain = !(std::fabs(scale) > 0x1p-100f && std::fabs(scale) < 0x1p100f);
    clamp = given || plain;
  }

  // To nearest, half to even: adding this leaves the integer in the low bits.
  static constexpr float kRound = 0x1.8p23f;

  template <bool kPlain, bool kClamp>
  ByteVector round(Vector<float> x) const {
    Vector<float> q;
    if constexpr (kPlain) {
      q = x / scale;
    } else {
      q = x * inverse;
      if constexpr (kClamp) q = minimum(maximum(q, broadcast(-256.f)), broadcast(256.f));
      q = corrected_quotient(x, q, broadcast(scale), broadcast(inverse));
    }
    if constexpr (kClamp) q = minimum(maximum(q, broadcast(-limit)), broadcast(limit));
    return low_bytes(bit_cast_vector<Vector<int32_t>>(q + kRound));
  }

  template <class T>
  void row(const T* x, int64_t n, int8_t* to) const {
    if (zero) {
      std::fill(to, to + n, int8_t(0));
    } else if (plain) {
      row<true, true>(x, n, to);
    } else if (clamp) {
      row<false, true>(x, n, to);
    } else {
      row<false, false>(x, n, to);
    }
  }

  template <bool kPlain, bool kClamp, class T>
  void row(const T* x, int64_t n, int8_t* to) const {
    constexpr int lanes = kLanes<float>;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      ByteVector q = round<kPlain, kClamp>(load_float(x + i));
      std::memcpy(to + i, &q, lanes);
    }
    if (i < n) {
      ByteVector q = round<kPlain, kClamp>(load_float(x + i, n - i));
      std::memcpy(to + i, &q, size_t(n - i));
    }
  }
};

// The scale of a row with this absmax: NaN if a given one would hide that the row is not finite.
inline float row_scale(float absmax, const float* given, float limit) {
  if (!given) return absmax / limit;
  return is_finite(absmax) ? *given : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
