// SPDX-License-Identifier: Apache-2.0
// Gradients over whole sequences. A head's blocks are walked backwards with dS, the gradient of the state after the
// block; the states before the blocks are computed again, for one stretch of about the square root of their number at a
// time. With S the state before a block, w its weights, P = w * (dO V^T) and A = w * (Q K^T):
//   dQ = P K + e^G scale dO S^T      dK = P^T Q + e^(G_last - G) V dS^T      dV = A^T dO + e^(G_last - G) K dS
// The gradient of token t's log decay is the sum of all contributions to the loss that pass through it: from tokens
// before t to outputs from t on. Sums stay within the block, where they lose little to cancellation.
#include <cmath>
#include <vector>

#include "lightning_attention/block_cpu.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

// Sums of few are in Real, all of them in double.
template <class Element, class Real>
inline double dot(const Element* a, const Real* b, int64_t count) {
  constexpr int lanes = kLanes<Real>, few = 8 * lanes;
  auto numbers = [](const auto* from) {
    if constexpr (std::is_same_v<Real, double>)
      return load(from);
    else
      return load_float(from);
  };
  double total[lanes] = {}, all = 0;
  for (int64_t c = 0; c < count; c += few) {
    Vector<Real> sum{};
    for (int64_t e = c; e < std::min(count, c + few); e += lanes) sum += numbers(a + e) * load(b + e);
    for (int i = 0; i < lanes; i++) total[i] += double(sum[i]);
  }
  for (int i = 0; i < lanes; i++) all += total[i];
  return all;
}

// Buffers for a block in one kind of arithmetic.
template <class Unit>
struct Block {
  using Real = AccumulatorOf<Unit>;
  Rows<Unit> q, k, v, grad;
  Unit *right_k, *right_v, *right_q, *right_grad;  // packed for products over tokens
  Unit *turned_k, *turned_v;                       // and over channels
  Unit *state, *grad_state, *grad_state_turned;    // S turned, dS, and dS turned, for products with rows
  ElementOf<Unit>* plain;                          // a state's rows, as elements
  Unit *weights, *pairs, *turned_q;

  void take(Scratch& scratch, int64_t key_size, int64_t value_size) {
    q.take(scratch, key_size), k.take(scratch, key_size);
    v.take(scratch, value_size), grad.take(scratch, value_size);
    turned_k = take_operand<Unit>(scratch, key_size, kMaxBlock);
    turned_v = take_operand<Unit>(scratch, value_size, kMaxBlock);
    state = take_operand<Unit>(scratch, value_size, key_size);
    grad_state_turned = take_operand<Unit>(scratch, value_size, key_size);
    right_k = right_v = right_q = right_grad = grad_state = weights = pairs = turned_q = nullptr;
    plain = nullptr;
    if (kPack<Unit> == 1) return;
    right_k = take_operand<Unit>(scratch, kMaxBlock / 2, key_size);
    right_v = take_operand<Unit>(scratch, kMaxBlock / 2, value_size);
    right_q = take_operand<Unit>(scratch, kMaxBlock / 2, key_size);
    right_grad = take_operand<Unit>(scratch, kMaxBlock / 2, value_size);
    grad_state = take_operand<Unit>(scratch, key_size / 2, value_size);
    plain = scratch.take<ElementOf<Unit>>(padded(key_size) * row_stride(value_size));
    weights = take_operand<Unit>(scratch, kMaxBlock, kMaxBlock / 2);
    pairs = take_operand<Unit>(scratch, kMaxBlock / 2, kMaxBlock);
    turned_q = take_operand<Unit>(scratch, key_size, kMaxBlock / 2);
  }

  // A state [K, V] as the right operand of products over values.
  Right<Unit> over_values(const Real* from, Unit* to, int64_t key_size, int64_t value_size) const {
    int64_t stride = row_stride(value_size), rows = padded(key_size), columns = padded(value_size);
    const Unit* units;
    if constexpr (kPack<Unit> == 1) {
      units = from;
    } else {
      for (int64_t c = 0; c < rows; c++) store_row<BFloat16>(from + c * stride, plain + c * stride, int(columns));
      units = reinterpret_cast<const Unit*>(plain);
    }
    transpose_units(units, stride / kPack<Unit>, to, row_stride(key_size), rows, columns / kPack<Unit>);
    return {to, row_stride(key_size)};
  }
};

