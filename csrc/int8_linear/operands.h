// SPDX-License-Identifier: Apache-2.0
// The factors of the integer product: left [M, K], activations, and right [N, K], a weight that streams from memory.
#pragma once
#include <algorithm>

#include "core/tensor.h"
#include "cpu/int8_tile.h"
#include "cpu/parallel.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

constexpr int64_t divide_up(int64_t n, int64_t d) { return (n + d - 1) / d; }

// A strip is kStripRows rows, the last one maybe fewer.
struct Right {
  const int8_t* data;
  int64_t row, rows, columns;

  explicit Right(const Tensor& t) : data(t.at<const int8_t>()), row(t.stride[0]), rows(t.size[0]), columns(t.size[1]) {}
  const int8_t* at(int64_t n) const { return data + n * row; }
  int64_t strips() const { return divide_up(rows, kStripRows); }
  int count(int64_t strip) const { return int(std::clamp<int64_t>(rows - strip * kStripRows, 0, kStripRows)); }
  int64_t lines() const { return divide_up(columns, 64); }  // cache lines of a row
};

// Few rows stay as they are, many are packed in blocks.
class Left {
 public:
  Left(int64_t rows, int64_t columns)
      : rows_(rows), columns_(columns), padded_(divide_up(columns, kPackStep) * kPackStep) {}

  bool packed() const { return kPacks && rows_ > kFewRows; }
  int64_t rows() const { return rows_; }
  int64_t blocks() const { return divide_up(rows_, kBlockRows); }
  int64_t padded() const { return padded_; }
  int64_t block_bytes() const { return kBlockRows * padded_; }
  int64_t bytes() const { return packed() ? blocks() * block_bytes() : rows_ * padded_ * int64_t(sizeof(LeftElement)); }
  void use(void* memory) { memory_ = static_cast<uint8_t*>(memory); }
  const LeftElement* plain(int64_t m) const { return reinterpret_cast<LeftElement*>(memory_) + m * padded_; }
  const uint8_t* block(int64_t b) const { return memory_ + b * block_bytes(); }

  // row(m, to) writes the K numbers of a row.
  template <class Row>
  void fill(int64_t cost, const Row& row) {
    int64_t group = packed() ? kBlockRows : 1;
    parallel_for(divide_up(rows_, group), group * cost * columns_, [&](int64_t g) {
      static thread_local Scratch::Block block;
      auto* numbers = reinterpret_cast<int8_t*>(block.reserve(group * padded_));
      int64_t first = g * group, count = std::min(group, rows_ - first);
      for (int64_t r = 0; r < group; r++) {
        int8_t* to = numbers + r * padded_;
        if (r < count) row(first + r, to);
        std::fill(to + (r < count ? columns_ : 0), to + padded_, int8_t(0));
      }
#if defined(__AVX512VNNI__)
      if (packed()) return pack_block(numbers, padded_, padded_, memory_ + g * block_bytes());
#endif
      to_left(numbers, columns_, const_cast<LeftElement*>(plain(first)));
    });
  }

 private:
#if defined(__AMX_INT8__)
  static constexpr bool kPacks = true;
  static constexpr int64_t kFewRows = 0;  // the weight streams as fast into tiles as into vectors
#elif defined(__AVX512VNNI__)
  static constexpr bool kPacks = true;
  static constexpr int64_t kFewRows = 8;
#else
  static constexpr bool kPacks = false;
  static constexpr int64_t kFewRows = 0;
#endif
  int64_t rows_, columns_, padded_;
  uint8_t* memory_ = nullptr;
};

// Brings a strip into the cache, a few lines with each of `calls` calls.
class Fetch {
 public:
  void start(const Right& right, int64_t strip, int64_t calls) {
    right_ = &right;
    row_ = strip * kStripRows;
    end_ = row_ + right.count(strip);
    line_ = 0;
    each_ = divide_up(right.count(strip) * right.lines(), std::max<int64_t>(1, calls));
  }
  void some() {
    for (int64_t i = 0; i < each_ && row_ < end_; i++) {
      prefetch(right_->at(row_) + line_ * 64);
      if (++line_ == right_->lines()) line_ = 0, row_++;
    }
  }

 private:
  const Right* right_;
  int64_t row_, end_, line_, each_;
};

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
