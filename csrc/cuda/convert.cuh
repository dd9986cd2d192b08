// SPDX-License-Identifier: Apache-2.0
//
// Fast conversions of packed small types, built from the instructions in ptx.cuh; one source for the device and the
// emulator.
#pragma once
#include <cstring>

#include "ptx.cuh"

namespace torch_kernels {

template <class To, class From>
DEVICE To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}
DEVICE unsigned bits_of(__half2 x) { return same_bits<unsigned>(x); }
DEVICE unsigned bits_of(__nv_bfloat162 x) { return same_bits<unsigned>(x); }
DEVICE __half2 half2_of(unsigned bits) { return same_bits<__half2>(bits); }
DEVICE __nv_bfloat162 bfloat162_of(unsigned bits) { return same_bits<__nv_bfloat162>(bits); }

// Two e4m3 bytes, the lower first. Exact, NaN included.
DEVICE __half2 e4m3x2_to_half2(uint16_t pair) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
  return __half2(raw);
#else
  // Moved to half's places, the exponent's bias is 15 where 7 was meant: multiply by 2^8.
  unsigned spread = ptx::prmt(pair, 0, 0x1404);
  unsigned magnitude = (spread & 0x7f007f00u) >> 1;
  __half2 value = __hmul2(half2_of((spread & 0x80008000u) | magnitude), half2_of(0x5c005c00u));
  unsigned nan = ((magnitude & 0xffffu) == 0x3f80u ? 0x7fffu : 0) | ((magnitude >> 16) == 0x3f80u ? 0x7fff0000u : 0);
  return half2_of(bits_of(value) | nan);
#endif
}

// Four signed bytes, the lowest first, to the halves (x0, x1), (x2, x3). Exact.
DEVICE void int8x4_to_half2x2(unsigned packed, __half2 (&out)[2]) {
  unsigned biased = packed ^ 0x80808080u;  // x + 128, put in the mantissa of 1024
  __half2 bias = half2_of(0x64806480u);    // 1024 + 128
  out[0] = __hsub2(half2_of(ptx::prmt(biased, 0x64646464u, 0x4140)), bias);
  out[1] = __hsub2(half2_of(ptx::prmt(biased, 0x64646464u, 0x4342)), bias);
}

// Four signed bytes to floats. Exact.
DEVICE void int8x4_to_float4(unsigned packed, float (&out)[4]) {
  unsigned biased = packed ^ 0x80808080u;  // x + 128, put in the mantissa of 2^23
  out[0] = __uint_as_float(ptx::prmt(biased, 0x4b000000u, 0x7650)) - 8388736.f;
  out[1] = __uint_as_float(ptx::prmt(biased, 0x4b000000u, 0x7651)) - 8388736.f;
  out[2] = __uint_as_float(ptx::prmt(biased, 0x4b000000u, 0x7652)) - 8388736.f;
  out[3] = __uint_as_float(ptx::prmt(biased, 0x4b000000u, 0x7653)) - 8388736.f;
}

// Four signed bytes to bfloat16 pairs (x0, x1), (x2, x3). Exact.
DEVICE void int8x4_to_bfloat162x2(unsigned packed, __nv_bfloat162 (&out)[2]) {
  float x[4];
  int8x4_to_float4(packed, x);
  // At most 8 significant bits: the upper half of each float is the value.
  out[0] = bfloat162_of(ptx::prmt(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x7632));
  out[1] = bfloat162_of(ptx::prmt(__float_as_uint(x[2]), __float_as_uint(x[3]), 0x7632));
}

// Eight unsigned 4-bit values, the lowest first, as the pairs (x0, x4), (x1, x5), (x2, x6), (x3, x7). Exact.
DEVICE void uint4x8_to_half2x4(unsigned packed, __half2 (&out)[4]) {
  constexpr int and_or = (0xF0 & 0xCC) | 0xAA;
  __half2 bias = half2_of(0x64006400u);  // 1024
  out[0] = __hsub2(half2_of(ptx::lop3<and_or>(packed, 0x000f000fu, 0x64006400u)), bias);
  out[1] = __hsub2(half2_of(ptx::lop3<and_or>(packed >> 4, 0x000f000fu, 0x64006400u)), bias);
  out[2] = __hsub2(half2_of(ptx::lop3<and_or>(packed >> 8, 0x000f000fu, 0x64006400u)), bias);
  out[3] = __hsub2(half2_of(ptx::lop3<and_or>(packed >> 12, 0x000f000fu, 0x64006400u)), bias);
}

}  // namespace torch_kernels
