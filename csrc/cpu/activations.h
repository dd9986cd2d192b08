// SPDX-License-Identifier: Apache-2.0
// Rows of activations, made ready to be multiplied with low-bit weights (lowbit.h): cut into spans, zero-padded, and
// turned into units. In mode a8 each row is quantised to int8 per span.
#pragma once
#include "core/tensor.h"
#include "cpu/nibbles.h"
#include "cpu/parallel.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

// What rows of dtype X are multiplied as. The tile unit is so fast that floats are best cut into three bfloat16, and
// halves into two, which sum to exactly the same; otherwise they are floats.
template <class X, bool a8, bool tiles>
struct Arithmetic;
template <class X, bool tiles>
struct Arithmetic<X, true, tiles> {
  using Unit = std::conditional_t<kHasQuads, Quad, float>;
  static constexpr int kParts = 1;
};
template <class X, bool tiles>
struct Arithmetic<X, false, tiles> {
  static constexpr bool kBFloat16 = std::is_same_v<X, BFloat16>;
  using Unit = std::conditional_t<tiles || (kHasPairs && kBFloat16), Pair, float>;
  static constexpr int kParts = !tiles || kBFloat16 ? 1 : std::is_same_v<X, Half> ? 2 : 3;
};

struct Quantization {
  float scale, inverse;  // x = scale · q
};

// Symmetric, so that the largest magnitude becomes 127. A span with a NaN or an infinity has a NaN for a scale.
inline Quantization quantization_of(const float* x, int count) {
  int32_t largest = 0;
  for (int k = 0; k < count; k++) largest = std::max(largest, std::bit_cast<int32_t>(x[k]) & 0x7fffffff);
  if (largest >= 0x7f800000) return {std::numeric_limits<float>::quiet_NaN(), 0};
  if (largest == 0) return {0, 0};
  constexpr float kTiny = 127 / std::numeric_limits<float>::max();
  float magnitude = std::max(std::bit_cast<float>(largest), 2 * kTiny);
  return {magnitude / 127, 127 / magnitude};
}

// q = x · inverse to the nearest, ties to even; their sum is returned. A NaN scale leaves zeros.
inline int32_t quantize(const float* x, int count, Quantization how, int8_t* q) {
  if (how.inverse == 0) {
    std::fill_n(q, count, int8_t(0));
    return 0;
  }
  int32_t total = 0;
  for (int k = 0; k < count; k++) {
    int32_t bits = std::bit_cast<int32_t>(x[k] * how.inverse + 0x1.8p23f);  // the integer lands in the lowest bits
    q[k] = int8_t(bits);
    total += int8_t(bits);
  }
  return total;
}

// In a fixed order.
inline float sum_of(const float* x, int count) {
  float partial[kOctet * 2] = {}, total = 0;
  for (int k = 0; k < count; k += kOctet * 2)
    for (int i = 0; i < kOctet * 2; i++) partial[i] += x[k + i];
  for (float part : partial) total += part;
  return total;
}

// x = parts[0] + parts[1] + ..., each its upper bits; what is left of infinities and NaN is 0.
inline void split(const float* x, int count, int parts, BFloat16* to, int64_t part_stride) {
  float rest[kSpan];
  std::copy_n(x, count, rest);
  for (int part = 0; part < parts; part++)
    for (int k = 0; k < count; k++) {
      uint32_t bits = std::bit_cast<uint32_t>(rest[k]), upper = bits & 0xffff0000;
      bool finite = (bits & 0x7f800000) != 0x7f800000;
      upper |= (bits & 0x7fffffff) > 0x7f800000 ? 0x00400000 : 0;  // a NaN stays one
      to[part * part_stride + k].bits = uint16_t(upper >> 16);
      rest[k] = finite ? rest[k] - std::bit_cast<float>(upper) : 0.f;
    }
}

// A block of rows, packed for the tile unit or for vectors.
template <class X, bool a8, bool tiles>
class Activations {
 public:
  using Unit = typename Arithmetic<X, a8, tiles>::Unit;
  static constexpr int kParts = Arithmetic<X, a8, tiles>::kParts;

  // Columns of x are taken in the order of `perm` if it is given, -1 or garbage standing for a zero.
  Activations(const Tensor& x, const Tensor& perm, int span, bool totals)
      : x_(x), perm_(perm), columns_(perm ? perm.size[0] : x.size[1]), span_(span), totals_(totals) {}

