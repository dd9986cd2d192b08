// SPDX-License-Identifier: Apache-2.0
// The integer product of the int8 ops: left [M, K] times right [N, K] transposed. The right factor streams from memory
// once for each part of the left one that stays in cache, and is never packed beforehand.
//
// An Output takes the sums. output.strip(right, first, count, begin, end) makes a function, for one thread, for right
// rows [first, first + count) and left rows [begin, end): put(m, i, sums) gets the i-th vector of left row m's sums.
#pragma once
#include "int8_linear/operands.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

inline constexpr int kStripVectors = kStripRows / kLanes<int32_t>;

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

  void operator()(int64_t strip, int64_t next_strip) const {
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
    auto put = output.strip(right, first, count, 0, left.rows());
    for (m = 0; m < left.rows(); m++)
#pragma GCC unroll 8
      for (int i = 0; i < kStripVectors; i++) put(m, i, load(sums + m * kStripRows + i * kLanes<int32_t>));
  }
};

#if defined(__AVX512VNNI__)
// What a task of a packed product is: a strip of right rows and a part of the left blocks.
struct Part {
  int64_t first, begin, end;
  int count;

  Part(const Left& left, const Right& right, int64_t blocks, int64_t task)
      : first(task % right.strips() * kStripRows),
        begin(task / right.strips() * blocks),
        end(std::min(begin + blocks, left.blocks())),
        count(right.count(task % right.strips())) {}
  template <class Output>
  auto strip(const Output& output, const Left& left, const Right& right) const {
    return output.strip(right, first, count, begin * kBlockRows, std::min(end * kBlockRows, left.rows()));
  }
};

// The sums of two left blocks, [2 blocks][2][16 right rows][16], on their way to the output, 16 by 16 at a time.
struct PairSums {
  int32_t* sums = nullptr;
  int64_t m = 0, rows = 0;  // of the left blocks
  int at = 0, count = 0;

  template <class Put>
  void put_one(const Put& put) {
    int64_t first = at / 2 * kBlockRows;
    transpose_sums(sums + at * 256, int(std::min<int64_t>(kBlockRows, rows - first)),
                   [&](int r, Vector<int32_t> v) { put(m + first + r, at % 2, v); });
    at++;
  }
  template <class Put>
  void put_all(const Put& put) {
    while (at < count) put_one(put);
  }
};
#endif

#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
inline constexpr int64_t kLeftInCache = 512 << 10;

template <class Output>
struct PackedWorker {
  const Left& left;
  const Right& right;
  const Output& output;
  int64_t blocks;
  int32_t* sums;
  Fetch fetch;

  PackedWorker(const Left& left, const Right& right, const Output& output, int64_t blocks)
      : left(left), right(right), output(output), blocks(blocks) {
    static thread_local Scratch::Block block;
    Scratch::plan(block, [&](Scratch& scratch) { sums = scratch.take<int32_t>(2 * kStripRows * kBlockRows); });
    std::fill_n(sums, 2 * kStripRows * kBlockRows, 0);
  }

  template <int Features, int Blocks>
  void features(int64_t b, const Part& part, int& f, const int32_t* excess) {
    for (; f + Features <= part.count; f += Features)
      vnni_tile<Features, Blocks>(left.block(b), left.block_bytes(), right.at(part.first + f), right.row, right.columns,
                                  excess + f, sums + f * kBlockRows, kStripRows * kBlockRows, [&] { fetch.some(); });
  }

  void operator()(int64_t task, int64_t next) {
    Part part(left, right, blocks, task);
    int32_t excess[kStripRows];
    int f = 0;
    for (; f + 8 <= part.count; f += 8) row_excess<8>(right.at(part.first + f), right.row, right.columns, excess + f);
    for (; f < part.count; f++) row_excess<1>(right.at(part.first + f), right.row, right.columns, excess + f);
    auto put = part.strip(output, left, right);
    bool more = next < divide_up(left.blocks(), blocks) * right.strips();
    int64_t pairs = (part.end - part.begin) / 2, calls = pairs * (kStripRows / 8) + (part.end - part.begin) % 2 * 2;
    fetch.start(right, more ? next % right.strips() : right.strips(), calls * (right.columns / kPackStep));
    for (int64_t b = part.begin; b < part.end; b += 2) {
      f = 0;
      if (b + 2 <= part.end) {
        features<8, 2>(b, part, f, excess);
        features<1, 2>(b, part, f, excess);
      } else {
        features<16, 1>(b, part, f, excess);
        features<1, 1>(b, part, f, excess);
      }
      PairSums pair{sums, b * kBlockRows, left.rows() - b * kBlockRows, 0,
                    int(std::min<int64_t>(4, 2 * (part.end - b)))};
      pair.put_all(put);
    }
  }
};
#elif defined(__AMX_INT8__)
inline constexpr int64_t kLeftInCache = 1 << 20;

