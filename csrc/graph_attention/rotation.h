// SPDX-License-Identifier: Apache-2.0
// Rotary embedding on the CPU. Angles are formed in double, because positions reach hundreds of thousands.
#pragma once
#include <cmath>

#include "core/tensor.h"
#include "cpu/simd.h"
#include "graph_attention/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

// By which a channel pair is turned.
template <class Real>
struct Turn {
  Real cosine, sine;
};

inline double frequency(const Tensor& inv_freq, int64_t i) {
  return inv_freq.dtype == DType::float64 ? *inv_freq.at<const double>(i) : double(*inv_freq.at<const float>(i));
}

// The turns of all channel pairs for a token at `position`.
template <class Real>
void turns_of(int64_t position, const Tensor& inv_freq, Turn<Real>* turns) {
  for (int64_t i = 0; i < inv_freq.size[0]; i++) {
    double angle = double(position) * frequency(inv_freq, i);
    turns[i] = {Real(std::cos(angle)), Real(std::sin(angle))};
  }
}

// `from` and `to` may be the same row.
template <class Real>
void turn_row(const Real* from, Real* to, int channels, const Turn<Real>* turns, bool interleaved) {
  int half = channels / 2;
  for (int i = 0; i < half; i++) {
    int first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
    Real a = from[first], b = from[second];
    to[first] = a * turns[i].cosine - b * turns[i].sine;
    to[second] = a * turns[i].sine + b * turns[i].cosine;
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
