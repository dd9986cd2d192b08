// SPDX-License-Identifier: Apache-2.0
// Normalised linear attention, backward: a walk forward with the states, for the queries' gradients and what the
// denominators' are, and a walk back with the gradients of states, for those of keys and values.
//
// With n_i = q_i · z_i + eps and du_i = grad_out_i / n_i, dn_i = -du_i · out_i; a block's products of q and k, of du
// and v, and du S^T give the latter without out.
#include <vector>

#include "sea/kernels.h"
#include "sea/linear_cpu.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

template <class Stored>
class Backward {
  using Real = RealOf<Stored>;

 public:
  Backward(const LinearAttentionBackwardParams& p, int64_t b, int64_t h)
      : p(p), b(b), h(h), tokens(p.q.size[1]), features(p.q.size[3]), values(p.v.size[3]) {
    static thread_local Scratch::Block memory;
    Scratch::plan(memory, [&](Scratch& scratch) {
      q.take(scratch, features), k.take(scratch, features), grad_features.take(scratch, features);
      v.take(scratch, values), grad.take(scratch, values), grad_values.take(scratch, values);
      turned = scratch.take<Real>(std::max(k.stride, v.stride) * kBlock);
      weights = scratch.take<Real>(kBlock * kBlock);
      grad_weights = scratch.take<Real>(kBlock * kBlock);
      state = scratch.take<Real>(k.stride * v.stride);
      turned_state = scratch.take<Real>(k.stride * v.stride);
      norm = scratch.take<Real>(k.stride);
      reciprocal = scratch.take<Real>(tokens);
      grad_denominator = scratch.take<Real>(tokens);
    });
  }

  void run() {
    // The state and the norm, the former transposed.
    load_state(p.initial_state, b, h, 0, values, v.stride, features, state);
    transpose_units(state, v.stride, turned_state, k.stride, k.stride, v.stride);
    load_norm(p.initial_norm, b, h, features, norm);
    if (!p.causal) walk([&](int64_t t, int64_t count) { return advance(t, count); }, false);
    walk([&](int64_t t, int64_t count) { return of_queries(t, count); }, false);

    // Their gradients.
    load_state(p.grad_state, b, h, 0, values, v.stride, features, state);
    load_norm(p.grad_norm, b, h, features, norm);
    if (!p.causal) walk([&](int64_t t, int64_t count) { return retreat(t, count); }, true);
    walk([&](int64_t t, int64_t count) { return of_keys(t, count); }, true);
    if (p.grad_initial_state.size[0] == 0) return;
    save_state(state, v.stride, p.grad_initial_state, b, h, 0, values, features);
    convert(norm, p.grad_initial_norm.at<Real>(b, h), features);
  }

 private:
  template <class Block>
  void walk(const Block& block, bool back) {
    int64_t blocks = (tokens + kBlock - 1) / kBlock;
    for (int64_t n = 0; n < blocks; n++) {
      int64_t t = (back ? blocks - 1 - n : n) * kBlock, count = std::min(kBlock, tokens - t);
      if (!block(t, count))
        for (int64_t i = 0; i < count; i++) block(back ? t + count - 1 - i : t + i, 1);
    }
  }

  // False if a causal block has to go token by token.
  bool load(int64_t t, int64_t count) {
    bool finite = q.load(p.q, b, t, h, count) & k.load(p.k, b, t, h, count) & v.load(p.v, b, t, h, count) &
                  grad.load(p.grad_out, b, t, h, count);
    return finite || count == 1 || !p.causal;
  }

  bool advance(int64_t t, int64_t count) {
    k.load(p.k, b, t, h, count), v.load(p.v, b, t, h, count);
    add_to_state(count);
    return true;
  }
  void add_to_state(int64_t count) {
    add_products(v, k, turned_state, count);
    for (int64_t i = 0; i < count; i++) add_scaled(k.row(i), Real(1), norm, k.stride);
  }

