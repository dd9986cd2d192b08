// SPDX-License-Identifier: Apache-2.0
//
// CUDA's built-in variables and functions, as kernels name them.
#pragma once
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ \
  static  // blocks run one after another; unlike dynamic shared memory it keeps the last block's values
#define __launch_bounds__(...)
#define __grid_constant__
#ifndef __restrict__
#define __restrict__ __restrict
#endif

#define threadIdx (::emulator::self().index)
#define blockIdx (::emulator::machine->index)
#define blockDim (::emulator::machine->size)
#define gridDim (::emulator::machine->grid)
constexpr int warpSize = 32;

// --- Barriers ---

inline void __syncthreads(emulator::Site site = emulator::Site::current()) {
  emulator::block_barrier(0, 0, true, 0, "__syncthreads", site);
}
inline int __syncthreads_or(int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::block_barrier(0, 0, true, predicate != 0, "__syncthreads_or", site) & 1;
}
inline int __syncthreads_and(int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::block_barrier(0, 0, true, predicate != 0, "__syncthreads_and", site) >> 1 & 1;
}
inline int __syncthreads_count(int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::block_barrier(0, 0, true, predicate != 0, "__syncthreads_count", site) >> 2;
}
// Unlike other collectives, its lanes may wait at different lines.
inline void __syncwarp(unsigned mask = ~0u, emulator::Site site = emulator::Site::current()) {
  char nothing = 0;
  auto join = [](void* const*, unsigned) { emulator::machine->shadow.join_warp(emulator::self().warp); };
  emulator::collective(mask, nothing, join, "__syncwarp", site, false);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}

// --- Shuffles. A lane that does not take part gives 0xFF bytes. ---

namespace emulator {

template <class T>
struct Shuffle {
  T value;
  int source;  // lane of the warp, or -1
  T result;
};

template <class T>
T shuffle(unsigned mask, T value, int source, const char* name, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  Shuffle<T> operand{value, source, value};
  auto run = [](void* const* operands, unsigned mask) {
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      auto* mine = static_cast<Shuffle<T>*>(operands[std::countr_zero(rest)]);
      if (mask >> mine->source & 1)
        mine->result = static_cast<Shuffle<T>*>(operands[mine->source])->value;
      else
        std::memset(static_cast<void*>(&mine->result), 0xFF, sizeof(T));
    }
  };
  collective(mask, operand, run, name, site);
  return operand.result;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Site site = emulator::Site::current()) {
  int lane = emulator::self().lane;
  return emulator::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulator::Site site = emulator::Site::current()) {
  int lane = emulator::self().lane, source = lane - int(delta);
  return emulator::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, "__shfl_up_sync", site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulator::Site site = emulator::Site::current()) {
  int lane = emulator::self().lane, source = lane + int(delta);
  return emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, "__shfl_down_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulator::Site site = emulator::Site::current()) {
  int lane = emulator::self().lane, source = lane ^ bits;
  return emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, "__shfl_xor_sync", site);
}

// --- Votes, matches and reductions: each lane gives a value, all get something computed from all. ---

namespace emulator {

template <class T, class R>
struct Pooled {
  T value;
  R result;
};

// combine(values by lane, lanes, own lane) -> R
template <class R, class T, class Combine>
R pooled(unsigned mask, T value, Combine, const char* name, Site site) {
  Pooled<T, R> operand{value, {}};
  auto run = [](void* const* operands, unsigned mask) {
    T values[32] = {};
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      int lane = std::countr_zero(rest);
      values[lane] = static_cast<Pooled<T, R>*>(operands[lane])->value;
    }
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      int lane = std::countr_zero(rest);
      static_cast<Pooled<T, R>*>(operands[lane])->result = Combine()(values, mask, lane);
    }
  };
  collective(mask, operand, run, name, site);
  return operand.result;
}

