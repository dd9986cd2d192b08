// SPDX-License-Identifier: Apache-2.0
// Sparse attention, backward: first by rows, the gradients of queries and gates; then by ranges of keys, those of keys
// and values. Each element is written by one thread, which adds up rows, or columns, in order.
//
// With g_j = grad_out · v_j, a = sum_j p_j g_j and f = gain * mix, a row has grad_q = scale f (sum_j p_j g_j k_j -
// a sum_j p_j k_j). Sums take g_j less its mean over the row's first range, so that what cancels is small.
#include "sea/gather_cpu.h"
#include "sea/kernels.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

constexpr int64_t kRows = 256;

// What the second part needs of every row, [B, H, Tq]: log2 of the sum of exponentials, and a.
template <class Real>
struct RowFacts {
  Real *log2_sum, *along;
};

double factor_of(const SeaAttentionParams& p, int64_t b, int64_t h, int64_t i) {
  return (p.row_gain ? number_at(p.row_gain, b, h, i) : 1) * (p.mix ? number_at(p.mix, b, h, i) : 1);
}

template <class Stored>
void load_grad(const SeaAttentionBackwardParams& p, int64_t b, int64_t i, int64_t h, RealOf<Stored>* to) {
  int64_t size = p.grad_out.size[3];
  convert(p.grad_out.at<const Stored>(b, i, h), to, size);
  std::fill(to + size, to + padded_size(size), RealOf<Stored>(0));
}

template <class Stored>
class QueryGradients {
  using Real = RealOf<Stored>;

 public:
  QueryGradients(const SeaAttentionBackwardParams& params, int64_t b, int64_t h, int64_t first, int64_t rows)
      : params(params), p(params.forward), b(b), h(h), first(first), rows(rows), range(range_of<Real>(p)), kv(p, b, h) {
    static thread_local Scratch::Block memory;
    Scratch::plan(memory, [&](Scratch& scratch) {
      kv.take(scratch, range);
      // Of weights times g times keys, of weights times keys, of weights times g.
      sums.take(scratch, rows, 2 * kv.key_size + 16);
      part = scratch.take<Real>(sums.width);
      origin = scratch.take<Real>(rows);
      query = scratch.take<Real>(kv.key_size);
      grad = scratch.take<Real>(kv.value_size);
      weights = scratch.take<Real>(range + kLanes<Real>);
      along = scratch.take<Real>(range + kLanes<Real>);
    });
    kv.prepare(range);
  }

  void run(const RowFacts<Real>& facts) {
    static thread_local ChunkColumns columns;
    int64_t keys = p.k.size[1];
    columns.start(p, b, h, first, rows, 0, keys);
    sums.clear(rows);
    std::fill_n(part, sums.width, Real(0));
    for (int64_t start = 0; start < keys; start += range) {
      int64_t end = std::min(start + range, keys), total = columns.enter(start, end);
      if (total == 0) continue;
      bool shared = total > (end - start) / 2;
      if (shared) kv.load(start, end);
      for (int64_t r = 0; r < rows; r++) {
        int64_t count = columns.count(r);
        if (count == 0) continue;
        const int32_t* index = columns.index(r);
        if (!shared) index = kv.gather(start, index, count);
        add(r, index, count);
      }
    }
    for (int64_t r = 0; r < rows; r++) finish(r, facts);
  }

 private:
  void add(int64_t r, const int32_t* index, int64_t count) {
    load_query<Stored>(p, b, first + r, h, query);
    load_grad<Stored>(params, b, first + r, h, grad);
    multiply_rows(query, kv.key_size, kv.keys, index, count, weights);
    multiply_rows(grad, kv.value_size, kv.values, index, count, along);
    bool first_range = sums.maximum[r] == -RowSums<Real>::kInfinity;
    Softmax<Real> softmax(weights, count);
    Real sum = 0;
    if (first_range) {
      for (int64_t j = 0; j < count; j++) sum += weights[j] * along[j];
      origin[r] = sum / softmax.sum;
      sum = 0;
    }
    for (int64_t j = 0; j < count; j++) {
      along[j] = weights[j] * (along[j] - origin[r]);
      sum += along[j];
    }
    sum_rows(along, kv.keys, kv.key_size, index, count, part);
    sum_rows(weights, kv.keys, kv.key_size, index, count, part + kv.key_size);
    part[2 * kv.key_size] = sum;
    sums.merge(r, part, softmax.maximum, softmax.sum);
  }

