// SPDX-License-Identifier: Apache-2.0
// Normalised linear attention, forward.
#include "sea/kernels.h"
#include "sea/linear_cpu.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

// One head, of which columns [first, first + width) of the values.
template <class Stored>
class Forward {
  using Real = RealOf<Stored>;

 public:
  Forward(const LinearAttentionParams& p, int64_t b, int64_t h, int64_t first, int64_t width)
      : p(p), b(b), h(h), first(first), features(p.q.size[3]) {
    static thread_local Scratch::Block memory;
    Scratch::plan(memory, [&](Scratch& scratch) {
      q.take(scratch, features), k.take(scratch, features);
      v.take(scratch, width), out.take(scratch, width);
      turned = scratch.take<Real>(k.stride * kBlock);
      weights = scratch.take<Real>(kBlock * kBlock);
      state = scratch.take<Real>(k.stride * v.stride);
      norm = scratch.take<Real>(k.stride);
    });
  }

  void run() {
    int64_t tokens = p.q.size[1];
    load_state(p.initial_state, b, h, first, v.width, v.stride, features, state);
    load_norm(p.initial_norm, b, h, features, norm);
    if (p.causal) {
      walk(tokens, [&](int64_t t, int64_t count) { return causal(t, count); });
    } else {
      walk(tokens, [&](int64_t t, int64_t count) { return advance(t, count); });
      walk(tokens, [&](int64_t t, int64_t count) { return read(t, count); });
    }
    save_state(state, v.stride, p.state, b, h, first, v.width, features);
    if (first == 0) convert(norm, p.norm.at<Real>(b, h), features);
  }

 private:
  template <class Block>
  static void walk(int64_t tokens, const Block& block) {
    for (int64_t t = 0; t < tokens; t += kBlock) {
      int64_t count = std::min(kBlock, tokens - t);
      if (!block(t, count))
        for (int64_t i = 0; i < count; i++) block(t + i, 1);
    }
  }

  bool causal(int64_t t, int64_t count) {
    bool finite = q.load(p.q, b, t, h, count) & k.load(p.k, b, t, h, count) & v.load(p.v, b, t, h, count, first);
    if (!finite && count > 1) return false;
    lower_products(q, k, turned, weights, count);
    multiply_state<false>(q, state, out, count);
    add_lower(weights, v, out, count);
    for (int64_t i = 0; i < count; i++) divide(i, sum_of_row(weights + i * kBlock) + dot(q.row(i), norm, q.stride));
    out.save(p.out, b, t, h, count, first);
    add_to_state(count);
    return true;
  }

  bool advance(int64_t t, int64_t count) {
    k.load(p.k, b, t, h, count), v.load(p.v, b, t, h, count, first);
    add_to_state(count);
    return true;
  }

  bool read(int64_t t, int64_t count) {
    q.load(p.q, b, t, h, count);
    multiply_state<false>(q, state, out, count);
    for (int64_t i = 0; i < count; i++) divide(i, dot(q.row(i), norm, q.stride));
    out.save(p.out, b, t, h, count, first);
    return true;
  }

  void add_to_state(int64_t count) {
    add_products(k, v, state, count);
    for (int64_t i = 0; i < count; i++) add_scaled(k.row(i), Real(1), norm, k.stride);
  }

  void divide(int64_t i, Real denominator) {
    denominator += Real(p.eps);
    Real *row = out.row(i), times = 1 / denominator;
    if (denominator == 0)
      std::fill_n(row, out.stride, Real(0));
    else
      for (int64_t c = 0; c < out.stride; c++) row[c] *= times;
  }

  const LinearAttentionParams& p;
  int64_t b, h, first, features;
  Rows<Stored> q, k, v, out;
  Real *turned, *weights, *state, *norm;
};

}  // namespace

void linear_attention(const LinearAttentionParams& p) {
  int64_t batch = p.q.size[0], heads = p.q.size[2], items = batch * heads, values = p.v.size[3];
  // Columns of values are independent of each other: where heads are fewer than threads, several share a head.
  constexpr int64_t kLeast = 32;
  int64_t threads = omp_get_max_threads();
  int64_t parts = items == 0 || items >= threads ? 1 : std::min((threads + items - 1) / items, values / kLeast + 1);
  int64_t width = (values + parts * kLeast - 1) / (parts * kLeast) * kLeast;
  parts = (values + width - 1) / width;
  for_each_dtype(p.q.dtype, [&]<class Stored>(Stored) {
    parallel_for(items * parts, p.q.size[1] * p.q.size[3] * width * 3 + p.q.size[3] * width, [&](int64_t item) {
      int64_t head = item / parts, first = item % parts * width;
      Forward<Stored>(p, head / heads, head % heads, first, std::min(width, values - first)).run();
    });
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