template <class T, class Op>
T reduced(unsigned mask, T value, Op, const char* name, Site site) {
  auto fold = [](const T(&values)[32], unsigned lanes, int) {
    T total = values[std::countr_zero(lanes)];
    for (lanes &= lanes - 1; lanes; lanes &= lanes - 1) total = Op()(total, values[std::countr_zero(lanes)]);
    return total;
  };
  return pooled<T>(mask, value, fold, name, site);
}

struct Equal {
  template <class T>
  unsigned operator()(const T (&values)[32], unsigned lanes, int lane) const {
    unsigned same = 0;
    for (; lanes; lanes &= lanes - 1) {
      int other = std::countr_zero(lanes);
      if (std::memcmp(&values[other], &values[lane], sizeof(T)) == 0) same |= 1u << other;
    }
    return same;
  }
};

}  // namespace emulator

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::current()) {
  auto bits = [](const int (&values)[32], unsigned lanes, int) {
    unsigned set = 0;
    for (; lanes; lanes &= lanes - 1) set |= unsigned(values[std::countr_zero(lanes)]) << std::countr_zero(lanes);
    return set;
  };
  return emulator::pooled<unsigned>(mask, int(predicate != 0), bits, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::reduced(mask, int(predicate != 0), [](int a, int b) { return a | b; }, "__any_sync", site);
}
inline int __all_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::reduced(mask, int(predicate != 0), [](int a, int b) { return a & b; }, "__all_sync", site);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, emulator::Site site = emulator::Site::current()) {
  return emulator::pooled<unsigned>(mask, value, emulator::Equal(), "__match_any_sync", site);
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, emulator::Site site = emulator::Site::current()) {
  unsigned same = emulator::pooled<unsigned>(mask, value, emulator::Equal(), "__match_all_sync", site);
  *all = same == (mask & emulator::machine->lanes[emulator::self().warp]);
  return *all ? mask : 0;
}

#define EMULATOR_REDUCTION(name, expression)                                                      \
  template <class T>                                                                              \
  T name(unsigned mask, T value, emulator::Site site = emulator::Site::current()) {               \
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);                         \
    return emulator::reduced(mask, value, [](T a, T b) -> T { return expression; }, #name, site); \
  }
EMULATOR_REDUCTION(__reduce_add_sync, T(unsigned(a) + unsigned(b)))
EMULATOR_REDUCTION(__reduce_min_sync, a < b ? a : b)
EMULATOR_REDUCTION(__reduce_max_sync, a > b ? a : b)
EMULATOR_REDUCTION(__reduce_and_sync, a& b)
EMULATOR_REDUCTION(__reduce_or_sync, a | b)
EMULATOR_REDUCTION(__reduce_xor_sync, a ^ b)
#undef EMULATOR_REDUCTION

// --- Atomics: integers only, since floating-point ones would make results depend on the order of threads. ---

#define EMULATOR_ATOMIC(name, expression)             \
  template <std::integral T>                          \
  T name(T* address, std::type_identity_t<T> value) { \
    T old = *address;                                 \
    *address = expression;                            \
    return old;                                       \
  }
EMULATOR_ATOMIC(atomicAdd, T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value)))
EMULATOR_ATOMIC(atomicSub, T(std::make_unsigned_t<T>(old) - std::make_unsigned_t<T>(value)))
EMULATOR_ATOMIC(atomicMin, old < value ? old : value)
EMULATOR_ATOMIC(atomicMax, old > value ? old : value)
EMULATOR_ATOMIC(atomicAnd, old& value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicExch, value)
#undef EMULATOR_ATOMIC
template <std::integral T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  T old = *address;
  if (old == expected) *address = value;
  return old;
}

// --- Cache hints ---

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> v) {
  *p = v;
}

