// SPDX-License-Identifier: Apache-2.0
// The integer product of the int8 ops: left [M, K] times right [N, K] transposed. The right factor, a weight, is far
// larger, streams from memory once for each block of left rows and is never packed beforehand.
//
// An Output takes the sums of a strip of right rows: output.strip(first, count, right) makes, for one thread, a
// function (m, vectors of the strip's kStripRows sums).
#pragma once
#include <algorithm>

#include "core/tensor.h"
#include "cpu/int8_tile.h"
#include "cpu/parallel.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

constexpr int64_t round_up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Right {
  const int8_t* data;
  int64_t row, rows, columns;

  explicit Right(const Tensor& t) : data(t.at<const int8_t>()), row(t.stride[0]), rows(t.size[0]), columns(t.size[1]) {}
  const int8_t* at(int64_t n) const { return data + n * row; }
  int64_t strips() const { return (rows + kStripRows - 1) / kStripRows; }
  int count(int64_t strip) const { return int(std::min<int64_t>(kStripRows, rows - strip * kStripRows)); }
};

// Left rows as the product reads them: few as they are, many packed in blocks.
class Left {
 public:
  Left(int64_t rows, int64_t columns)
      : rows_(rows), columns_(columns), padded_(round_up_to(columns, std::max(kPackStep, kDotStep))) {}

  bool packed() const { return kPacks && rows_ > kFewRows; }
  int64_t rows() const { return rows_; }
  int64_t padded() const { return padded_; }
  int64_t bytes() const {
    return packed() ? round_up_to(rows_, kBlockRows) * padded_ : rows_ * padded_ * int64_t(sizeof(LeftElement));
  }
  void use(void* memory) { memory_ = static_cast<uint8_t*>(memory); }
  const LeftElement* plain(int64_t m) const { return reinterpret_cast<LeftElement*>(memory_) + m * padded_; }
  const uint8_t* block(int64_t b) const { return memory_ + b * kBlockRows * padded_; }

  // row(m, to) writes the K numbers of a row.
  template <class Row>
  void fill(int64_t cost, const Row& row) {
    int64_t group = packed() ? kBlockRows : 1;
    parallel_for((rows_ + group - 1) / group, group * cost * columns_, [&](int64_t g) {
      static thread_local Scratch::Block block;
      auto* numbers = reinterpret_cast<int8_t*>(block.reserve(group * padded_));
      int64_t first = g * group, count = std::min(group, rows_ - first);
      for (int64_t r = 0; r < group; r++) {
        int8_t* to = numbers + r * padded_;
        if (r < count) row(first + r, to);
        std::fill(to + (r < count ? columns_ : 0), to + padded_, int8_t(0));
      }
#if defined(__AVX512VNNI__)
      if (packed()) return pack_block(numbers, padded_, padded_, memory_ + first * padded_);
#endif
      to_left(numbers, columns_, const_cast<LeftElement*>(plain(first)));
    });
  }

 private:
#if defined(__AMX_INT8__)
  static constexpr bool kPacks = true;
  static constexpr int64_t kFewRows = 4;
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

// Few left rows, or no packing: dot products along the rows.
template <class Output>
struct DotWorker {
  const Left& left;
  const Right& right;
  const Output& output;
  int32_t* sums;  // [M][kStripRows]

  DotWorker(const Left& left, const Right& right, const Output& output) : left(left), right(right), output(output) {
    static thread_local Scratch::Block block;
    Scratch::plan(block, [&](Scratch& scratch) { sums = scratch.take<int32_t>(left.rows() * kStripRows); });
  }