  void finish(int64_t r, const RowFacts<Real>& facts) {
    int64_t i = first + r, row = (b * p.q.size[2] + h) * p.q.size[1] + i, size = p.q.size[3];
    Real normaliser = sums.normaliser(r), *keys_along = sums.row(r), *keys = keys_along + kv.key_size;
    Real more = keys[kv.key_size] * normaliser, a = normaliser == 0 ? Real(0) : origin[r] + more;
    facts.log2_sum[row] = Real(sums.log2(r));
    facts.along[row] = a;
    Real factor = Real(p.scale * factor_of(p, b, h, i)) * normaliser;
    for (int64_t c = 0; c < size; c++) keys[c] = factor * (keys_along[c] - more * keys[c]);
    convert(keys, params.grad_q.at<Stored>(b, i, h), size);
    if (p.row_gain) put_number(a * (p.mix ? number_at(p.mix, b, h, i) : 1), params.grad_row_gain, b, h, i);
    if (!p.mix) return;
    double gain = p.row_gain ? number_at(p.row_gain, b, h, i) : 1, rest = 1 - number_at(p.mix, b, h, i), pooled = 0;
    bool one = p.pooled.size[1] == 1;
    for (int64_t c = 0; c < p.v.size[3]; c++) {
      double g = to_float(*params.grad_out.at<const Stored>(b, i, h, c));
      pooled += g * to_float(*p.pooled.at<const Stored>(b, one ? 0 : i, h, c));
      if (!one) *params.grad_pooled.at<Stored>(b, i, h, c) = from_float<Stored>(rest * g);
    }
    put_number(gain * a - pooled, params.grad_mix, b, h, i);
  }

  const SeaAttentionBackwardParams& params;
  const SeaAttentionParams& p;
  int64_t b, h, first, rows, range;
  KeyRange<Stored> kv;
  RowSums<Real> sums;
  Real *part, *origin, *query, *grad, *weights, *along;
};

template <class Stored>
class KeyGradients {
  using Real = RealOf<Stored>;

 public:
  KeyGradients(const SeaAttentionBackwardParams& params, int64_t b, int64_t h)
      : params(params), p(params.forward), b(b), h(h), range(range_of<Real>(p)), kv(p, b, h) {
    static thread_local Scratch::Block memory;
    Scratch::plan(memory, [&](Scratch& scratch) {
      kv.take(scratch, range);
      grad_keys = scratch.take<Real>(range * kv.key_size);
      grad_values = scratch.take<Real>(range * kv.value_size);
      query = scratch.take<Real>(kv.key_size);
      grad = scratch.take<Real>(kv.value_size);
      weights = scratch.take<Real>(range + kLanes<Real>);
      along = scratch.take<Real>(range + kLanes<Real>);
    });
  }

  void run(int64_t start, const RowFacts<Real>& facts) {
    static thread_local ChunkColumns columns;
    int64_t end = std::min(start + range, p.k.size[1]), rows = p.q.size[1];
    kv.load(start, end);
    std::fill_n(grad_keys, (end - start) * kv.key_size, Real(0));
    std::fill_n(grad_values, (end - start) * kv.value_size, Real(0));
    for (int64_t first = 0; first < rows; first += kRows) {
      int64_t chunk = std::min(kRows, rows - first);
      columns.start(p, b, h, first, chunk, start, end);
      if (columns.enter(start, end) == 0) continue;
      for (int64_t r = 0; r < chunk; r++)
        if (columns.count(r)) add(first + r, columns.index(r), columns.count(r), facts);
    }
    for (int64_t j = start; j < end; j++) {
      convert(grad_keys + (j - start) * kv.key_size, params.grad_k.at<Stored>(b, j, h), p.q.size[3]);
      convert(grad_values + (j - start) * kv.value_size, params.grad_v.at<Stored>(b, j, h), p.v.size[3]);
    }
  }