// --- Bits and integers ---

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline int __ffsll(long long x) { return x ? std::countr_zero(static_cast<unsigned long long>(x)) + 1 : 0; }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t both = uint64_t(b) << 32 | a;
  unsigned picked = 0;
  for (int i = 0; i < 4; i++) picked |= unsigned(both >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  return picked;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
  return unsigned(((uint64_t(high) << 32 | low) << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
  return unsigned((uint64_t(high) << 32 | low) >> (n & 31));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline int __dp4a(int a, int b, int c) {
  unsigned sum = unsigned(c);
  for (int i = 0; i < 4; i++) sum += unsigned(int8_t(unsigned(a) >> 8 * i) * int8_t(unsigned(b) >> 8 * i));
  return int(sum);
}

// min and max of two arithmetic types, as CUDA declares them globally.
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(T(a), T(b));
  else
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(T(a), T(b));
  else
    return T(a) < T(b) ? T(b) : T(a);
}

// --- Floating point. The fast functions are exact to rounding here: a kernel may not depend on their error. ---

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __frsqrt_rn(float x) { return float(1. / std::sqrt(double(x))); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.f) : 0.f; }  // NaN gives 0
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
// Float to integer: NaN gives 0, values out of range the nearest integer in range.
inline int __float2int_rz(float x) {
  if (std::isnan(x)) return 0;
  return x >= 2147483648.f ? INT32_MAX : x < -2147483648.f ? INT32_MIN : int(x);
}
inline int __float2int_rn(float x) { return __float2int_rz(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return __float2int_rz(std::floor(x)); }
inline int __float2int_ru(float x) { return __float2int_rz(std::ceil(x)); }

// --- Half and bfloat16 functions that the CUDA headers declare for the device only ---

namespace emulator {

// a * b + c rounded to odd in double, so that the rounding to a shorter format that follows is the only one.
inline double fma_to_odd(double a, double b, double c) {
  double product = a * b;  // exact: both have at most 11 significant bits
  double sum = product + c, part = sum - product;
  double error = (product - (sum - part)) + (c - part);
  if (error == 0 || !std::isfinite(sum)) return sum;
  int64_t bits = std::bit_cast<int64_t>(sum);
  if (bits & 1) return sum;
  return std::bit_cast<double>(bits + ((error > 0) == (sum > 0) ? 1 : -1));
}

}  // namespace emulator

inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(emulator::fma_to_odd(__half2float(a), __half2float(b), __half2float(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(emulator::fma_to_odd(__bfloat162float(a), __bfloat162float(b), __bfloat162float(c)));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __half2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __nv_bfloat162(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}

#define EMULATOR_HALF_FUNCTION(name, expression)                                     \
  inline __half h##name(__half h) {                                                  \
    float x = __half2float(h);                                                       \
    return __float2half_rn(expression);                                              \
  }                                                                                  \
  inline __nv_bfloat16 h##name(__nv_bfloat16 h) {                                    \
    float x = __bfloat162float(h);                                                   \
    return __float2bfloat16_rn(expression);                                          \
  }                                                                                  \
  inline __half2 h2##name(__half2 h) { return __half2(h##name(h.x), h##name(h.y)); } \
  inline __nv_bfloat162 h2##name(__nv_bfloat162 h) { return __nv_bfloat162(h##name(h.x), h##name(h.y)); }
EMULATOR_HALF_FUNCTION(exp, std::exp(x))
EMULATOR_HALF_FUNCTION(exp2, std::exp2(x))
EMULATOR_HALF_FUNCTION(log, std::log(x))
EMULATOR_HALF_FUNCTION(log2, std::log2(x))
EMULATOR_HALF_FUNCTION(sqrt, std::sqrt(x))
EMULATOR_HALF_FUNCTION(rsqrt, 1.f / std::sqrt(x))
EMULATOR_HALF_FUNCTION(rcp, 1.f / x)
EMULATOR_HALF_FUNCTION(floor, std::floor(x))
EMULATOR_HALF_FUNCTION(rint, std::nearbyint(x))
#undef EMULATOR_HALF_FUNCTION
