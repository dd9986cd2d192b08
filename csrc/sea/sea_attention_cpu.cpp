// SPDX-License-Identifier: Apache-2.0
// Sparse attention, forward.
#include "sea/gather_cpu.h"
#include "sea/kernels.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

// A few rows against a long cache: then ranges are shared out, too, and their sums merged when all are there.
constexpr int64_t kFewRows = 16;
constexpr int64_t kMostRows = 512;

// The sums of every row and range, [B * H * Tq][ranges]; a maximum of -inf with a sum of 0 where there is nothing.
template <class Real>
struct Parts {
  RowSums<Real> sums;
  int64_t ranges;
};

template <class Stored>
class Forward {
  using Real = RealOf<Stored>;

 public:
  Forward(const SeaAttentionParams& p, int64_t b, int64_t h, int64_t first, int64_t rows)
      : p(p), b(b), h(h), first(first), rows(rows), range(range_of<Real>(p)), kv(p, b, h) {
    static thread_local Scratch::Block memory;
    Scratch::plan(memory, [&](Scratch& scratch) {
      kv.take(scratch, range);
      sums.take(scratch, rows, kv.value_size);
      query = scratch.take<Real>(kv.key_size);
      scores = scratch.take<Real>(range + kLanes<Real>);
      part = scratch.take<Real>(kv.value_size);
    });
    kv.prepare(range);
  }

  void run() {
    sums.clear(rows);
    walk(0, p.k.size[1],
         [&](int64_t r, int64_t, const Softmax<Real>& softmax) { sums.merge(r, part, softmax.maximum, softmax.sum); });
    for (int64_t r = 0; r < rows; r++) finish(p, b, h, first + r, sums, r, part);
  }

  // Ranges [from, to) alone.
  void run(int64_t from, int64_t to, Parts<Real>& parts) {
    int64_t row = (b * p.q.size[2] + h) * p.q.size[1] + first;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t at = from; at < to; at++) {
        parts.sums.maximum[(row + r) * parts.ranges + at] = -RowSums<Real>::kInfinity;
        parts.sums.sum[(row + r) * parts.ranges + at] = 0;
      }
    walk(from * range, std::min(to * range, p.k.size[1]), [&](int64_t r, int64_t start, const Softmax<Real>& softmax) {
      int64_t slot = (row + r) * parts.ranges + start / range;
      std::copy(part, part + kv.value_size, parts.sums.row(slot));
      parts.sums.maximum[slot] = softmax.maximum;
      parts.sums.sum[slot] = softmax.sum;
    });
  }

  static void finish(const SeaAttentionParams& p, int64_t b, int64_t h, int64_t i, const RowSums<Real>& sums, int64_t r,
                     Real* scratch) {
    *p.lse.at<float>(b, h, i) = float(sums.log2(r) / kLog2E);
    double gain = p.row_gain ? number_at(p.row_gain, b, h, i) : 1;
    Real* row = sums.row(r);
    Real factor = sums.normaliser(r) * Real(gain);
    int64_t size = p.v.size[3];
    for (int64_t c = 0; c < size; c++) row[c] *= factor;
    if (p.mix) {
      Real mix = Real(number_at(p.mix, b, h, i)), rest = 1 - mix;
      convert(p.pooled.at<const Stored>(b, p.pooled.size[1] == 1 ? 0 : i, h), scratch, size);
      for (int64_t c = 0; c < size; c++) row[c] = mix * row[c] + rest * scratch[c];
    }
    convert(row, p.out.at<Stored>(b, i, h), size);
  }

 private:
  // Leaves each row's sums over each range in `part` and calls done(row, the range's start, softmax).
  template <class Done>
  void walk(int64_t from, int64_t to, const Done& done) {
    static thread_local ChunkColumns columns;
    columns.start(p, b, h, first, rows, from, to);
    for (int64_t start = from; start < to; start += range) {
      int64_t end = std::min(start + range, to), total = columns.enter(start, end);
      if (total == 0) continue;
      bool shared = total > (end - start) / 2;
      if (shared) kv.load(start, end);
      for (int64_t r = 0; r < rows; r++) {
        int64_t count = columns.count(r);
        if (count == 0) continue;
        const int32_t* index = columns.index(r);
        if (!shared) index = kv.gather(start, index, count);
        load_query<Stored>(p, b, first + r, h, query);
        multiply_rows(query, kv.key_size, kv.keys, index, count, scores);
        Softmax<Real> softmax(scores, count);
        sum_rows(scores, kv.values, kv.value_size, index, count, part);
        done(r, start, softmax);
      }
    }
  }

  const SeaAttentionParams& p;
  int64_t b, h, first, rows, range;
  KeyRange<Stored> kv;
  RowSums<Real> sums;
  Real *query, *scores, *part;
};

