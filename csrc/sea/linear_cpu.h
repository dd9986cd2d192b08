// SPDX-License-Identifier: Apache-2.0
// What the two CPU kernels of linear attention share. They walk a head in blocks of tokens, with the state in cache.
// Within a block, matrix products of all tokens are cut to a triangle. A product with zeros would still spread NaN and
// infinity, so a causal block that holds any goes token by token.
#pragma once
#include "cpu/dtypes.h"
#include "cpu/floats.h"
#include "cpu/matmul.h"
#include "cpu/parallel.h"
#include "sea/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

inline constexpr int64_t kBlock = 64;  // tokens
inline constexpr int64_t kGroup = 16;  // rows of a triangle that go together

constexpr int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

template <class Real>
inline Real sum_of_lanes(Vector<Real> lanes) {
  Real sum = 0;
  for (int i = 0; i < kLanes<Real>; i++) sum += lanes[i];
  return sum;
}

// A block's rows of one head, [kBlock][padded(width)], zero beyond what there is.
template <class Stored>
struct Rows {
  using Real = RealOf<Stored>;
  Real* data;
  int64_t width, stride;

  void take(Scratch& scratch, int64_t columns) {
    width = columns, stride = padded(columns);
    data = scratch.take<Real>(kBlock * stride);
  }
  Real* row(int64_t i) const { return data + i * stride; }

  // Columns from `first` on; whether all are finite.
  bool load(const Tensor& tensor, int64_t b, int64_t t, int64_t h, int64_t tokens, int64_t first = 0) const {
    Vector<Real> zero{};
    for (int64_t i = 0; i < kBlock; i++) {
      if (i < tokens) {
        convert(tensor.at<const Stored>(b, t + i, h, first), row(i), width);
        std::fill(row(i) + width, row(i) + stride, Real(0));
        for (int64_t c = 0; c < stride; c += kLanes<Real>) zero += cpu::TORCH_KERNELS_ISA::load(row(i) + c) * Real(0);
      } else if (i < padded(tokens)) {
        std::fill_n(row(i), stride, Real(0));
      }
    }
    return sum_of_lanes<Real>(zero) == 0;  // NaN if any was not finite
  }
  void save(const Tensor& tensor, int64_t b, int64_t t, int64_t h, int64_t tokens, int64_t first = 0) const {
    for (int64_t i = 0; i < tokens; i++) convert(row(i), tensor.at<Stored>(b, t + i, h, first), width);
  }
};

// products[i][j] = left[i] · right[j] for j <= i, zero elsewhere in [tokens][padded(tokens)]. `turned` has room for
// right's transpose, [stride][kBlock].
template <class Stored, class Real = RealOf<Stored>>
void lower_products(const Rows<Stored>& left, const Rows<Stored>& right, Real* turned, Real* products, int64_t tokens) {
  transpose_units(right.data, right.stride, turned, kBlock, padded(tokens), right.stride);
  for (int64_t i = 0; i < tokens; i += kGroup) {
    int64_t rows = std::min(kGroup, tokens - i);
    matmul<false, true>(left.row(i), left.stride, turned, kBlock, products + i * kBlock, kBlock, int(rows),
                        int(i + kGroup), int(left.width));
  }
  for (int64_t i = 0; i < tokens; i++) std::fill(products + i * kBlock + i + 1, products + (i + 1) * kBlock, Real(0));
}

// out[i] += sum over j <= i of weights[i][j] right[j].
template <class Stored, class Real = RealOf<Stored>>
void add_lower(const Real* weights, const Rows<Stored>& right, const Rows<Stored>& out, int64_t tokens) {
  for (int64_t i = 0; i < tokens; i += kGroup)
    matmul<true, true>(weights + i * kBlock, kBlock, right.data, right.stride, out.row(i), out.stride,
                       int(std::min(kGroup, tokens - i)), int(right.stride), int(std::min(tokens, i + kGroup)));
}

// out[j] += sum over i >= j of weights[i][j] left[i].
template <class Stored, class Real = RealOf<Stored>>
void add_upper(const Real* weights, const Rows<Stored>& left, const Rows<Stored>& out, int64_t tokens) {
  for (int64_t j = 0; j < tokens; j += kGroup)
    matmul<true, false>(weights + j * kBlock + j, kBlock, left.row(j), left.stride, out.row(j), out.stride,
                        int(std::min(kGroup, tokens - j)), int(left.stride), int(tokens - j));
}

// state[c] += sum of left[i][c] right[i], [left.width][right.stride].
template <class Stored, class Real = RealOf<Stored>>
void add_products(const Rows<Stored>& left, const Rows<Stored>& right, Real* state, int64_t tokens) {
  matmul<true, false>(left.data, left.stride, right.data, right.stride, state, right.stride, int(left.width),
                      int(right.stride), int(tokens));
}

// out[i] = left[i] state, or +=.
template <bool accumulate, class Stored, class Real = RealOf<Stored>>
void multiply_state(const Rows<Stored>& left, const Real* state, const Rows<Stored>& out, int64_t tokens) {
  matmul<accumulate, true>(left.data, left.stride, state, out.stride, out.data, out.stride, int(tokens),
                           int(out.stride), int(left.width));
}

// Of the weights in a row of a triangle.
template <class Real>
inline Real sum_of_row(const Real* weights) {
  Vector<Real> sums{};
  for (int64_t c = 0; c < kBlock; c += kLanes<Real>) sums += load(weights + c);
  return sum_of_lanes<Real>(sums);
}

template <class Real>
inline Real dot(const Real* a, const Real* b, int64_t size) {
  Vector<Real> sums{};
  for (int64_t c = 0; c < size; c += kLanes<Real>) sums += load(a + c) * load(b + c);
  return sum_of_lanes<Real>(sums);
}

// to[c] += factor from[c].
template <class Real>
inline void add_scaled(const Real* from, Real factor, Real* to, int64_t size) {
  for (int64_t c = 0; c < size; c += kLanes<Real>) store(to + c, load(to + c) + load(from + c) * factor);
}

// A state tensor [B, H, m, Dv], from column `first` on, and [m][stride].
template <class Real>
inline void load_state(const Tensor& tensor, int64_t b, int64_t h, int64_t first, int64_t width, int64_t stride,
                       int64_t rows, Real* to) {
  std::fill_n(to, padded(rows) * stride, Real(0));
  if (!tensor) return;
  for (int64_t c = 0; c < rows; c++) convert(tensor.at<const Real>(b, h, c, first), to + c * stride, width);
}
template <class Real>
inline void save_state(const Real* from, int64_t stride, const Tensor& tensor, int64_t b, int64_t h, int64_t first,
                       int64_t width, int64_t rows) {
  for (int64_t c = 0; c < rows; c++) convert(from + c * stride, tensor.at<Real>(b, h, c, first), width);
}
template <class Real>
inline void load_norm(const Tensor& tensor, int64_t b, int64_t h, int64_t size, Real* to) {
  std::fill_n(to, padded(size), Real(0));
  if (tensor) convert(tensor.at<const Real>(b, h), to, size);
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
