// SPDX-License-Identifier: Apache-2.0
// Joins attention over two disjoint sets of keys.
#include <cmath>
#include <limits>

#include "cpu/dtypes.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "tree_attention/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

template <class T, class Real>
void merge_row(const MergeStatesParams& p, int64_t b, int64_t t, int64_t h) {
  constexpr Real kNothing = -std::numeric_limits<Real>::infinity();
  Real a = *p.lse_a.at<const float>(b, h, t), c = *p.lse_b.at<const float>(b, h, t);
  Real high = a > c || c != c ? a : c;
  Real lse = a == kNothing ? c : c == kNothing ? a : high + std::log(std::exp(a - high) + std::exp(c - high));
  Real weight_a = std::exp(a - lse), weight_b = std::exp(c - lse);
  const T *from_a = p.out_a.at<const T>(b, t, h), *from_b = p.out_b.at<const T>(b, t, h);
  T* to = p.out.at<T>(b, t, h);
  for (int64_t i = 0; i < p.out.size[3]; i++) {
    Real sum = 0;
    if (a != kNothing) sum += weight_a * Real(to_float(from_a[i * p.out_a.stride[3]]));
    if (c != kNothing) sum += weight_b * Real(to_float(from_b[i * p.out_b.stride[3]]));
    to[i] = from_float<T>(sum);
  }
  *p.lse.at<float>(b, h, t) = float(lse);
}

template <class T, class Real>
void merge(const MergeStatesParams& p) {
  int64_t nodes = p.out.size[1], heads = p.out.size[2];
  constexpr int64_t kRowsPerTask = 16;
  parallel_for((p.out.size[0] * nodes + kRowsPerTask - 1) / kRowsPerTask, kRowsPerTask * heads * p.out.size[3],
               [&](int64_t task) {
                 for (int64_t row = task * kRowsPerTask; row < (task + 1) * kRowsPerTask && row < p.out.size[0] * nodes;
                      row++)
                   for (int64_t h = 0; h < heads; h++) merge_row<T, Real>(p, row / nodes, row % nodes, h);
               });
}

}  // namespace

void merge_attention_states(const MergeStatesParams& p) {
  for_each_dtype(p.out.dtype, [&]<class Stored>(Stored) { merge<Stored, RealOf<Stored>>(p); });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
