// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels of sparse attention share. A head's keys are walked in ranges whose keys and values fit into the
// second-level cache, and each range meets all rows of a chunk before the next. A row's result in a range depends on
// its own columns there alone, and ranges are merged in order: so neither how rows are cut into chunks nor which thread
// has which range changes a bit.
#pragma once
#include <cmath>
#include <memory>
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

// Rows lie far apart in tensors, so the processor does not fetch them ahead by itself.
template <class Stored>
inline void prefetch_row(const Tensor& tensor, int64_t b, int64_t i, int64_t h) {
  if (i >= tensor.size[1]) return;
  const Stored* row = tensor.at<const Stored>(b, i, h);
  for (int64_t c = 0; c < tensor.size[3]; c += 64 / int64_t(sizeof(Stored))) prefetch(row + c);
}
inline constexpr int64_t kAhead = 8;  // rows

// Rows that meet a range together: many, but enough chunks for all threads.
inline int64_t rows_of_chunk(const SeaAttentionParams& p) {
  int64_t rows = p.q.size[0] * p.q.size[1] * p.q.size[2];
  return std::clamp(rows / (4 * omp_get_max_threads()), int64_t(16), int64_t(2048));
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

// All lanes combined, in a tree.
template <class Real, int step = kLanes<Real> / 2, class Combine>
inline Real across(Vector<Real> v, const Combine& combine) {
  if constexpr (step == 0) {
    return v[0];
  } else {
    auto swapped = [&]<size_t... lane>(std::index_sequence<lane...>) {
      return __builtin_shufflevector(v, v, (lane ^ size_t(step))...);
    };
    return across<Real, step / 2>(combine(v, swapped(std::make_index_sequence<kLanes<Real>>())), combine);
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
  static constexpr int64_t kRows = 256;  // that go through a range together

  // Of those in [from, to).
  void start(const SeaAttentionParams& p, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t from, int64_t to) {
    runs.clear(), next.resize(size_t(rows)), last.resize(size_t(rows));
    int64_t keys = p.k.size[1];
    for (int64_t r = 0; r < rows; r++) {
      next[r] = runs.size();
      CellMap map{uint64_t(width_of(p.widths, b, first + r, keys)), uint64_t(p.num_cells)};
      for_each_run(p.cells.at<const int32_t>(b, first + r), h * p.num_cells, map, p.max_columns, from, to,
                   [&](const Run& run) { runs.push_back(run); });
      last[r] = runs.size();
    }
  }

  // Calls row(r, index, count) for the rows that keep any of columns [from, to), which are counted from `from`.
  template <class Row>
  void walk(int64_t from, int64_t to, const Row& row) {
    for (int64_t first = 0; first < int64_t(next.size()); first += kRows) {
      int64_t rows = std::min(kRows, int64_t(next.size()) - first), count = 0;
      for (int64_t r = 0; r < rows; r++) {
        offsets[r] = count;
        size_t& at = next[first + r];
        for (size_t i = at; i < last[first + r] && runs[i].first < to; i++) {
          if (count + runs[i].count > capacity) grow(count + runs[i].count);
          int32_t* put = columns.get() + count;
          for_each_column(runs[i], from, to, [&](int64_t column) { *put++ = int32_t(column - from); });
          count = put - columns.get();
          if (int64_t(runs[i].first) + runs[i].span <= to) at = i + 1;
        }
      }
      offsets[rows] = count;
      for (int64_t r = 0; r < rows; r++)
        if (offsets[r] < offsets[r + 1]) row(first + r, columns.get() + offsets[r], offsets[r + 1] - offsets[r]);
    }
  }

 private:
  void grow(int64_t least) {
    auto larger = std::make_unique<int32_t[]>(size_t(2 * least));
    std::copy(columns.get(), columns.get() + capacity, larger.get());
    columns = std::move(larger), capacity = 2 * least;
  }

  std::vector<Run> runs;
  std::vector<size_t> next, last;  // of each row's runs: the first that is not behind, and the end
  int64_t offsets[kRows + 1];
  std::unique_ptr<int32_t[]> columns;
  int64_t capacity = 0;
};

// All keys and values, [B, H][Tk][padded size]: a head's rows side by side, as they are not in the tensors. There they
// lie on a page each, and every range would be waiting for translations of addresses, time and again.
template <class Stored>
class PackedKeys {
  using Real = RealOf<Stored>;

 public:
  explicit PackedKeys(const SeaAttentionParams& p) {
    static thread_local Scratch::Block kept;
    int64_t batch = p.k.size[0], tokens = p.k.size[1], heads = p.k.size[2], rows = batch * tokens * heads;
    key_size = padded_size(p.k.size[3]), value_size = padded_size(p.v.size[3]), head_rows = tokens;
    constexpr int64_t kKept = 1 << 26;  // bytes that may stay until the next call
    bool few = rows * (key_size + value_size) * int64_t(sizeof(Real)) <= kKept;
    Scratch::plan(few ? kept : own, [&](Scratch& scratch) {
      keys = scratch.take<Real>(rows * key_size);
      values = scratch.take<Real>(rows * value_size);
    });
    constexpr int64_t kTokens = 64;
    int64_t blocks = (tokens + kTokens - 1) / kTokens;
    parallel_for(batch * blocks, kTokens * heads * (key_size + value_size), [&](int64_t item) {
      int64_t b = item / blocks, first = item % blocks * kTokens;
      for (int64_t j = first; j < std::min(tokens, first + kTokens); j++)
        for (int64_t h = 0; h < heads; h++) {
          int64_t row = (b * heads + h) * tokens + j;
          load_padded(p.k.at<const Stored>(b, j, h), keys + row * key_size, p.k.size[3]);
          load_padded(p.v.at<const Stored>(b, j, h), values + row * value_size, p.v.size[3]);
        }
    });
  }

  static void load_padded(const Stored* from, Real* to, int64_t size) {
    convert(from, to, size);
    std::fill(to + size, to + padded_size(size), Real(0));
  }

  int64_t key_size, value_size, head_rows;
  Real *keys, *values;

 private:
  Scratch::Block own;
};

// Keys and values of a range in one head: packed, or the columns of a row gathered from the tensors.
template <class Stored>
class KeyRange {
  using Real = RealOf<Stored>;

 public:
  int64_t key_size, value_size;
  const Real *keys, *values;

  KeyRange(const SeaAttentionParams& p, int64_t b, int64_t h, const PackedKeys<Stored>* packed)
      : key_size(padded_size(p.q.size[3])),
        value_size(padded_size(p.v.size[3])),
        p(p),
        b(b),
        h(h),
        row((b * p.k.size[2] + h) * p.k.size[1]),
        packed(packed) {}

  void take(Scratch& scratch, int64_t range) {
    if (packed) return;
    keys = gathered_keys = scratch.take<Real>(range * key_size);
    values = gathered_values = scratch.take<Real>(range * value_size);
    iota = scratch.take<int32_t>(range);
  }

  void enter(int64_t from) {
    start = from;
    if (!packed) return;
    keys = packed->keys + (row + from) * key_size;
    values = packed->values + (row + from) * value_size;
  }

  // Where the listed columns are.
  const int32_t* find(const int32_t* index, int64_t count) const {
    if (packed) return index;
    for (int64_t j = 0; j < count; j++) {
      int64_t column = start + index[j];
      PackedKeys<Stored>::load_padded(p.k.at<const Stored>(b, column, h), gathered_keys + j * key_size, p.k.size[3]);
      PackedKeys<Stored>::load_padded(p.v.at<const Stored>(b, column, h), gathered_values + j * value_size,
                                      p.v.size[3]);
      iota[j] = int32_t(j);
    }
    return iota;
  }

 private:
  const SeaAttentionParams& p;
  int64_t b, h, row, start;
  const PackedKeys<Stored>* packed;
  Real *gathered_keys, *gathered_values;
  int32_t* iota;
};

// A row's query in powers of two, padded with zeros.
template <class Stored>
void load_query(const SeaAttentionParams& p, int64_t b, int64_t i, int64_t h, RealOf<Stored>* to) {
  using Real = RealOf<Stored>;
  int64_t size = p.q.size[3];
  prefetch_row<Stored>(p.q, b, i + kAhead, h);
  PackedKeys<Stored>::load_padded(p.q.at<const Stored>(b, i, h), to, size);
  Real factor = Real(p.scale * kLog2E);
  for (int64_t c = 0; c < size; c++) to[c] *= factor;
}

// ---- softmax ----

inline float power_of_two(float x) { return exp2_vector(broadcast(x))[0]; }
inline double power_of_two(double x) { return std::exp2(x); }

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
    maximum = across<Real>(highest, [](auto a, auto b) { return TORCH_KERNELS_ISA::maximum(a, b); });
    Real base = maximum == -infinity ? Real(0) : maximum;
    for (int64_t j = 0; j < filled; j += lanes) {
      Vector<Real> weight = exp2_vector(load(scores + j) - base);
      store(scores + j, weight);
      total += weight;
    }
    sum = across<Real>(total, [](auto a, auto b) { return a + b; });
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
    Real before = power_of_two(maximum[r] - base), after = power_of_two(added_maximum - base);
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