  template <int Rows, int Features>
  void tile(int64_t m, int64_t first, int f, const int8_t* ahead) const {
    dot_tile<Rows, Features>(left.plain(m), left.padded(), right.at(first + f), right.row, right.columns,
                             sums + m * kStripRows + f, kStripRows, ahead, ahead ? right.columns : 0);
  }
  template <int Rows>
  void rows(int64_t m, int64_t first, int count, int64_t next_first) const {
    constexpr int kFeatures = kVectorBytes == 64 ? (Rows == 1 ? 8 : Rows <= 4 ? 4 : 2) : 2;
    int f = 0;
    for (; f + kFeatures <= count; f += kFeatures) {
      bool inside = f + 2 * kFeatures <= count;
      int64_t next = inside ? first + f + kFeatures : next_first;
      tile<Rows, kFeatures>(m, first, f, m == 0 && next + kFeatures <= right.rows ? right.at(next) : nullptr);
    }
    for (; f < count; f++) tile<Rows, 1>(m, first, f, nullptr);
  }

  void operator()(int64_t strip, int64_t next_strip, int64_t) const {
    int64_t first = strip * kStripRows, next = next_strip * kStripRows, m = 0;
    int count = right.count(strip);
    if constexpr (kVectorBytes == 64)
      for (; m + 8 <= left.rows(); m += 8) rows<8>(m, first, count, next);
    for (; m + 4 <= left.rows(); m += 4) rows<4>(m, first, count, next);
    switch (left.rows() - m) {
      case 3: rows<3>(m, first, count, next); break;
      case 2: rows<2>(m, first, count, next); break;
      case 1: rows<1>(m, first, count, next); break;
    }
    auto&& take = output.strip(first, count, right);
    for (m = 0; m < left.rows(); m++) {
      Vector<int32_t> row[kStripVectors];
      for (int i = 0; i < kStripVectors; i++) row[i] = load(sums + m * kStripRows + i * kLanes<int32_t>);
      take(m, row);
    }
  }
};

#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
inline constexpr int64_t kLeftInCache = 512 << 10;

template <class Output>
struct PackedWorker {
  const Left& left;
  const Right& right;
  const Output& output;
  int64_t row_blocks;
  int32_t* sums;  // [2 blocks][kStripRows][16]

  PackedWorker(const Left& left, const Right& right, const Output& output, int64_t row_blocks)
      : left(left), right(right), output(output), row_blocks(row_blocks) {
    static thread_local Scratch::Block block;
    Scratch::plan(block, [&](Scratch& scratch) { sums = scratch.take<int32_t>(2 * kStripRows * kBlockRows); });
  }

  template <int Features, int Blocks>
  void features(int64_t b, int64_t first, int& f, int count, const int32_t* excess) const {
    for (; f + Features <= count; f += Features)
      vnni_tile<Features, Blocks>(left.block(b), kBlockRows * left.padded(), right.at(first + f), right.row,
                                  right.columns, excess + f, sums + f * kBlockRows, kStripRows * kBlockRows);
  }

  void operator()(int64_t task, int64_t next, int64_t) const {
    int64_t strips = right.strips(), first = task % strips * kStripRows, begin = task / strips * row_blocks;
    int64_t end = std::min(begin + row_blocks, (left.rows() + kBlockRows - 1) / kBlockRows);
    int count = right.count(task % strips);
    int32_t excess[kStripRows];
    for (int f = 0; f < count; f++) excess[f] = excess_of(right.at(first + f), right.columns);
    auto&& take = output.strip(first, count, right);
    (void)next;
    for (int64_t b = begin; b < end; b += 2) {
      int blocks = int(std::min<int64_t>(2, end - b)), f = 0;
      if (blocks == 2) {
        features<8, 2>(b, first, f, count, excess);
      } else {
        features<16, 1>(b, first, f, count, excess);
      }
      if (blocks == 2) {
        features<1, 2>(b, first, f, count, excess);
      } else {
        features<1, 1>(b, first, f, count, excess);
      }
      for (int i = 0; i < blocks; i++) {
        int64_t m = (b + i) * kBlockRows;
        transpose_sums(sums + i * kStripRows * kBlockRows, int(std::min<int64_t>(kBlockRows, left.rows() - m)),
                       [&](int r, const auto& row) { take(m + r, row); });
      }
    }
  }
};
#elif defined(__AMX_INT8__)
inline constexpr int64_t kLeftInCache = 1 << 20;

template <class Output>
struct PackedWorker {
  const Left& left;
  const Right& right;
  const Output& output;
  int64_t row_blocks;
  int64_t steps;
  MatmulSession session;
  int8_t* copies[2];
  int32_t* sums;  // [2 blocks][kStripRows][16]
  int current = 0;
  int64_t held = -1;