  bool of_queries(int64_t t, int64_t count) {
    if (!load(t, count)) return false;
    if (p.causal) {
      lower_products(q, k, turned, weights, count);
      lower_products(grad, v, turned, grad_weights, count);
    }
    multiply_state<false>(grad, turned_state, grad_features, count);
    for (int64_t i = 0; i < count; i++) {
      Real *row = weights + i * kBlock, *grad_row = grad_weights + i * kBlock, *of_q = grad_features.row(i);
      Real denominator = dot(q.row(i), norm, q.stride) + Real(p.eps), along = 0;
      if (p.causal) denominator += sum_of_row(row);
      Real times = denominator == 0 ? Real(0) : 1 / denominator;
      scale(of_q, times, q.stride);
      along = dot(q.row(i), of_q, q.stride);
      if (p.causal) {
        scale(grad_row, times, kBlock);
        along += dot(row, grad_row, kBlock);
      }
      Real of_denominator = times == 0 ? Real(0) : -along * times;
      for (int64_t j = 0; p.causal && j <= i; j++) grad_row[j] += of_denominator;
      add_scaled(norm, of_denominator, of_q, q.stride);
      reciprocal[t + i] = times, grad_denominator[t + i] = of_denominator;
    }
    if (p.causal) add_lower(grad_weights, k, grad_features, count);
    grad_features.save(p.grad_q, b, t, h, count);
    if (p.causal) add_to_state(count);
    return true;
  }

  // 0 stands for a denominator of 0, which has no gradient.
  static void scale(Real* row, Real times, int64_t size) {
    for (int64_t c = 0; c < size; c++) row[c] = times == 0 ? Real(0) : row[c] * times;
  }

  // The gradient of the numerator.
  void divide(int64_t t, int64_t count) {
    for (int64_t i = 0; i < count; i++) scale(grad.row(i), reciprocal[t + i], grad.stride);
  }
  void add_to_grad_state(int64_t t, int64_t count) {
    add_products(q, grad, state, count);
    for (int64_t i = 0; i < count; i++) add_scaled(q.row(i), grad_denominator[t + i], norm, q.stride);
  }
  bool retreat(int64_t t, int64_t count) {
    q.load(p.q, b, t, h, count), grad.load(p.grad_out, b, t, h, count);
    divide(t, count);
    add_to_grad_state(t, count);
    return true;
  }

  bool of_keys(int64_t t, int64_t count) {
    if (!load(t, count)) return false;
    divide(t, count);
    transpose_units(state, v.stride, turned_state, k.stride, k.stride, v.stride);
    multiply_state<false>(k, state, grad_values, count);
    multiply_state<false>(v, turned_state, grad_features, count);
    for (int64_t i = 0; i < count; i++) add_scaled(norm, Real(1), grad_features.row(i), k.stride);
    if (p.causal) {
      lower_products(q, k, turned, weights, count);
      lower_products(grad, v, turned, grad_weights, count);
      for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j <= i; j++) grad_weights[i * kBlock + j] += grad_denominator[t + i];
      add_upper(weights, grad, grad_values, count);
      add_upper(grad_weights, q, grad_features, count);
      add_to_grad_state(t, count);
    }
    grad_features.save(p.grad_k, b, t, h, count);
    grad_values.save(p.grad_v, b, t, h, count);
    return true;
  }

  const LinearAttentionBackwardParams& p;
  int64_t b, h, tokens, features, values;
  Rows<Stored> q, k, v, grad, grad_features, grad_values;
  Real *turned, *weights, *grad_weights, *state, *turned_state, *norm, *reciprocal, *grad_denominator;
};

}  // namespace

void linear_attention_backward(const LinearAttentionBackwardParams& p) {
  int64_t batch = p.q.size[0], heads = p.q.size[2];
  for_each_dtype(p.q.dtype, [&]<class Stored>(Stored) {
    parallel_for(batch * heads, p.q.size[1] * p.q.size[3] * p.v.size[3] * 8,
                 [&](int64_t item) { Backward<Stored>(p, item / heads, item % heads).run(); });
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