// Tiles are loaded from the right rows where they lie: the hardware prefetches rows that are read side by side. While
// the tile unit multiplies one pair of blocks, the sums of the pair before become outputs.
template <class Output>
struct PackedWorker {
  const Left& left;
  const Right& right;
  const Output& output;
  int64_t blocks, steps;
  MatmulSession session;
  int8_t* copy;  // of a strip at the right factor's edge, zero-padded
  int32_t* sums[2];

  PackedWorker(const Left& left, const Right& right, const Output& output, int64_t blocks)
      : left(left), right(right), output(output), blocks(blocks), steps(left.padded() / kPackStep) {
    static thread_local Scratch::Block block;
    Scratch::plan(block, [&](Scratch& scratch) {
      copy = scratch.take<int8_t>(kStripRows * left.padded());
      for (auto& each : sums) each = scratch.take<int32_t>(2 * kStripRows * kBlockRows);
    });
  }

  RightTiles tiles(const Part& part) const {
    int64_t end = (part.first + kStripRows - 1) * right.row + left.padded();
    if (part.count == kStripRows && end <= (right.rows - 1) * right.row + right.columns)
      return {right.at(part.first), right.row, kPackStep, 16 * right.row};
    for (int64_t r = 0; r < kStripRows; r++) {
      int8_t* to = copy + r * left.padded();
      int64_t present = r < part.count ? right.columns : 0;
      std::copy_n(right.at(part.first + std::min<int64_t>(r, part.count - 1)), present, to);
      std::fill(to + present, to + left.padded(), int8_t(0));
    }
    return {copy, left.padded(), kPackStep, 16 * left.padded()};
  }

  // The first lines of the rows of the next strip: the hardware fetches the rest of a row when it sees it begin. With
  // more arithmetic to hide it behind, lines from all over the strip.
  TilePrefetch prefetch(int64_t pairs, int64_t next) const {
    int64_t first = next % right.strips() * kStripRows, lines = pairs * steps * TilePrefetch::kLines;
    if (lines == 0 || first + kStripRows > right.rows) return {nullptr, nullptr, 0};
    const int8_t* begin = right.at(first);
    int64_t bytes = kStripRows * right.row, distance = std::max<int64_t>(1, bytes / lines / 64) * 64;
    return {begin, begin + bytes, pairs == 1 ? right.row : distance};
  }

  void operator()(int64_t task, int64_t next) {
    Part part(left, right, blocks, task);
    RightTiles from = tiles(part);
    TilePrefetch ahead = prefetch(divide_up(part.end - part.begin, 2), next);
    auto put = part.strip(output, left, right);
    PairSums before;
    auto meanwhile = [&]() __attribute__((always_inline)) {
      if (before.at < before.count) before.put_one(put);
    };
    for (int64_t b = part.begin; b < part.end; b += 2) {
      int32_t* to = sums[b / 2 % 2];
      if (b + 2 <= part.end) {
        amx_tile<2>(from, left.block(b), left.block_bytes(), steps, to, ahead, meanwhile);
      } else {
        amx_tile<1>(from, left.block(b), 0, steps, to, ahead, meanwhile);
      }
      before.put_all(put);
      before = {to, b * kBlockRows, left.rows() - b * kBlockRows, 0, int(std::min<int64_t>(4, 2 * (part.end - b)))};
    }
    before.put_all(put);
  }
};
#endif

template <class Output>
void product(const Left& left, const Right& right, const Output& output) {
  if (left.rows() == 0 || right.rows == 0) return;
#if defined(__AVX512VNNI__)
  if (left.packed()) {
    int64_t fit = std::max<int64_t>(2, kLeftInCache / std::max<int64_t>(1, left.block_bytes()) / 2 * 2);
    int64_t parts = divide_up(left.blocks(), fit), blocks = divide_up(divide_up(left.blocks(), parts), 2) * 2;
    return parallel_workers(divide_up(left.blocks(), blocks) * right.strips(),
                            blocks * kBlockRows * kStripRows * right.columns,
                            [&] { return PackedWorker<Output>(left, right, output, blocks); });
  }
#endif
  parallel_workers(right.strips(), left.rows() * kStripRows * right.columns,
                   [&] { return DotWorker<Output>(left, right, output); });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