template <class Stored>
class Backward {
  using Real = CarefulUnit<Stored>;
  using Fast = FastUnit<Stored>;
  static constexpr int kTokens = kBlock<Fast>;
  static constexpr int64_t kScores = row_stride(kMaxBlock);

 public:
  Backward(const LightningBackwardParams& params, int64_t n, int64_t h)
      : p(params),
        n(n),
        h(h),
        key_size(p.k.size[3]),
        value_size(p.v.size[3]),
        stride(row_stride(value_size)),
        key_stride(row_stride(key_size)),
        state_size(padded(key_size) * stride),
        sequence(sequence_of(p.cu_seqlens, n, p.k.size[1])),
        blocks((sequence.end - sequence.begin + kTokens - 1) / kTokens) {
    constexpr int64_t kOneStretch = 32;
    stretch = blocks <= kOneStretch ? blocks : int64_t(std::ceil(std::sqrt(double(blocks))));
    stretches = blocks == 0 ? 0 : (blocks + stretch - 1) / stretch;
    static thread_local Scratch::Block memory;
    Scratch::plan(memory, [&](Scratch& scratch) {
      fast.take(scratch, key_size, value_size);
      if constexpr (!std::is_same_v<Fast, Real>) careful.take(scratch, key_size, value_size);
      walk.take(scratch, key_size, value_size);
      decay.take(scratch);
      scores = scratch.take<Real>(kMaxBlock * kScores);
      products = scratch.take<Real>(kMaxBlock * kScores);
      dq = scratch.take<Real>(kMaxBlock * key_stride);
      dk = scratch.take<Real>(kMaxBlock * key_stride);
      dv = scratch.take<Real>(kMaxBlock * stride);
      carry = scratch.take<Real>(state_size);
      old_carry = scratch.take<Real>(state_size);
      starts = scratch.take<Real>(std::max<int64_t>(stretches, 1) * state_size);
      states = scratch.take<Real>(stretch * state_size);
    });
  }

  // Returns the gradient of a constant log decay.
  double run() {
    [[maybe_unused]] MatmulSession session;
    load_state(p.initial_state, n, h, 0, value_size, key_size, starts);
    for (int64_t i = 0; i + 1 < stretches; i++) {
      Real* next = starts + (i + 1) * state_size;
      std::copy_n(starts + i * state_size, state_size, next);
      for (int64_t block = i * stretch; block < (i + 1) * stretch; block++) advance(next, block);
    }
    load_state(p.grad_final_state, n, h, 0, value_size, key_size, carry);
    double rate_gradient = 0;
    for (int64_t i = stretches; i-- > 0;) {
      int64_t first = i * stretch, last = std::min(first + stretch, blocks);
      std::copy_n(starts + i * state_size, state_size, states);
      for (int64_t block = first; block + 1 < last; block++) {
        Real* next = states + (block + 1 - first) * state_size;
        std::copy_n(next - state_size, state_size, next);
        advance(next, block);
      }
      for (int64_t block = last; block-- > first;) rate_gradient += back(states + (block - first) * state_size, block);
    }
    store_state(carry, p.grad_initial_state, n, h, 0, value_size, key_size);
    return rate_gradient;
  }

 private:
  int64_t first_token(int64_t block) const { return sequence.begin + block * kTokens; }
  int tokens_of(int64_t block) const { return int(std::min<int64_t>(kTokens, sequence.end - first_token(block))); }

  void set_decay(int64_t block) {
    int64_t t = first_token(block);
    int tokens = tokens_of(block);
    if (p.decay.gates) {
      decay.gates([&](int i) { return rate_of(p.decay.gates, sequence.batch, t + i, h); }, tokens);
    } else if (tokens != decayed) {
      decay.constant(rate_of(p.decay.slopes, h), decayed = tokens);
    }
  }

