// SPDX-License-Identifier: Apache-2.0
// Rows of floats as int8.
#pragma once
#include <atomic>
#include <limits>

#include "cpu/floats.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

// As bits, magnitudes sort like integers: finite numbers, infinity, NaN.
inline constexpr int32_t kMagnitude = 0x7fffffff, kInfinityBits = 0x7f800000;

// The largest magnitude in a row: NaN if it holds one. With a threshold (not 0), numbers that reach it do not count,
// and their columns are marked in `outliers`; several rows may mark at once.
template <class T>
inline float absmax(const T* x, int64_t n, float threshold, uint8_t* outliers) {
  using Int = Vector<int32_t>;
  constexpr int lanes = kLanes<float>;
  int32_t limit = threshold > 0 ? std::bit_cast<int32_t>(threshold) : std::numeric_limits<int32_t>::max();
  Int highest[4] = {};
  auto take = [&](int64_t i, int64_t count, Int& high) __attribute__((always_inline)) {
    Int bits = bit_cast_vector<Int>(load_float(x + i, count)) & kMagnitude;
    if (threshold > 0) {
      Int is_outlier = (bits >= limit) & (bits <= kInfinityBits);
      bits &= ~is_outlier;
      int32_t any = 0;
      for (int lane = 0; lane < lanes; lane++) any |= is_outlier[lane];
      for (int lane = 0; any && lane < count; lane++)
        if (is_outlier[lane]) std::atomic_ref<uint8_t>(outliers[i + lane]).store(1, std::memory_order_relaxed);
    }
    high = maximum(high, bits);
  };
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
    for (int j = 0; j < 4; j++) take(i + j * lanes, lanes, highest[j]);
  for (; i < n; i += lanes) take(i, std::min<int64_t>(lanes, n - i), highest[0]);
  Int all = maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3]));
  int32_t result = 0;
  for (int lane = 0; lane < lanes; lane++) result = std::max(result, all[lane]);
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
    return __builtin_convertvector(bit_cast_vector<Vector<int32_t>>(q + kRound), ByteVector);
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
