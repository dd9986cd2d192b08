// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels of sparse attention share. A head's keys are walked in ranges whose keys and values fit into the
// second-level cache, and each range meets all rows of a chunk before the next. A row's result in a range depends on
// its own columns there alone, and ranges are merged in order: so neither how rows are cut into chunks nor which thread
// has which range changes a bit.
#pragma once
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/dtypes.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"
#include "sea/params.h"
#include "sea/runs_cpu.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

inline constexpr double kLog2E = 1.4426950408889634;

constexpr int64_t padded_size(int64_t size) { return (size + 15) / 16 * 16; }

// Columns of a range.
template <class Real>
int64_t range_of(const SeaAttentionParams& p) {
  constexpr int64_t kBytes = 1 << 19;
  int64_t row = (padded_size(p.q.size[3]) + padded_size(p.v.size[3])) * int64_t(sizeof(Real));
  return std::clamp(int64_t(std::bit_floor(uint64_t(kBytes / row))), int64_t(128), int64_t(4096));
}

// ---- products with scattered rows ----

template <int step, class V, size_t... lane>
inline V fold(V a, V b, std::index_sequence<lane...>) {
  constexpr int lanes = sizeof...(lane);
  return __builtin_shufflevector(a, b, (lane & step ? lanes + lane : lane)...) +
         __builtin_shufflevector(a, b, ((lane & step ? lanes : 0) + (lane ^ step))...);
}

// Lane i is the sum of rows[i]. Every lane is summed in the same order.
template <class Real, int step = 1>
inline Vector<Real> sums_of(const Vector<Real>* rows) {
  constexpr int lanes = kLanes<Real>;
  if constexpr (step == lanes) {
    return rows[0];
  } else {
    Vector<Real> folded[lanes / step / 2];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / step / 2; i++)
      folded[i] = fold<step>(rows[2 * i], rows[2 * i + 1], std::make_index_sequence<lanes>());
    return sums_of<Real, 2 * step>(folded);
  }
}

// result[j] = x · rows[index[j]] for j < count, rounded up to a vector. Sizes are multiples of 16.
template <class Real>
void multiply_rows(const Real* x, int64_t size, const Real* rows, const int32_t* index, int64_t count, Real* result) {
  constexpr int lanes = kLanes<Real>;
  for (int64_t j = 0; j < count; j += lanes) {
    Vector<Real> sums[lanes];
    auto part = [&]<int Vectors, bool first>(int64_t c) {
      Vector<Real> of_x[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; v++) of_x[v] = load(x + c + v * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++) {
        const Real* row = rows + index[std::min(j + i, count - 1)] * size + c;
        Vector<Real> sum = first ? Vector<Real>{} : sums[i];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) sum += of_x[v] * load(row + v * lanes);
        sums[i] = sum;
      }
    };
    int64_t c = 0;
    if (size >= 4 * lanes) {
      part.template operator()<4, true>(0);
      for (c = 4 * lanes; c + 4 * lanes <= size; c += 4 * lanes) part.template operator()<4, false>(c);
    } else {
      part.template operator()<1, true>(0);
      c = lanes;
    }
    for (; c < size; c += lanes) part.template operator()<1, false>(c);
    store(result + j, sums_of<Real>(sums));
  }
}

// out = sum over j of weights[j] rows[index[j]].
template <class Real>
void sum_rows(const Real* weights, const Real* rows, int64_t size, const int32_t* index, int64_t count, Real* out) {
  constexpr int lanes = kLanes<Real>;
  auto part = [&]<int Vectors>(int64_t c) {
    Vector<Real> even[Vectors], odd[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++) even[v] = odd[v] = Vector<Real>{};
    auto add = [&](Vector<Real>* sums, int64_t j) __attribute__((always_inline)) {
      const Real* row = rows + index[j] * size + c;
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; v++) sums[v] += weights[j] * load(row + v * lanes);
    };
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) add(even, j), add(odd, j + 1);
    if (j < count) add(even, j);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++) store(out + c + v * lanes, even[v] + odd[v]);
  };
  int64_t c = 0;
  for (; c + 4 * lanes <= size; c += 4 * lanes) part.template operator()<4>(c);
  for (; c < size; c += lanes) part.template operator()<1>(c);
}

// rows[index[j]] += weights[j] x.
template <class Real>
void add_to_rows(const Real* weights, const Real* x, int64_t size, Real* rows, const int32_t* index, int64_t count) {
  for (int64_t j = 0; j < count; j++) {
    Real* row = rows + index[j] * size;
    for (int64_t c = 0; c < size; c += kLanes<Real>)
      store(row + c, load(row + c) + broadcast(weights[j]) * load(x + c));
  }
}

// ---- columns, keys and values ----

// The columns that rows [first, first + rows) keep in a head, range by range in ascending order.
class ChunkColumns {
 public:
  // Of those in [from, to).
  void start(const SeaAttentionParams& p, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t from, int64_t to) {
    runs.clear(), next.clear(), last.clear();
    offsets.assign(size_t(rows) + 1, 0);
    int64_t keys = p.k.size[1];
    for (int64_t i = first; i < first + rows; i++) {
      next.push_back(runs.size());
      CellMap map{uint64_t(width_of(p.widths, b, i, keys)), uint64_t(p.num_cells)};
      for_each_run(p.cells.at<const int32_t>(b, i), h * p.num_cells, map, p.max_columns, from, to,
                   [&](const Run& run) { runs.push_back(run); });
      last.push_back(runs.size());
    }
  }