// Items of a few ranges each, then a merge of every row's.
template <class Stored>
void attend_in_parts(const SeaAttentionParams& p, int64_t groups, int64_t cost) {
  using Real = RealOf<Stored>;
  int64_t batch = p.q.size[0], rows = p.q.size[1], heads = p.q.size[2], range = range_of<Real>(p);
  Parts<Real> parts{{}, (p.k.size[1] + range - 1) / range};
  static thread_local Scratch::Block memory;
  int64_t size = padded_size(p.v.size[3]);
  Scratch::plan(memory, [&](Scratch& scratch) { parts.sums.take(scratch, batch * heads * rows * parts.ranges, size); });
  parallel_for(batch * heads * groups, cost, [&](int64_t item) {
    int64_t b = item / groups / heads, h = item / groups % heads, group = item % groups;
    int64_t from = parts.ranges * group / groups, to = parts.ranges * (group + 1) / groups;
    Forward<Stored>(p, b, h, 0, rows).run(from, to, parts);
  });
  parallel_for(batch * heads, rows * (parts.ranges + size), [&](int64_t item) {
    static thread_local Scratch::Block own;
    RowSums<Real> sums;
    Real* part;
    Scratch::plan(own, [&](Scratch& scratch) {
      sums.take(scratch, 1, size);
      part = scratch.take<Real>(size);
    });
    for (int64_t i = 0; i < rows; i++) {
      sums.clear(1);
      for (int64_t at = 0; at < parts.ranges; at++) {
        int64_t slot = (item * rows + i) * parts.ranges + at;
        Real maximum = parts.sums.maximum[slot], sum = parts.sums.sum[slot];
        if (maximum != -RowSums<Real>::kInfinity || sum != 0) sums.merge(0, parts.sums.row(slot), maximum, sum);
      }
      Forward<Stored>::finish(p, item / heads, item % heads, i, sums, 0, part);
    }
  });
}

}  // namespace

void sea_attention(const SeaAttentionParams& p) {
  int64_t batch = p.q.size[0], rows = p.q.size[1], heads = p.q.size[2], keys = p.k.size[1];
  if (batch * rows * heads == 0) return;
  int64_t threads = omp_get_max_threads();
  for_each_dtype(p.q.dtype, [&]<class Stored>(Stored) {
    int64_t ranges = keys / range_of<RealOf<Stored>>(p);
    int64_t groups = std::min(ranges, 2 * threads / (batch * heads));
    if (rows <= kFewRows && groups > 1 && threads > 1)
      return attend_in_parts<Stored>(p, groups, rows * (keys / groups / 8 + 1024));
    int64_t of_chunk = std::clamp(rows * batch * heads / (4 * threads), kFewRows, kMostRows);
    int64_t chunks = (rows + of_chunk - 1) / of_chunk;
    parallel_for(batch * heads * chunks, std::min(rows, of_chunk) * 4096, [&](int64_t item) {
      int64_t chunk = chunks - 1 - item % chunks;  // the last rows of causal attention take longest
      int64_t first = chunk * of_chunk;
      Forward<Stored>(p, item / chunks / heads, item / chunks % heads, first, std::min(of_chunk, rows - first)).run();
    });
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