  void look_ahead(int64_t block) {
    constexpr int64_t size = sizeof(Stored);
    if (block < 0) return ahead.start(0);
    int64_t t = first_token(block), batch = sequence.batch, head = h * (p.q.size[2] / p.k.size[2]);
    ahead.start(kTokens);
    ahead.add(p.k.at<const Stored>(batch, t, h), p.k.stride[1] * size, int(key_size * size));
    ahead.add(p.v.at<const Stored>(batch, t, h), p.v.stride[1] * size, int(value_size * size));
    ahead.add(p.q.at<const Stored>(batch, t, head), p.q.stride[1] * size, int(key_size * size));
    ahead.add(p.grad_out.at<const Stored>(batch, t, head), p.grad_out.stride[1] * size, int(value_size * size));
  }

  void advance(Real* state, int64_t block) {
    set_decay(block);
    int64_t t = first_token(block);
    walk.advance(state, p.k.at<const Stored>(sequence.batch, t, h), p.k.stride[1],
                 p.v.at<const Stored>(sequence.batch, t, h), p.v.stride[1], decay, tokens_of(block), false);
  }

  double back(const Real* state, int64_t block) {
    set_decay(block);
    look_ahead(block - 1);
    std::copy_n(carry, state_size, old_carry);
    if (!back_with<Fast, false>(fast, state, block)) {
      std::copy_n(old_carry, state_size, carry);
      if constexpr (std::is_same_v<Fast, Real>)
        back_with<Real, true>(fast, state, block);
      else
        back_with<Real, true>(careful, state, block);
    }
    if (!p.decay_gradient) return 0;
    if (!p.decay.gates) return shared_gradient(tokens_of(block));
    store_gradients(first_token(block), tokens_of(block));
    return 0;
  }

  // False if there are numbers that are not finite: then it has to be done again, with care.
  template <class Unit, bool care>
  bool back_with(Block<Unit>& b, const Real* state, int64_t block) {
    int64_t t = first_token(block), batch = sequence.batch, group = p.q.size[2] / p.k.size[2];
    int tokens = tokens_of(block), entering = std::max(decay.last_reset, 0), seeing = decay.first_reset;
    int key_units = int(padded(key_size)) / kPack<Unit>, value_units = int(padded(value_size)) / kPack<Unit>;
    bool finite = b.k.load(p.k.at<const Stored>(batch, t, h), p.k.stride[1], tokens);
    finite &= b.v.load(p.v.at<const Stored>(batch, t, h), p.v.stride[1], tokens);
    if (!finite && !care) return false;

    // What reaches the loss through the state after the block.
    Right<Unit> after_turned = b.over_values(carry, b.grad_state_turned, key_size, value_size);
    Right<Unit> after = over_rows<Unit>(carry, stride, b.grad_state, padded(key_size), padded(value_size));
    multiply<false>(b.v.units(), b.v.unit_stride(), after_turned, dk, key_stride, tokens, padded(key_size), value_units,
                    ahead);
    multiply<false>(b.k.units(), b.k.unit_stride(), after, dv, stride, tokens, padded(value_size), key_units, ahead);
    scale_rows(dk, key_size, decay.to_state, Real(1), entering, tokens, tokens);
    scale_rows(dv, value_size, decay.to_state, Real(1), entering, tokens, tokens);
    if (p.decay_gradient) {
      for (int j = 0; j < tokens; j++) {
        through_pairs[j] = through_before[j] = 0;
        through_after[j] = j < entering ? 0 : dot(b.k.row(j), dk + j * key_stride, padded(key_size));
      }
      by_distance = 0;
      through_block = decay.resets() ? 0 : (1 + double(decay.minus_one)) * dot(state, carry, state_size);
    }
    for (int64_t i = 0; i < state_size; i += kLanes<Real>) {
      Vector<Real> value = load(carry + i);
      store(carry + i, decay.resets() ? Vector<Real>{} : value * decay.minus_one + value);
    }

    Right<Unit> keys = over_channels(b.k, b.turned_k, tokens), values = over_channels(b.v, b.turned_v, tokens);
    Right<Unit> right_k = over_rows(b.k, b.right_k, tokens);
    Right<Unit> before_turned{};
    if (seeing > 0) before_turned = b.over_values(state, b.state, key_size, value_size);
    for (int64_t head = h * group; head < (h + 1) * group; head++) {
      finite = b.q.load(p.q.at<const Stored>(batch, t, head), p.q.stride[1], tokens);
      finite &= b.grad.load(p.grad_out.at<const Stored>(batch, t, head), p.grad_out.stride[1], tokens);
      if (!finite && !care) return false;
      lower_scores(b.q, keys, scores, tokens, ahead);
      lower_scores(b.grad, values, products, tokens, ahead);
      weigh(scores, decay, Real(p.scale), tokens);
      if (p.decay_gradient) add_pairs(tokens);
      weigh(products, decay, Real(p.scale), tokens);

      if (seeing > 0)
        multiply<false>(b.grad.units(), b.grad.unit_stride(), before_turned, dq, key_stride, seeing, padded(key_size),
                        value_units, ahead);
      scale_rows(dq, key_size, decay.from_state, Real(p.scale), 0, seeing, tokens);
      for (int i = 0; i < seeing && p.decay_gradient; i++)
        through_before[i] += dot(b.q.row(i), dq + i * key_stride, padded(key_size));

      lower<Unit, care>(b, products, right_k, dq, key_stride, padded(key_size), tokens);
      for (int i = 0; i < tokens; i++)
        store_row<Stored>(dq + i * key_stride, p.grad_q.at<Stored>(batch, t + i, head), int(key_size));
      upper<Unit, care>(b, products, over_rows(b.q, b.right_q, tokens), dk, key_stride, padded(key_size), tokens);
      Right<Unit> right_grad = over_rows(b.grad, b.right_grad, tokens);
      upper<Unit, care>(b, scores, right_grad, dv, stride, padded(value_size), tokens);

      for (int i = 0; i < seeing; i++) state_weight[i] = decay.from_state[i] * Real(p.scale);
      KeysAndValues<Unit>::scale_rows(b.q, state_weight, 0, seeing);
      if (seeing > 0)
        KeysAndValues<Unit>::add_products(b.q, right_grad, b.right_q, b.turned_q, carry, value_size, 0, seeing, ahead);
    }
    for (int j = 0; j < tokens; j++) {
      store_row<Stored>(dk + j * key_stride, p.grad_k.at<Stored>(batch, t + j, h), int(key_size));
      store_row<Stored>(dv + j * stride, p.grad_v.at<Stored>(batch, t + j, h), int(value_size));
    }
    return true;
  }

