// SPDX-License-Identifier: Apache-2.0
// Tiles in shared memory and in registers: swizzled rows, chunked copies, fragments of 16-bit and 8-bit elements.
#pragma once
#include <type_traits>

#include "ptx.cuh"

namespace torch_kernels {

// A tile of rows of kRowBytes bytes, in 16-byte chunks. Chunks of a row are permuted so that the eight rows of an
// ldmatrix tile, read at one column, and the eight chunks of a 128-byte line, written together, fall into different
// banks.
template <int kRowBytes>
DEVICE int swizzled(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes % 128 == 0);
  return row * kRowBytes + ((chunk ^ (kRowBytes == 64 ? (row >> 1) & 3 : row & 7)) << 4);
}

// From swizzled(row, chunk) to swizzled(row + rows, chunk + chunks), for constants that share no bit with what they are
// added to and rows a multiple of 8. Loops that walk along a row this way keep one offset in a register instead of one
// per step.
template <int kRowBytes>
DEVICE int swizzled_step(int offset, int rows, int chunks) {
  constexpr int kPermuted = kRowBytes == 64 ? 3 : 7;
  return (offset ^ (chunks & kPermuted) << 4) + ((chunks & ~kPermuted) << 4) + rows * kRowBytes;
}

// The largest power of two up to 16 that divides all of an address and its strides, given or-ed together: the widest
// copy they allow.
HOST_DEVICE int copy_width(uint64_t bits) { return bits & 15 ? int(bits & 15 & (~bits + 1)) : 16; }

// Copies the first `valid` bytes of a 16-byte chunk to shared memory and writes zeros behind them. Nothing is read when
// valid is 0. cp.async where the alignment of global memory allows it: the caller commits, waits and synchronises.
DEVICE void copy_chunk(char* to, const char* from, int valid, int width) {
  if (width == 16) {
    ptx::cp_async_16(to, from, valid);
  } else if (width == 8) {
    ptx::cp_async_8(to, from, valid < 8 ? valid : 8);
    ptx::cp_async_8(to + 8, valid > 8 ? from + 8 : from, valid > 8 ? valid - 8 : 0);
  } else if (width == 4) {
#pragma unroll 1
    for (int i = 0; i < 16; i += 4) ptx::cp_async_4(to + i, i < valid ? from + i : from, i < valid ? 4 : 0);
  } else {
#pragma unroll 1
    for (int i = 0; i < 16; i++) to[i] = i < valid ? from[i] : char(0);
  }
}

// Two floats rounded to a pair of T, the first in the low half.
template <class T>
DEVICE unsigned pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>)
    return bits_of(__floats2half2_rn(low, high));
  else
    return bits_of(__floats2bfloat162_rn(low, high));
}

// The low (0) or high (1) element of a pair as a float.
template <class T>
DEVICE float unpack(unsigned pair, int which) {
  unsigned half = which ? pair >> 16 : pair & 0xffffu;
  if constexpr (std::is_same_v<T, __half>) {
    __half_raw raw;
    raw.x = static_cast<unsigned short>(half);
    return __half2float(__half(raw));
  } else {
    return __uint_as_float(half << 16);
  }
}

// Four bytes of an 8-bit type as two pairs of T. Exact.
template <class T, class Stored>
DEVICE void decode(unsigned bytes, unsigned (&pairs)[2]) {
  if constexpr (std::is_same_v<Stored, int8_t>) {
    if constexpr (std::is_same_v<T, __half>) {
      __half2 x[2];
      int8x4_to_half2x2(bytes, x);
      pairs[0] = bits_of(x[0]), pairs[1] = bits_of(x[1]);
    } else {
      __nv_bfloat162 x[2];
      int8x4_to_bfloat162x2(bytes, x);
      pairs[0] = bits_of(x[0]), pairs[1] = bits_of(x[1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      unsigned halves = bits_of(e4m3x2_to_half2(static_cast<uint16_t>(bytes >> (16 * i))));
      pairs[i] = std::is_same_v<T, __half> ? halves : pack<T>(unpack<__half>(halves, 0), unpack<__half>(halves, 1));
    }
  }
}

// Replaces the NaN and infinite elements of a pair by zero; says whether there were any.
template <class T>
DEVICE bool drop_nonfinite(unsigned& pair) {
  constexpr unsigned exponent = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
  bool low = (pair & exponent) == exponent, high = (pair >> 16 & exponent) == exponent;
  pair &= (low ? 0xffff0000u : 0xffffffffu) & (high ? 0x0000ffffu : 0xffffffffu);
  return low || high;
}

template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<T, __half>)
    ptx::mma_m16n8k16_f16(d, a, b0, b1);
  else
    ptx::mma_m16n8k16_bf16(d, a, b0, b1);
}

// Over the four lanes that hold one row of an mma accumulator; every lane gets the result.
DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <class T>
DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}
template <class T>
DEVICE float to_float(T x) {
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __bfloat162float(x);
  else
    return float(x);
}

}  // namespace torch_kernels
