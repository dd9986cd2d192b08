// SPDX-License-Identifier: Apache-2.0
// x · H for the symmetric Hadamard matrices H = kron(H_base, H_power): base 1, 12 or 20 by Paley's construction, power
// a power of two in Sylvester's order. Butterflies over vectors, several levels for each pass over the row.
#pragma once
#include <array>

#include "cpu/floats.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

// The matrix of order q + 1: ones in row and column 0, elsewhere -chi(i + j), or -1 where i + j = 0 modulo q.
template <int Order>
constexpr std::array<std::array<float, Order>, Order> paley() {
  std::array<std::array<float, Order>, Order> matrix{};
  constexpr int q = Order - 1;
  bool square[Order] = {};
  for (int i = 1; i < q; i++) square[i * i % q] = true;
  for (int i = 0; i < Order; i++)
    for (int j = 0; j < Order; j++) {
      int sum = i > 0 && j > 0 ? (i + j - 2) % q : -1;
      matrix[i][j] = sum < 0 || (sum > 0 && !square[sum]) ? 1.f : -1.f;
    }
  return matrix;
}

// v's lanes i and i ^ Stride become their sum and difference.
template <int Stride>
inline Vector<float> butterfly_lanes(Vector<float> v) {
  Vector<int32_t> partner;
  Vector<float> sign;
  for (int i = 0; i < kLanes<float>; i++) partner[i] = i ^ Stride, sign[i] = i & Stride ? -1.f : 1.f;
  return __builtin_shuffle(v, partner) + v * sign;
}

inline Vector<float> butterfly_within(Vector<float> v) {
  v = butterfly_lanes<1>(v);
  v = butterfly_lanes<2>(v);
  if constexpr (kLanes<float> > 4) v = butterfly_lanes<4>(v);
  if constexpr (kLanes<float> > 8) v = butterfly_lanes<8>(v);
  return v;
}

// All levels among `Count` vectors, from neighbours up.
template <int Count>
inline void butterfly_among(Vector<float> (&v)[Count]) {
#pragma GCC unroll 4
  for (int stride = 1; stride < Count; stride *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < Count; i++)
      if (!(i & stride)) {
        Vector<float> even = v[i], odd = v[i + stride];
        v[i] = even + odd;
        v[i + stride] = even - odd;
      }
}

inline constexpr int kMaxRadix = kVectorBytes == 64 ? 16 : 8;

// One pass over x[n]: the levels from `stride` to stride * Radix / 2. get(i) and put(i, v) read and write vectors.
template <int Radix, bool kWithin, class Get, class Put>
inline void hadamard_pass(int64_t n, int64_t stride, const Get& get, const Put& put) {
  for (int64_t block = 0; block < n; block += stride * Radix)
    for (int64_t i = block; i < block + stride; i += kLanes<float>) {
      Vector<float> v[Radix];
#pragma GCC unroll 16
      for (int r = 0; r < Radix; r++) {
        v[r] = get(i + r * stride);
        if constexpr (kWithin) v[r] = butterfly_within(v[r]);
      }
      butterfly_among(v);
#pragma GCC unroll 16
      for (int r = 0; r < Radix; r++) put(i + r * stride, v[r]);
    }
}

template <bool kWithin, class Get, class Put>
inline void hadamard_pass(int radix, int64_t n, int64_t stride, const Get& get, const Put& put) {
  if constexpr (kMaxRadix == 16)
    if (radix == 16) return hadamard_pass<16, kWithin>(n, stride, get, put);
  switch (radix) {
    case 8: return hadamard_pass<8, kWithin>(n, stride, get, put);
    case 4: return hadamard_pass<4, kWithin>(n, stride, get, put);
    case 2: return hadamard_pass<2, kWithin>(n, stride, get, put);
    default: return hadamard_pass<1, kWithin>(n, stride, get, put);
  }
}

// The product along the base, of segments of `power` floats, in place where it is shorter than a vector.
template <int Base, class Put>
inline void multiply_base(float* x, int64_t power, const Put& put) {
  static constexpr auto matrix = paley<Base>();
  auto segment = [&](int64_t i, auto load_at, auto put_at) __attribute__((always_inline)) {
    decltype(load_at(0)) v[Base];
#pragma GCC unroll 20
    for (int j = 0; j < Base; j++) v[j] = load_at(j * power + i);
    for (int r = 0; r < Base; r++) {
      auto sum = v[0];
#pragma GCC unroll 20
      for (int j = 1; j < Base; j++) sum += v[j] * matrix[r][j];
      put_at(r * power + i, sum);
    }
  };
  int64_t i = 0;
  for (; i + kLanes<float> <= power; i += kLanes<float>) segment(i, [&](int64_t at) { return load(x + at); }, put);
  for (; i < power; i++) segment(i, [&](int64_t at) { return x[at]; }, [&](int64_t at, float v) { x[at] = v; });
}

// x · H for a row of n numbers: get(i) reads x as a vector from i on, put(i, v) takes the result as vectors, padded at
// the end where n is no multiple of them. `row` is room for n floats.
template <class Get, class Put>
inline void hadamard(int64_t n, const Get& get, float* row, const Put& put) {
  int64_t base = n % 20 == 0 && std::has_single_bit(uint64_t(n / 20))   ? 20
                 : n % 12 == 0 && std::has_single_bit(uint64_t(n / 12)) ? 12
                                                                        : 1;
  int64_t power = n / base;
  constexpr int lanes = kLanes<float>;
  auto keep = [&](int64_t i, Vector<float> v) { store(row + i, v); };
  auto along_base = [&](const auto& to) {
    if (base == 12) multiply_base<12>(row, power, to);
    if (base == 20) multiply_base<20>(row, power, to);
  };
  if (power < lanes) {
    for (int64_t i = 0; i < n; i += lanes) {
      Vector<float> v = get(i);
      std::memcpy(row + i, &v, size_t(std::min<int64_t>(lanes, n - i)) * sizeof(float));
    }
    for (int64_t stride = 1; stride < power; stride *= 2)
      for (int64_t i = 0; i < n; i++)
        if (!(i & stride)) {
          float even = row[i], odd = row[i + stride];
          row[i] = even + odd, row[i + stride] = even - odd;
        }
    along_base(keep);
    for (int64_t i = 0; i < n; i += lanes) put(i, load_float(row + i, n - i));
    return;
  }
  int64_t stride = lanes;
  auto pass = [&](auto within, const auto& from) {
    int radix = int(std::min<int64_t>(kMaxRadix, power / stride));
    if (base == 1 && stride * radix == power) {
      hadamard_pass<within()>(radix, n, stride, from, put);
    } else {
      hadamard_pass<within()>(radix, n, stride, from, keep);
    }
    stride *= radix;
  };
  pass(std::true_type{}, get);
  while (stride < power) pass(std::false_type{}, [&](int64_t i) { return load(row + i); });
  along_base(put);
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
