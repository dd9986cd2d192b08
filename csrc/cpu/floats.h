// SPDX-License-Identifier: Apache-2.0
// Vectors of floats from and to memory that holds float32, bfloat16 or float16.
#pragma once
#include <algorithm>

#include "cpu/simd.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

// As many as a vector has 32-bit lanes.
typedef uint16_t ShortVector __attribute__((vector_size(kVectorBytes / 2)));
typedef int8_t ByteVector __attribute__((vector_size(kVectorBytes / 4)));

inline Vector<float> load_float(const float* from) { return load(from); }
inline Vector<float> load_float(const BFloat16* from) {
#if defined(__AVX512F__)
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return Vector<float>(_mm512_slli_epi32(wide, 16));
#else
  ShortVector bits;
  std::memcpy(&bits, from, sizeof bits);
  return bit_cast_vector<Vector<float> >(__builtin_convertvector(bits, Vector<uint32_t>) << 16);
#endif
}
inline Vector<float> load_float(const Half* from) {
#if defined(__AVX512F__)
  return Vector<float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return Vector<float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Vector<float> v;
  for (int i = 0; i < kLanes<float>; i++) v[i] = to_float(from[i]);
  return v;
#endif
}

inline void store_float(float* to, Vector<float> v) { store(to, v); }
inline void store_float(BFloat16* to, Vector<float> v) {
#if defined(__AVX512BF16__)
  constexpr int kDenormal = 0x20;  // the instruction takes them for zeros
  if (!_mm512_fpclass_ps_mask(__m512(v), kDenormal)) [[likely]] {
    __m256bh rounded = _mm512_cvtneps_pbh(__m512(v));
    std::memcpy(to, &rounded, sizeof rounded);
    return;
  }
#endif
  using Bits = Vector<uint32_t>;
  Bits bits = bit_cast_vector<Bits>(v), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  rounded = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(__m512i(rounded)));
#else
  ShortVector low = __builtin_convertvector(rounded, ShortVector);
  std::memcpy(to, &low, sizeof low);
#endif
}
inline void store_float(Half* to, Vector<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; i++) to[i] = from_float<Half>(v[i]);
#endif
}

// The lowest bytes of the lanes. The compiler's own conversion goes lane by lane.
inline ByteVector low_bytes(Vector<int32_t> v) {
#if defined(__AVX512F__)
  return ByteVector(_mm512_cvtepi32_epi8(__m512i(v)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_set1_epi32(0x0c080400);
  __m256i bytes = _mm256_shuffle_epi8(__m256i(v), low);
  return ByteVector(
      _mm_cvtsi128_si64(_mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1))));
#else
  return __builtin_convertvector(v, ByteVector);
#endif
}

// v, which the compiler must round before it is added to: products and sums that must have the same bits wherever they
// are computed may not be fused in one place and not in another.
inline Vector<float> rounded(Vector<float> v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// The first `count` lanes, maybe all or none; the others are 0.
template <class T>
inline Vector<float> load_float(const T* from, int64_t count) {
  if (count >= kLanes<float>) return load_float(from);
  T padded[kLanes<float>] = {};
  if (count > 0) std::copy(from, from + count, padded);
  return load_float(padded);
}
template <class T>
inline void store_float(T* to, Vector<float> v, int64_t count) {
  if (count >= kLanes<float>) return store_float(to, v);
  T padded[kLanes<float>];
  store_float(padded, v);
  if (count > 0) std::copy(padded, padded + count, to);
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
