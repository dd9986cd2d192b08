// SPDX-License-Identifier: Apache-2.0
// The vector layer: the only file, with matmul.h, that knows instruction sets. Vectors are the compiler's vector
// extensions, so arithmetic, comparison and selection are plain operators; what those lack is here.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
inline constexpr int kLanes = kVectorBytes / sizeof(T);

// 16-bit and 8-bit formats, held as bits.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct Float8E4M3 {
  uint8_t bits;
};

template <class T>
inline Vector<T> broadcast(T value) {
  return Vector<T>{} + value;
}

template <class T>
inline Vector<T> load(const T* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store(T* to, Vector<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// The second if one is NaN, which is what the processor's own instructions do.
template <class V>
inline V maximum(V a, V b) {
  return a > b ? a : b;
}
template <class V>
inline V minimum(V a, V b) {
  return a < b ? a : b;
}
#if defined(__AVX512F__)
inline Vector<float> maximum(Vector<float> a, Vector<float> b) {
  return Vector<float>(_mm512_maskz_max_ps(0xffff, __m512(a), __m512(b)));
}
inline Vector<float> minimum(Vector<float> a, Vector<float> b) {
  return Vector<float>(_mm512_maskz_min_ps(0xffff, __m512(a), __m512(b)));
}
#endif

template <class Real>
using MaskOf = decltype(Vector<Real>{} == Vector<Real>{});

template <class Real>
inline MaskOf<Real> first_lanes(int count) {
  MaskOf<Real> lane;
  for (int i = 0; i < kLanes<Real>; i++) lane[i] = i;
  return lane < count;
}

template <class To, class From>
inline To bit_cast_vector(From v) {
  return std::bit_cast<To>(v);
}

// ---- conversions to and from float ----

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(int8_t x) { return x; }

inline float to_float(Half x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;  // rebias the exponent; subnormals come out right
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

inline float to_float(Float8E4M3 x) {
  uint32_t sign = uint32_t(x.bits & 0x80) << 24, magnitude = x.bits & 0x7f;
  if (magnitude == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000);
  float value = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

inline bool is_finite(BFloat16 x) { return (x.bits & 0x7f80) != 0x7f80; }
inline bool is_finite(float x) { return (std::bit_cast<uint32_t>(x) & 0x7f800000) != 0x7f800000; }
inline bool is_finite(double x) { return std::isfinite(x); }

// Of numbers without their sign bits, NaN and infinities are the largest.
inline bool all_finite(const BFloat16* x, int64_t n) {
  uint16_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    uint16_t magnitude = x[i].bits & 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < 0x7f80;
}
template <class T>
inline bool all_finite(const T* x, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; i++) finite &= is_finite(x[i]);
  return finite;
}

template <class T>
inline T from_float(double x);
template <>
inline float from_float<float>(double x) {
  return float(x);
}
template <>
inline double from_float<double>(double x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(double x) {
  uint32_t bits = std::bit_cast<uint32_t>(float(x));
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half from_float<Half>(double x) {
  uint32_t bits = std::bit_cast<uint32_t>(float(x)), sign = bits >> 16 & 0x8000;
  float magnitude = std::bit_cast<float>(bits & 0x7fffffff);
  if (magnitude != magnitude) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 65520.f) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x1p-14f) return {uint16_t(sign | uint16_t(std::nearbyint(magnitude * 0x1p24f)))};
  bits &= 0x7fffffff;
  return {uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1)) - 0x38000000) >> 13)};
}
// Saturating, to nearest even.
template <>
inline int8_t from_float<int8_t>(double x) {
  return x != x ? 0 : int8_t(std::nearbyint(x < -127 ? -127 : x > 127 ? 127 : x));
}
template <>
inline Float8E4M3 from_float<Float8E4M3>(double x) {
  float value = float(x), magnitude = std::fabs(value);
  uint8_t sign = std::signbit(value) ? 0x80 : 0;
  if (magnitude != magnitude) return {uint8_t(sign | 0x7f)};
  if (magnitude >= 448.f) return {uint8_t(sign | 0x7e)};
  if (magnitude < 0x1p-6f) return {uint8_t(sign | uint8_t(std::nearbyint(magnitude * 0x1p9f)))};
  uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  return {uint8_t(sign | ((bits + 0x7ffff + (bits >> 20 & 1)) - 0x3c000000) >> 20)};
}