  // Adds what each pair of different tokens contributes to the loss, a weight times a product: to its later token, less
  // to its earlier one.
  void add_pairs(int tokens) {
    constexpr int lanes = kLanes<Real>;
    Real earlier[kMaxBlock] = {};
    MaskOf<Real> lane;
    Vector<Real> number;
    for (int c = 0; c < lanes; c++) lane[c] = c, number[c] = Real(c);
    auto distance = [&](int i, int j) { return Real(i - j) - number; };
    for (int i = 0; i < tokens; i++) {
      Vector<Real> later{}, weighted{};
      for (int j = 0; j < i; j += lanes) {
        MaskOf<Real> place = lane + j;
        Vector<Real> pair = load(scores + i * kScores + j) * load(products + i * kScores + j);
        pair = (place >= decay.first[i]) & (place < i) ? pair : Vector<Real>{};
        later += pair;
        weighted += pair * distance(i, j);
        store(earlier + j, load(earlier + j) + pair);
      }
      for (int c = 0; c < lanes; c++) through_pairs[i] += double(later[c]), by_distance += double(weighted[c]);
    }
    for (int j = 0; j < tokens; j++) through_pairs[j] -= double(earlier[j]);
  }

  // out[i] += weights[i] right and, for their transpose, out[j] += weights^T[j] right.
  template <class Unit, bool care>
  void lower(Block<Unit>& b, Real* weights, Right<Unit> right, Real* out, int64_t out_stride, int64_t columns,
             int tokens) {
    const Unit* units;
    if constexpr (kPack<Unit> == 1) {
      units = weights;
    } else {
      for (int i = 0; i < padded(tokens); i++)
        store_row<BFloat16>(weights + i * kScores, reinterpret_cast<BFloat16*>(b.weights) + i * kScores,
                            int(padded(tokens)));
      units = b.weights;
    }
    triangle<false, true, care>(units, kScores / kPack<Unit>, right, out, out_stride, int(columns), tokens, decay,
                                ahead);
  }
  template <class Unit, bool care>
  void upper(Block<Unit>& b, Real* weights, Right<Unit> right, Real* out, int64_t out_stride, int64_t columns,
             int tokens) {
    if constexpr (kPack<Unit> == 1) {
      triangle<true, false, care>(weights, kScores, right, out, out_stride, int(columns), tokens, decay, ahead);
    } else {
      int64_t count = padded(tokens);
      Right<Unit> pairs = over_rows<Unit>(weights, kScores, b.pairs, count, count);
      int64_t units = row_stride(kMaxBlock / 2);
      transpose_units(pairs.data, pairs.stride, b.weights, units, count / 2, count);
      triangle<true, true, care>(b.weights, units, right, out, out_stride, int(columns), tokens, decay, ahead);
    }
  }