 private:
  void add(int64_t i, const int32_t* index, int64_t count, const RowFacts<Real>& facts) {
    constexpr int lanes = kLanes<Real>;
    int64_t row = (b * p.q.size[2] + h) * p.q.size[1] + i;
    load_query<Stored>(p, b, i, h, query);
    load_grad<Stored>(params, b, i, h, grad);
    multiply_rows(query, kv.key_size, kv.keys, index, count, weights);
    multiply_rows(grad, kv.value_size, kv.values, index, count, along);
    Real factor = Real(factor_of(p, b, h, i));
    // The query holds scale and log2(e), of which keys' gradients want the former alone.
    Real of_scores = factor / Real(kLog2E);
    for (int64_t j = 0; j < count; j += lanes) {
      Vector<Real> weight = exp2_vector(load(weights + j) - facts.log2_sum[row]);
      store(along + j, weight * (load(along + j) - facts.along[row]) * of_scores);
      store(weights + j, weight * factor);
    }
    add_to_rows(along, query, kv.key_size, grad_keys, index, count);
    add_to_rows(weights, grad, kv.value_size, grad_values, index, count);
  }

  const SeaAttentionBackwardParams& params;
  const SeaAttentionParams& p;
  int64_t b, h, range;
  KeyRange<Stored> kv;
  Real *grad_keys, *grad_values, *query, *grad, *weights, *along;
};

// The gradient of a pooled row that all rows share.
template <class Stored>
void sum_pooled(const SeaAttentionBackwardParams& params, int64_t b, int64_t h) {
  const SeaAttentionParams& p = params.forward;
  std::vector<double> sum(size_t(p.v.size[3]));
  for (int64_t i = 0; i < p.q.size[1]; i++) {
    double rest = 1 - number_at(p.mix, b, h, i);
    const Stored* grad = params.grad_out.at<const Stored>(b, i, h);
    for (size_t c = 0; c < sum.size(); c++) sum[c] += rest * to_float(grad[c]);
  }
  for (size_t c = 0; c < sum.size(); c++)
    *params.grad_pooled.at<Stored>(b, 0, h, int64_t(c)) = from_float<Stored>(sum[c]);
}

}  // namespace

void sea_attention_backward(const SeaAttentionBackwardParams& params) {
  const SeaAttentionParams& p = params.forward;
  int64_t batch = p.q.size[0], rows = p.q.size[1], heads = p.q.size[2], keys = p.k.size[1];
  for_each_dtype(p.q.dtype, [&]<class Stored>(Stored) {
    using Real = RealOf<Stored>;
    static thread_local Scratch::Block memory;
    RowFacts<Real> facts;
    Scratch::plan(memory, [&](Scratch& scratch) {
      facts.log2_sum = scratch.take<Real>(batch * heads * rows);
      facts.along = scratch.take<Real>(batch * heads * rows);
    });
    int64_t chunks = (rows + kRows - 1) / kRows;
    parallel_for(batch * heads * chunks, kRows * 8192, [&](int64_t item) {
      int64_t first = (chunks - 1 - item % chunks) * kRows, head = item / chunks;
      QueryGradients<Stored>(params, head / heads, head % heads, first, std::min(kRows, rows - first)).run(facts);
    });
    int64_t range = range_of<Real>(p), ranges = (keys + range - 1) / range;
    parallel_for(batch * heads * ranges, range * 1024, [&](int64_t item) {
      int64_t head = item / ranges;
      KeyGradients<Stored>(params, head / heads, head % heads).run(item % ranges * range, facts);
    });
    if (p.pooled && p.pooled.size[1] == 1)
      parallel_for(batch * heads, rows * p.v.size[3],
                   [&](int64_t item) { sum_pooled<Stored>(params, item / heads, item % heads); });
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
