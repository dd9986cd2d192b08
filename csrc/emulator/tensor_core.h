// SPDX-License-Identifier: Apache-2.0
//
// ldmatrix and mma. Which lane and register holds which matrix element is said once, in the fragment functions.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

#include "machine.h"

namespace emulator {

struct Element {
  int row, column;
};

// Fragments of mma.m16n8kK, K = 32 bytes of `per_word`-to-a-register elements: 16 for 16-bit types, 32 for 8-bit types.
// `part` counts elements within a register from its low bits.
template <int per_word>
struct Fragment {
  static constexpr int k = 8 * per_word;
  static constexpr Element a(int lane, int word, int part) {  // 16 x K
    return {lane / 4 + 8 * (word & 1), lane % 4 * per_word + part + 4 * per_word * (word >> 1)};
  }
  static constexpr Element b(int lane, int word, int part) {  // K x 8
    return {lane % 4 * per_word + part + 4 * per_word * word, lane / 4};
  }
};
constexpr Element fragment_d(int lane, int word) {  // 16 x 8, one fp32 or s32 element to a register
  return {lane / 4 + 8 * (word >> 1), lane % 4 * 2 + (word & 1)};
}
constexpr Element fragment_8x8(int lane, int part) {  // a tile as ldmatrix hands it out, two elements to a register
  return {lane / 4, lane % 4 * 2 + part};
}

struct F16 {
  using Accumulator = float;
  static constexpr int per_word = 2;
  static float decode(unsigned word, int part) {
    unsigned h = word >> 16 * part & 0xffff, magnitude = (h & 0x7fff) << 13;
    // Moving the exponent's bias from 15 to 127 is a product by 2^112; it is right for subnormals too.
    float value = std::bit_cast<float>(magnitude) * std::bit_cast<float>((127u + 112u) << 23);
    unsigned bits = (h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : std::bit_cast<unsigned>(value);
    return std::bit_cast<float>(bits | (h & 0x8000) << 16);
  }
};
struct BF16 {
  using Accumulator = float;
  static constexpr int per_word = 2;
  static float decode(unsigned word, int part) { return std::bit_cast<float>(part ? word & 0xffff0000u : word << 16); }
};
struct S8 {
  using Accumulator = unsigned;  // s32 that wraps
  static constexpr int per_word = 4;
  static unsigned decode(unsigned word, int part) { return unsigned(int(int8_t(word >> 8 * part))); }
};

template <class D>
struct MmaOperands {
  D* d;
  const unsigned* a;
  unsigned b[2];
};

// d += a b, the products of each element of d added in order of k.
template <class Type, class D>
void mma_m16n8(D* d, const unsigned* a, unsigned b0, unsigned b1, const char* name, Site site) {
  MmaOperands<D> operand{d, a, {b0, b1}};
  auto run = [](void* const* operands, unsigned) {
    using T = typename Type::Accumulator;
    using Layout = Fragment<Type::per_word>;
    typedef T Row __attribute__((vector_size(8 * sizeof(T))));
    T a[16][Layout::k];
    Row b[Layout::k], d[16];
    for (int lane = 0; lane < 32; lane++) {
      const auto& o = *static_cast<MmaOperands<D>*>(operands[lane]);
      for (int word = 0; word < 4; word++)
        for (int part = 0; part < Type::per_word; part++) {
          Element e = Layout::a(lane, word, part);
          a[e.row][e.column] = Type::decode(o.a[word], part);
        }
      for (int word = 0; word < 2; word++)
        for (int part = 0; part < Type::per_word; part++) {
          Element e = Layout::b(lane, word, part);
          b[e.row][e.column] = Type::decode(o.b[word], part);
        }
      for (int word = 0; word < 4; word++) {
        Element e = fragment_d(lane, word);
        d[e.row][e.column] = T(o.d[word]);
      }
    }
    for (int row = 0; row < 16; row++) {
      Row sum = d[row];
      for (int k = 0; k < Layout::k; k++) sum += a[row][k] * b[k];
      d[row] = sum;
    }
    for (int lane = 0; lane < 32; lane++)
      for (int word = 0; word < 4; word++) {
        Element e = fragment_d(lane, word);
        static_cast<MmaOperands<D>*>(operands[lane])->d[word] = D(d[e.row][e.column]);
      }
    statistics.mma++;
  };
  warp_instruction(operand, run, name, site);
}

struct LdmatrixOperands {
  const char* row;
  unsigned* words;
};

template <int tiles, bool transposed>
void ldmatrix(unsigned* words, const void* row, const char* name, Site site) {
  LdmatrixOperands operand{static_cast<const char*>(row), words};
  if (self().lane < 8 * tiles) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail(std::string(name) + " of a row that is not 16-byte aligned", site);
    size_t offset = operand.row - machine->shared;
    if (offset < machine->shared_bytes + 4096 && offset + 16 > machine->shared_bytes)
      fail(std::string(name) + " of byte " + std::to_string(offset) + " of " + std::to_string(machine->shared_bytes) +
               " bytes of shared memory",
           site);
    record(false, row, 16, site);
  }
  auto run = [](void* const* operands, unsigned) {
    auto at = [&](int lane) -> LdmatrixOperands& { return *static_cast<LdmatrixOperands*>(operands[lane]); };
    for (int tile = 0; tile < tiles; tile++) {
      uint16_t elements[8][8];
      for (int r = 0; r < 8; r++) std::memcpy(elements[r], at(8 * tile + r).row, 16);
      for (int lane = 0; lane < 32; lane++) {
        unsigned word = 0;
        for (int part = 0; part < 2; part++) {
          Element e = fragment_8x8(lane, part);
          word |= unsigned(transposed ? elements[e.column][e.row] : elements[e.row][e.column]) << 16 * part;
        }
        at(lane).words[tile] = word;
      }
      int rows_in[8] = {}, passes = 1;  // by the group of four banks that holds 16 bytes
      for (int r = 0; r < 8; r++) {
        bool repeated = false;
        for (int s = 0; s < r; s++) repeated |= at(8 * tile + s).row == at(8 * tile + r).row;
        if (!repeated) passes = std::max(passes, ++rows_in[reinterpret_cast<uintptr_t>(at(8 * tile + r).row) / 16 % 8]);
      }
      statistics.ldmatrix_wavefronts += passes;
    }
    statistics.ldmatrix++, statistics.ldmatrix_tiles += tiles;
  };
  warp_instruction(operand, run, name, site);
}

inline unsigned transpose_8x8(unsigned tile, const char* name, Site site) {
  auto run = [](void* const* operands, unsigned) {
    uint16_t elements[8][8];
    for (int lane = 0; lane < 32; lane++)
      for (int part = 0; part < 2; part++) {
        Element e = fragment_8x8(lane, part);
        elements[e.row][e.column] = uint16_t(*static_cast<unsigned*>(operands[lane]) >> 16 * part);
      }
    for (int lane = 0; lane < 32; lane++) {
      Element low = fragment_8x8(lane, 0), high = fragment_8x8(lane, 1);
      *static_cast<unsigned*>(operands[lane]) =
          elements[low.column][low.row] | unsigned(elements[high.column][high.row]) << 16;
    }
  };
  warp_instruction(tile, run, name, site);
  return tile;
}

}  // namespace emulator