  // The gradient of a log decay that all tokens share: each contribution as often as it decays.
  double shared_gradient(int tokens) const {
    if (decay.resets()) return 0;
    double sum = by_distance + tokens * through_block;
    for (int i = 0; i < tokens; i++) sum += (i + 1) * through_before[i] + (tokens - 1 - i) * through_after[i];
    return sum;
  }

  // The gradient of each token's own: all that passes through it.
  void store_gradients(int64_t t, int tokens) const {
    double gradient[kMaxBlock], later = 0, before = 0, after = 0;
    for (int i = tokens; i-- > 0;) {
      if (i + 1 < tokens && decay.first[i + 1] == i + 1) later = 0;
      later += through_pairs[i];
      if (i < decay.first_reset) before += through_before[i];
      gradient[i] = later + (i < decay.first_reset ? before : 0);
    }
    for (int i = 0; i < tokens; i++) {
      if (i > decay.last_reset) gradient[i] += after + through_block;
      if (i >= decay.last_reset) after += through_after[i];
      if (is_reset(i)) gradient[i] = 0;
      if (p.grad_decay.dtype == DType::float64)
        *p.grad_decay.at<double>(sequence.batch, t + i, h) = gradient[i];
      else
        *p.grad_decay.at<float>(sequence.batch, t + i, h) = float(gradient[i]);
    }
  }

  bool is_reset(int i) const { return decay.resets() && i >= decay.first_reset && decay.first[i] == i; }

  const LightningBackwardParams& p;
  int64_t n, h, key_size, value_size, stride, key_stride, state_size;
  Sequence sequence;
  int64_t blocks, stretch, stretches;
  Block<Fast> fast;
  Block<Real> careful;
  StateWalk<Stored> walk;
  BlockDecay<Real> decay;
  Ahead ahead;
  int decayed = 0;
  Real *scores, *products, *dq, *dk, *dv, *carry, *old_carry, *starts, *states;
  Real state_weight[kMaxBlock];
  // Contributions to the loss: of pairs of tokens of the block, by their later less by their earlier token; of the
  // state before it, by output; of its tokens through the state after it; of the state before it through that.
  double through_pairs[kMaxBlock], through_before[kMaxBlock], through_after[kMaxBlock], through_block;
  double by_distance;  // of pairs, times the tokens between them
};

}  // namespace

void lightning_backward(const LightningBackwardParams& params) {
  int64_t heads = params.k.size[2], group = params.q.size[2] / heads;
  int64_t count = sequences(params.cu_seqlens, params.k.size[0]);
  int64_t cost = params.k.size[1] * params.k.size[3] * params.v.size[3] * (3 + 3 * group);
  std::vector<double> rate_gradients(size_t(count * heads));
  for_each_dtype(params.q.dtype, [&]<class Stored>(Stored) {
    for_each_item(count * heads, cost,
                  [&](int64_t i) { rate_gradients[i] = Backward<Stored>(params, i / heads, i % heads).run(); });
  });
  if (!params.decay.slopes || !params.decay_gradient) return;
  for (int64_t h = 0; h < heads; h++) {
    double sum = 0;
    for (int64_t n = 0; n < count; n++) sum -= rate_gradients[n * heads + h];
    if (params.grad_decay.dtype == DType::float64)
      *params.grad_decay.at<double>(h) = sum;
    else
      *params.grad_decay.at<float>(h) = float(sum);
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