// dst[0..n) = src[0..n) in another format; both contiguous.
template <class To, class From>
inline void convert(const From* src, To* dst, int64_t n) {
  if constexpr (std::is_same_v<To, From>) {
    constexpr int kStep = kVectorBytes / sizeof(To);
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) std::memcpy(dst + i, src + i, kVectorBytes);
    std::memcpy(dst + i, src + i, size_t(n - i) * sizeof(To));
  } else {
    for (int64_t i = 0; i < n; i++) dst[i] = from_float<To>(to_float(src[i]));
  }
}

template <>
inline void convert(const BFloat16* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; i++) dst[i] = std::bit_cast<float>(uint32_t(src[i].bits) << 16);
}

template <>
inline void convert(const float* src, BFloat16* dst, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = std::bit_cast<uint32_t>(src[i]), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    dst[i].bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
  }
}

// int8 and e4m3 are exact in bfloat16: the upper half of their float.
template <class From>
inline void widen_to_bfloat16(const From* src, BFloat16* dst, int64_t n) {
  for (int64_t i = 0; i < n; i++) dst[i].bits = uint16_t(std::bit_cast<uint32_t>(to_float(src[i])) >> 16);
}
template <>
inline void convert(const int8_t* src, BFloat16* dst, int64_t n) {
  widen_to_bfloat16(src, dst, n);
}
template <>
inline void convert(const Float8E4M3* src, BFloat16* dst, int64_t n) {
  widen_to_bfloat16(src, dst, n);
}

#if defined(__F16C__)
template <>
inline void convert(const Half* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  for (; i < n; i++) dst[i] = to_float(src[i]);
}
template <>
inline void convert(const float* src, Half* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), 0));
  for (; i < n; i++) dst[i] = from_float<Half>(src[i]);
}
#endif

// ---- functions ----

// 2^x for x < 128 to 1.5e-7 relative; 0 from -127 down; NaN stays NaN.
inline Vector<float> exp2_vector(Vector<float> x) {
  using Int = Vector<int32_t>;
  x = maximum(broadcast(-127.f), x);
  Vector<float> shifted = x + 0x1.8p23f;  // the integer part lands in the low mantissa bits
  Int exponent = bit_cast_vector<Int>(shifted) << 23;
  Vector<float> f = x - (shifted - 0x1.8p23f);
  Vector<float> p = 1.3264727e-3f * f + 9.6715130e-3f;  // minimax for 2^f on [-1/2, 1/2] with p(0) = 1
  p = p * f + 5.5507336e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314700e-1f;
  p = p * f + 1.f;
  return bit_cast_vector<Vector<float>>(bit_cast_vector<Int>(p) + exponent);
}

inline Vector<double> exp2_vector(Vector<double> x) {
  Vector<double> result;
  for (int i = 0; i < kLanes<double>; i++) result[i] = std::exp2(x[i]);
  return result;
}

// An odd polynomial near zero (coefficients of the Cephes library), 1 - 2 / (1 + e^2|x|) elsewhere.
inline Vector<float> tanh_vector(Vector<float> x) {
  Vector<float> magnitude = x < 0.f ? -x : x, z = x * x;
  Vector<float> p = -5.70498872745e-3f * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  Vector<float> near_zero = x + x * z * p;
  Vector<float> far = 1.f - 2.f / (1.f + exp2_vector(minimum(broadcast(126.f), magnitude * 2.8853900817779268f)));
  return magnitude < 0.625f ? near_zero : (x < 0.f ? -far : far);
}

inline Vector<double> tanh_vector(Vector<double> x) {
  Vector<double> result;
  for (int i = 0; i < kLanes<double>; i++) result[i] = std::tanh(x[i]);
  return result;
}

// Inlined, and so must be a function that does nothing else: GCC takes a call without effect away.
__attribute__((always_inline)) inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
