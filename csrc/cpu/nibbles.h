// SPDX-License-Identifier: Apache-2.0
// Four-bit weights q in 0..15, packed for the CPU. A block is 64 features; each of its octets of columns takes 256
// bytes: 32 bits per feature, features in ascending order. Nibble p of the 32 bits is column 2 (p % 4) + p / 4 of the
// octet:
//
//   nibble   0  1  2  3 | 4  5  6  7
//   column   0  2  4  6 | 1  3  5  7
//
// so shifting by 4 j brings the pair of columns 2 j and 2 j + 1 to the bottom of the two 16-bit halves, and the low
// nibbles of the four bytes are columns 0, 4, 1, 5, the high ones 2, 6, 3, 7: a quad each.
#pragma once
#include "cpu/lowbit.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

inline constexpr int kOctetBytes = kFeatures * kOctet / 2;
inline constexpr int kPrefetchBytes = 4096;  // how far ahead of its use a weight is fetched from memory

// The order in which quads hold the columns of an octet.
inline uint64_t quad_order(uint64_t octet) {
  uint64_t inner = (octet ^ octet >> 16) & 0x00000000ffff0000;
  octet ^= inner | inner << 16;
  uint64_t outer = (octet ^ octet >> 8) & 0x0000ff000000ff00;
  return octet ^ (outer | outer << 8);
}

// Unit j of the octet that 32 bits hold, per lane: q - 8 as floats or pairs, q itself as quads.
template <class Unit>
Vector<SumOf<Unit>> unpack(Vector<uint32_t> packed, int j);

template <>
inline Vector<int32_t> unpack<Quad>(Vector<uint32_t> packed, int j) {
  return Vector<int32_t>(packed >> (4 * j) & 0x0f0f0f0f);
}

#if defined(__AVX512F__)
template <>
inline Vector<float> unpack<float>(Vector<uint32_t> packed, int j) {
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return Vector<float>(_mm512_permutexvar_ps(__m512i(packed >> (16 * (j % 2) + 4 * (j / 2))), values));
}
#else
template <>
inline Vector<float> unpack<float>(Vector<uint32_t> packed, int j) {
  Vector<uint32_t> q = packed >> (16 * (j % 2) + 4 * (j / 2)) & 15;
  return bit_cast_vector<Vector<float>>(q | 0x4b000000) - (0x1p23f + 8);  // 2^23 + q
}
#endif

#if defined(__AVX512BF16__)
// Only five bits of a 16-bit index count: the table comes twice, whatever the fifth is.
template <>
inline Vector<float> unpack<Pair>(Vector<uint32_t> packed, int j) {
  const __m512i values =
      _mm512_setr_epi32(0xc0e0c100, 0xc0a0c0c0, 0xc040c080, 0xbf80c000, 0x3f800000, 0x40404000, 0x40a04080, 0x40e040c0,
                        0xc0e0c100, 0xc0a0c0c0, 0xc040c080, 0xbf80c000, 0x3f800000, 0x40404000, 0x40a04080, 0x40e040c0);
  return bit_cast_vector<Vector<float>>(_mm512_permutexvar_epi16(__m512i(packed >> (4 * j)), values));
}
#endif

// Packed weights of a block over one span, unpacked where they are used.
template <class Unit>
struct Nibbles {
  const uint8_t* bytes;

  __attribute__((always_inline)) void enter(int octet) const {
#pragma GCC unroll 4
    for (int line = 0; line < kOctetBytes; line += 64) prefetch(bytes + octet * kOctetBytes + kPrefetchBytes + line);
  }
  Vector<SumOf<Unit>> unit(int octet, int j, int vector) const {
    Vector<uint32_t> packed;
    std::memcpy(&packed, bytes + octet * kOctetBytes + vector * kVectorBytes, sizeof packed);
    return unpack<Unit>(packed, j);
  }
};

// panel[unit][feature] = the weights of a span. `center` makes quads signed, q - 8.
template <bool center, class Unit>
inline void unpack_panel(Nibbles<Unit> nibbles, int octets, Unit* panel) {
  constexpr int lanes = kLanes<float>;
  for (int octet = 0; octet < octets; octet++) {
    nibbles.enter(octet);
    for (int v = 0; v < kFeatures / lanes; v++)
#pragma GCC unroll 8
      for (int j = 0; j < kOctetUnits<Unit>; j++) {
        auto values = nibbles.unit(octet, j, v);
        if constexpr (center && std::is_same_v<Unit, Quad>) {
          using Bytes = Vector<int8_t>;
          values = bit_cast_vector<Vector<int32_t>>(bit_cast_vector<Bytes>(values) - int8_t(8));
        }
        std::memcpy(panel + (octet * kOctetUnits<Unit> + j) * kFeatures + v * lanes, &values, sizeof values);
      }
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