  int64_t columns() const { return columns_; }
  int64_t spans() const { return (columns_ + span_ - 1) / span_; }
  int64_t row_bytes() const { return spans() * kParts * span_units() * int64_t(sizeof(Unit)); }

  // Packs rows [first, first + count) into memory of the calling thread's `block`.
  void pack(Scratch::Block& block, int64_t first, int count) {
    first_ = first, count_ = count;
    padded_ = (count + kTileRows - 1) / kTileRows * kTileRows;
    Scratch::plan(block, [&](Scratch& scratch) {
      units_ = scratch.take<Unit>(spans() * kParts * padded_ * span_units());
      scales_ = scratch.take<float>(a8 ? spans() * padded_ : 0);
      totals_of_ = scratch.take<float>(totals_ ? spans() * padded_ : 0);
      starts_ = scratch.take<int32_t>(a8 ? spans() * padded_ : 0);
    });
    parallel_for(padded_, columns_, [&](int64_t row) {
      for (int64_t span = 0; span < spans(); span++) pack(span, int(row));
    });
  }

  RowSpan<Unit> span(int64_t s) const {
    RowSpan<Unit> rows{};
    rows.units = units_ + s * kParts * padded_ * span_units();
    rows.row = span_units(), rows.part = int64_t(padded_) * span_units();
    rows.octets = span_ / kOctet, rows.count = count_;
    if (a8) rows.scale = scales_ + s * padded_;
    if (totals_) rows.total = totals_of_ + s * padded_;
    if (a8) rows.start = starts_ + s * padded_;
    return rows;
  }

 private:
  int span_units() const { return span_ / kUnitColumns<Unit>; }

  void pack(int64_t span, int row) {
    Unit* to = units_ + (span * kParts * padded_ + row) * span_units();
    int64_t part_stride = int64_t(padded_) * span_units() * kUnitColumns<Unit>, index = span * padded_ + row;
    if (row >= count_) {
      for (int part = 0; part < kParts; part++) std::fill_n(to + part * padded_ * span_units(), span_units(), Unit{});
      if (a8) scales_[index] = 0, starts_[index] = 0;
      if (totals_) totals_of_[index] = 0;
      return;
    }
    X copy[kSpan];
    const X* from = columns_of(span, row, copy);
    if constexpr (std::is_same_v<X, BFloat16> && std::is_same_v<Unit, Pair>) {
      convert(from, reinterpret_cast<BFloat16*>(to), span_);
      if (!totals_) return;
    }
    float values[kSpan];
    convert(from, values, span_);
    if constexpr (a8) {
      Quantization how = quantization_of(values, span_);
      int8_t q[kSpan];
      int32_t total = quantize(values, span_, how, q);
      scales_[index] = how.scale;
      starts_[index] = -8 * total;
      if (totals_) totals_of_[index] = how.scale * float(total);
      if constexpr (std::is_same_v<Unit, Quad>) {
        for (int k = 0; k < span_; k += kOctet) {
          uint64_t octet;
          std::memcpy(&octet, q + k, sizeof octet);
          octet = quad_order(octet);
          std::memcpy(to + k / 4, &octet, sizeof octet);
        }
      } else {
        convert(q, to, span_);
      }
    } else {
      if (totals_) totals_of_[index] = sum_of(values, span_);
      if constexpr (std::is_same_v<Unit, float>) {
        std::copy_n(values, span_, to);
      } else if constexpr (!std::is_same_v<X, BFloat16>) {
        split(values, span_, kParts, reinterpret_cast<BFloat16*>(to), part_stride);
      }
    }
  }

  // A span of a row, in x itself where it can be.
  const X* columns_of(int64_t span, int row, X* copy) const {
    const X* from = x_.at<const X>(first_ + row);
    int64_t begin = span * span_, present = std::min<int64_t>(span_, columns_ - begin);
    if (!perm_ && present == span_) return from + begin;
    for (int64_t k = 0; k < span_; k++) {
      int64_t source = k >= present ? -1 : perm_ ? perm_.index(begin + k) : begin + k;
      copy[k] = source >= 0 && source < x_.size[1] ? from[source] : X{};
    }
    return copy;
  }

  Tensor x_, perm_;
  int64_t columns_, first_ = 0;
  int span_, count_ = 0, padded_ = 0;
  bool totals_;
  Unit* units_ = nullptr;
  float* scales_ = nullptr;
  float* totals_of_ = nullptr;
  int32_t* starts_ = nullptr;
};

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
