// SPDX-License-Identifier: Apache-2.0
// Rotary embedding on the CPU. Angles are formed in double, because positions reach hundreds of thousands.
#pragma once
#include <cmath>
#include <unordered_map>
#include <vector>

#include "core/tensor.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "graph_attention/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

// A turn rotates the channel pairs of a row by one angle each: all cosines, then all sines.

inline double frequency(const Tensor& inv_freq, int64_t i) {
  return inv_freq.dtype == DType::float64 ? *inv_freq.at<const double>(i) : double(*inv_freq.at<const float>(i));
}

// By `positions` positions.
template <class Real>
void make_turn(int64_t positions, const Tensor& inv_freq, Real* turn) {
  int64_t pairs = inv_freq.size[0];
  for (int64_t i = 0; i < pairs; i++) {
    double angle = double(positions) * frequency(inv_freq, i);
    turn[i] = Real(std::cos(angle)), turn[pairs + i] = Real(std::sin(angle));
  }
}

// `from` and `to` may be the same row. A turn may go backwards.
template <bool backwards = false, class From, class Real>
void turn_row(const From* from, Real* to, int channels, const Real* turn, bool interleaved) {
  int pairs = channels / 2;
  const Real *cosine = turn, *sine = turn + pairs;
  auto pair = [&](int i, int first, int second) __attribute__((always_inline)) {
    Real a = from[first], b = from[second], s = backwards ? -sine[i] : sine[i];
    to[first] = a * cosine[i] - b * s;
    to[second] = a * s + b * cosine[i];
  };
  if (interleaved) {
    for (int i = 0; i < pairs; i++) pair(i, 2 * i, 2 * i + 1);
  } else {
#pragma GCC ivdep
    for (int i = 0; i < pairs; i++) pair(i, i, i + pairs);
  }
}

// The turns of one call. A token's rotation for an edge is that of its place in its segment, then one that all tokens
// of the segment share: R(q_start + t - start) = R(q_start - start) R(t).
template <class Real>
class Turns {
 public:
  Turns() = default;
  // For segments of up to `places` tokens.
  Turns(const Rotation& rotation, int64_t places) : inv_freq_(rotation.inv_freq), width_(2 * inv_freq_.size[0]) {
    // Places as 16 * high + low: their turns are products of few sines and cosines.
    constexpr int64_t kLow = 16;
    int64_t highs = (places + kLow - 1) / kLow, pairs = width_ / 2;
    std::vector<double> low(kLow * width_);
    for (int64_t t = 0; t < kLow; t++) make_turn(t, inv_freq_, &low[t * width_]);
    places_.resize(highs * kLow * width_);
    parallel_for(highs, kLow * width_ * 8, [&](int64_t h) {
      std::vector<double> high(width_);
      make_turn(h * kLow, inv_freq_, high.data());
      for (int64_t t = 0; t < kLow; t++) {
        const double *a = high.data(), *b = &low[t * width_];
        Real* to = &places_[(h * kLow + t) * width_];
        for (int64_t i = 0; i < pairs; i++) {
          to[i] = Real(a[i] * b[i] - a[pairs + i] * b[pairs + i]);
          to[pairs + i] = Real(a[i] * b[pairs + i] + a[pairs + i] * b[i]);
        }
      }
    });
  }

  explicit operator bool() const { return width_ > 0; }

  // The number of the turn by so many positions; equal ones share it.
  int add(int64_t positions) {
    auto [found, is_new] = numbers_.try_emplace(positions, int(numbers_.size()));
    if (is_new) {
      shared_.resize(shared_.size() + width_);
      make_turn(positions, inv_freq_, shared_.data() + shared_.size() - width_);
    }
    return found->second;
  }

  const Real* of_place(int64_t place) const { return &places_[place * width_]; }
  const Real* shared(int number) const { return &shared_[number * width_]; }

 private:
  Tensor inv_freq_;
  int64_t width_ = 0;
  std::vector<Real> places_, shared_;
  std::unordered_map<int64_t, int> numbers_;
};

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
