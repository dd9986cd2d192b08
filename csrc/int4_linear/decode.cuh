// SPDX-License-Identifier: Apache-2.0
// From the packed weight's words to operands of the tensor cores.
#pragma once
#include "cuda/tile.cuh"

namespace torch_kernels {

// The packed word as A operand of m16n8k16: q - 8 - zero, exact. zero[i] is zero_constant<T>(i, zero point - 8) of
// feature lane / 4 + 8 i, an integer from -120 to 120.
template <class T>
DEVICE unsigned zero_constant(int i, float zero) {
  if constexpr (std::is_same_v<T, __half>)
    return i == 0 ? pack<T>(1032 + zero, 1032 + zero) : pack<T>(-72 - zero, -72 - zero);
  return pack<T>(136 + zero, 136 + zero);
}
template <class T>
DEVICE void decode_int4(unsigned word, const unsigned (&zero)[2], unsigned (&a)[4]) {
  constexpr int and_or = (0xF0 & 0xCC) | 0xAA;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (std::is_same_v<T, __half>) {
      // In the mantissa of 1024: 1024 + q, or from the upper nibbles 1024 + 16 q.
      if (i == 2) word >>= 8;
      if (i % 2 == 0)
        a[i] = bits_of(__hsub2(half2_of(ptx::lop3<and_or>(word, 0x000f000fu, 0x64006400u)), half2_of(zero[0])));
      else
        a[i] = bits_of(__hfma2(half2_of(ptx::lop3<and_or>(word, 0x00f000f0u, 0x64006400u)), half2_of(0x2c002c00u),
                               half2_of(zero[1])));
    } else {
      // In the mantissa of 128.
      a[i] = bits_of(
          __hsub2(bfloat162_of(ptx::lop3<and_or>(word >> 4 * i, 0x000f000fu, 0x43004300u)), bfloat162_of(zero[i % 2])));
    }
  }
}

// Two words as A operand of m16n8k32: 16 (q - 8).
DEVICE void decode_int4(unsigned word0, unsigned word1, unsigned (&a)[4]) {
  constexpr int and_xor = (0xF0 & 0xCC) ^ 0xAA;
  a[0] = ptx::lop3<and_xor>(word0 << 4, 0xf0f0f0f0u, 0x80808080u);
  a[1] = ptx::lop3<and_xor>(word0, 0xf0f0f0f0u, 0x80808080u);
  a[2] = ptx::lop3<and_xor>(word1 << 4, 0xf0f0f0f0u, 0x80808080u);
  a[3] = ptx::lop3<and_xor>(word1, 0xf0f0f0f0u, 0x80808080u);
}

// Nibble i of a word as a float, less 8.
DEVICE float int4_to_float(unsigned word, int i) {
  return __uint_as_float((word >> 4 * i & 15) | 0x4b000000u) - 8388616.f;  // in the mantissa of 2^23
}

}  // namespace torch_kernels
