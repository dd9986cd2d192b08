// SPDX-License-Identifier: Apache-2.0
// Neighbouring elements, loaded together and converted when used.
#pragma once
#include "tile.cuh"

namespace torch_kernels {

// kCount consecutive elements as they lie in memory.
template <class T, int kCount>
struct Pack {
  static constexpr int kWords = kCount * int(sizeof(T)) / 4;
  unsigned words[kWords];

  DEVICE float operator[](int i) const {
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(words[i]);
    else
      return unpack<T>(words[i / 2], i % 2);
  }

  // The first `valid` elements, zeros behind them. `aligned`: the address suits the widest load.
  DEVICE void load(const T* from, int valid, bool aligned) {
    if (aligned && valid >= kCount) {
      if constexpr (kWords % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
          uint4 four = reinterpret_cast<const uint4*>(from)[i / 4];
          words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
        }
      } else {
        uint2 two = *reinterpret_cast<const uint2*>(from);
        words[0] = two.x, words[1] = two.y;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kWords; i++) words[i] = 0;
#pragma unroll
    for (int i = 0; i < kCount; i++)
      if (i < valid) {
        if constexpr (sizeof(T) == 4)
          words[i] = same_bits<unsigned>(from[i]);
        else
          words[i / 2] |= unsigned(same_bits<uint16_t>(from[i])) << (i % 2 * 16);
      }
  }
};

}  // namespace torch_kernels