  // Makes index() and count() those of columns [from, to), counted from `from`; returns how many there are in all.
  int64_t enter(int64_t from, int64_t to) {
    columns.clear();
    for (size_t r = 0; r < next.size(); r++) {
      for (size_t at = next[r]; at < last[r] && runs[at].first < to; at++) {
        for_each_column(runs[at], from, to, [&](int64_t column) { columns.push_back(int32_t(column - from)); });
        if (int64_t(runs[at].first) + runs[at].span <= to) next[r] = at + 1;
      }
      offsets[r + 1] = columns.size();
    }
    return int64_t(columns.size());
  }

  const int32_t* index(int64_t row) const { return columns.data() + offsets[row]; }
  int64_t count(int64_t row) const { return int64_t(offsets[row + 1] - offsets[row]); }

 private:
  std::vector<Run> runs;
  std::vector<size_t> next, last;  // of each row's runs: the first that is not behind, and the end
  std::vector<int32_t> columns;
  std::vector<size_t> offsets;
};

// Keys and values of a range in one head, [range][padded size], side by side as they are not in the tensors.
template <class Stored>
class KeyRange {
  using Real = RealOf<Stored>;

 public:
  int64_t key_size, value_size;
  Real *keys, *values;

  KeyRange(const SeaAttentionParams& p, int64_t b, int64_t h)
      : key_size(padded_size(p.q.size[3])), value_size(padded_size(p.v.size[3])), p(p), b(b), h(h) {}

  void take(Scratch& scratch, int64_t range) {
    keys = scratch.take<Real>(range * key_size);
    values = scratch.take<Real>(range * value_size);
    iota = scratch.take<int32_t>(range);
  }
  void prepare(int64_t range) {
    for (int64_t j = 0; j < range; j++) iota[j] = int32_t(j);
  }

  void load(int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j++) copy(j, j - from);
  }
  // The listed columns alone; the index of what was copied.
  const int32_t* gather(int64_t from, const int32_t* index, int64_t count) {
    for (int64_t j = 0; j < count; j++) copy(from + index[j], j);
    return iota;
  }

 private:
  void copy(int64_t column, int64_t to) {
    Real *key = keys + to * key_size, *value = values + to * value_size;
    convert(p.k.at<const Stored>(b, column, h), key, p.k.size[3]);
    std::fill(key + p.k.size[3], key + key_size, Real(0));
    convert(p.v.at<const Stored>(b, column, h), value, p.v.size[3]);
    std::fill(value + p.v.size[3], value + value_size, Real(0));
  }

  const SeaAttentionParams& p;
  int64_t b, h;
  int32_t* iota;
};

// A row's query in powers of two, padded with zeros.
template <class Stored>
void load_query(const SeaAttentionParams& p, int64_t b, int64_t i, int64_t h, RealOf<Stored>* to) {
  using Real = RealOf<Stored>;
  int64_t size = p.q.size[3];
  convert(p.q.at<const Stored>(b, i, h), to, size);
  std::fill(to + size, to + padded_size(size), Real(0));
  Real factor = Real(p.scale * kLog2E);
  for (int64_t c = 0; c < size; c++) to[c] *= factor;
}

// ---- softmax ----

// Scores become weights 2^(score - maximum), zero from `count` up to a vector.
template <class Real>
struct Softmax {
  Real maximum, sum;

  Softmax(Real* scores, int64_t count) {
    constexpr Real infinity = std::numeric_limits<Real>::infinity();
    constexpr int lanes = kLanes<Real>;
    int64_t filled = (count + lanes - 1) / lanes * lanes;
    std::fill(scores + count, scores + filled, -infinity);
    Vector<Real> highest = broadcast(-infinity), total{};
    for (int64_t j = 0; j < filled; j += lanes) highest = TORCH_KERNELS_ISA::maximum(highest, load(scores + j));
    maximum = highest[0];
    for (int i = 1; i < lanes; i++) maximum = maximum > highest[i] ? maximum : highest[i];
    Real base = maximum == -infinity ? Real(0) : maximum;
    for (int64_t j = 0; j < filled; j += lanes) {
      Vector<Real> weight = exp2_vector(load(scores + j) - base);
      store(scores + j, weight);
      total += weight;
    }
    sum = 0;
    for (int i = 0; i < lanes; i++) sum += total[i];
  }
};

// Weighted sums of several rows, relative to the highest score so far.
template <class Real>
struct RowSums {
  static constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  int64_t width;
  Real *values, *maximum, *sum;  // [rows][width], [rows] twice

  void take(Scratch& scratch, int64_t rows, int64_t row_width) {
    width = row_width;
    values = scratch.take<Real>(rows * width);
    maximum = scratch.take<Real>(rows);
    sum = scratch.take<Real>(rows);
  }
  void clear(int64_t rows) {
    std::fill_n(values, rows * width, Real(0));
    std::fill_n(maximum, rows, -kInfinity);
    std::fill_n(sum, rows, Real(0));
  }
  Real* row(int64_t r) const { return values + r * width; }

  void merge(int64_t r, const Real* added, Real added_maximum, Real added_sum) {
    Real highest = added_maximum > maximum[r] ? added_maximum : maximum[r];
    Real base = highest == -kInfinity ? Real(0) : highest;
    Real before = std::exp2(maximum[r] - base), after = std::exp2(added_maximum - base);
    for (int64_t c = 0; c < width; c += kLanes<Real>)
      store(row(r) + c, load(row(r) + c) * before + load(added + c) * after);
    maximum[r] = highest;
    sum[r] = sum[r] * before + added_sum * after;
  }

  // The factor that makes weights probabilities.
  Real normaliser(int64_t r) const { return sum[r] == 0 ? Real(0) : 1 / sum[r]; }
  // Of the exponentials' sum.
  double log2(int64_t r) const { return double(maximum[r]) + std::log2(double(sum[r])); }
};

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