  PackedWorker(const Left& left, const Right& right, const Output& output, int64_t row_blocks)
      : left(left), right(right), output(output), row_blocks(row_blocks), steps(left.padded() / kPackStep) {
    static thread_local Scratch::Block block;
    Scratch::plan(block, [&](Scratch& scratch) {
      for (auto& copy : copies) copy = scratch.take<int8_t>(steps * kTilePair);
      sums = scratch.take<int32_t>(2 * kStripRows * kBlockRows);
    });
  }

  void copy(int64_t task, int8_t* to) const {
    int64_t strip = task % right.strips();
    int count = right.count(strip);
    for (int f = 0; f < kStripRows; f++) {
      int8_t* line = to + f * 64;
      for (int64_t k = 0; k < left.padded(); k += kPackStep, line += kTilePair) {
        int64_t present = f < count ? std::clamp<int64_t>(right.columns - k, 0, 64) : 0;
        uint64_t mask = present == 64 ? ~0ull : (1ull << present) - 1;
        const int8_t* from = present ? right.at(strip * kStripRows + f) + k : right.data;
        _mm512_store_si512(line, _mm512_maskz_loadu_epi8(mask, from));
      }
    }
  }

  void operator()(int64_t task, int64_t, int64_t) {
    int64_t strips = right.strips(), first = task % strips * kStripRows, begin = task / strips * row_blocks;
    int64_t end = std::min(begin + row_blocks, (left.rows() + kBlockRows - 1) / kBlockRows);
    int count = right.count(task % strips);
    copy(task, copies[0]);
    auto&& take = output.strip(first, count, right);
    auto nothing = [] {};
    for (int64_t b = begin; b < end; b += 2) {
      int blocks = int(std::min<int64_t>(2, end - b));
      if (blocks == 2) {
        amx_tile<2>(copies[0], left.block(b), kBlockRows * left.padded(), steps, sums, nothing);
      } else {
        amx_tile<1>(copies[0], left.block(b), 0, steps, sums, nothing);
      }
      for (int i = 0; i < blocks; i++) {
        int64_t m = (b + i) * kBlockRows;
        transpose_sums(sums + i * kStripRows * kBlockRows, int(std::min<int64_t>(kBlockRows, left.rows() - m)),
                       [&](int r, const auto& row) { take(m + r, row); });
      }
    }
  }
};
#endif

template <class Output>
void product(const Left& left, const Right& right, const Output& output) {
  if (left.rows() == 0 || right.rows == 0) return;
#if defined(__AVX512VNNI__)
  if (left.packed()) {
    int64_t blocks = (left.rows() + kBlockRows - 1) / kBlockRows;
    int64_t fit = std::max<int64_t>(2, kLeftInCache / std::max<int64_t>(1, kBlockRows * left.padded()) / 2 * 2);
    int64_t parts = (blocks + fit - 1) / fit, part = round_up_to((blocks + parts - 1) / parts, 2);
    parts = (blocks + part - 1) / part;
    return parallel_workers(parts * right.strips(), part * kBlockRows * kStripRows * right.columns,
                            [&] { return PackedWorker<Output>(left, right, output, part); });
  }
#endif
  parallel_workers(right.strips(), left.rows() * kStripRows * right.columns,
                   [&] { return DotWorker<Output>(left, right, output); });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
