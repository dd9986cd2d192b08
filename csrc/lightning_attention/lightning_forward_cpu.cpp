// SPDX-License-Identifier: Apache-2.0
// Attention over whole sequences. The blocks of a head are computed in order, with the state in cache. A thread takes
// the same block of several heads before the next block: rows of neighbouring heads are neighbours in memory.
#include "lightning_attention/block_cpu.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

// Buffers for a block in one kind of arithmetic.
template <class Unit>
struct Block {
  using Real = AccumulatorOf<Unit>;
  Rows<Unit> q;
  KeysAndValues<Unit> kv;
  Unit *turned_keys, *packed_state, *weights;

  void take(Scratch& scratch, int64_t key_size, int64_t value_size) {
    q.take(scratch, key_size);
    kv.take(scratch, key_size, value_size);
    turned_keys = take_operand<Unit>(scratch, key_size, kMaxBlock);
    packed_state = kPack<Unit> > 1 ? take_operand<Unit>(scratch, key_size / 2, value_size) : nullptr;
    weights = kPack<Unit> > 1 ? take_operand<Unit>(scratch, kMaxBlock, kMaxBlock / 2) : nullptr;
  }

  // The weights as units, in rows of row_stride(kMaxBlock) numbers.
  const Unit* weights_of(Real* scores, int tokens) const {
    if constexpr (kPack<Unit> == 1) {
      return scores;
    } else {
      for (int i = 0; i < padded(tokens); i++)
        store_row<BFloat16>(scores + i * row_stride(kMaxBlock),
                            reinterpret_cast<BFloat16*>(weights) + i * row_stride(kMaxBlock), int(padded(tokens)));
      return weights;
    }
  }
};

inline constexpr int kTogether = 4;  // heads: their states fit in the L2 cache

template <class Stored>
class Forward {
  using Real = CarefulUnit<Stored>;
  using Fast = FastUnit<Stored>;
  static constexpr int kTokens = kBlock<Fast>;

 public:
  Forward(const LightningForwardParams& params, int64_t first_value, int64_t values)
      : p(params), first_value(first_value), values(values), key_size(p.k.size[3]) {
    static thread_local Scratch::Block memory;
    Scratch::plan(memory, [&](Scratch& scratch) {
      fast.take(scratch, key_size, values);
      if constexpr (!std::is_same_v<Fast, Real>) careful.take(scratch, key_size, values);
      for (Head& head : heads) {
        head.decay.take(scratch);
        head.state = scratch.take<Real>(padded(key_size) * row_stride(values));
      }
      scores = scratch.take<Real>(kMaxBlock * row_stride(kMaxBlock));
      out = scratch.take<Real>(kMaxBlock * row_stride(values));
    });
  }

  // Heads [first, first + count) of sequence n.
  void run(int64_t n, int64_t first, int count) {
    [[maybe_unused]] MatmulSession session;
    Sequence sequence = sequence_of(p.cu_seqlens, n, p.k.size[1]);
    bool wanted = n < p.final_state.size[0];
    for (int i = 0; i < count; i++) {
      heads[i].zero = !p.initial_state, heads[i].decayed = 0;
      load_state(p.initial_state, n, first + i, first_value, values, key_size, heads[i].state);
    }
    for (int64_t t = sequence.begin; t < sequence.end; t += kTokens) {
      int tokens = int(std::min<int64_t>(kTokens, sequence.end - t));
      bool last = t + tokens == sequence.end && !wanted;
      for (int i = 0; i < count; i++) {
        Head& head = heads[i];
        set_decay(head, sequence.batch, t, first + i, tokens);
        if (i + 1 < count)
          look_ahead(sequence, t, first + i + 1);
        else
          look_ahead(sequence, t + tokens, first);
        if (!block<Fast, false>(fast, head, sequence.batch, t, first + i, tokens, last)) {
          if constexpr (std::is_same_v<Fast, Real>)
            block<Real, true>(fast, head, sequence.batch, t, first + i, tokens, last);
          else
            block<Real, true>(careful, head, sequence.batch, t, first + i, tokens, last);
        }
        head.zero = false;
      }
    }
    for (int i = 0; i < count; i++)
      store_state(heads[i].state, p.final_state, n, first + i, first_value, values, key_size);
  }

 private:
  struct Head {
    BlockDecay<Real> decay;
    int decayed;  // tokens that a constant decay was made for
    Real* state;
    bool zero;  // whether the state is
  };

  void set_decay(Head& head, int64_t batch, int64_t t, int64_t h, int tokens) const {
    if (p.decay.gates) {
      head.decay.gates([&](int i) { return rate_of(p.decay.gates, batch, t + i, h); }, tokens);
    } else if (tokens != head.decayed) {
      head.decay.constant(rate_of(p.decay.slopes, h), head.decayed = tokens);
    }
  }

  void look_ahead(const Sequence& sequence, int64_t t, int64_t h) {
    constexpr int64_t size = sizeof(Stored);
    int64_t head = h * (p.q.size[2] / p.k.size[2]);
    ahead.start(int(std::min<int64_t>(kTokens, sequence.end - t)));
    ahead.add(p.k.at<const Stored>(sequence.batch, t, h), p.k.stride[1] * size, int(key_size * size));
    ahead.add(p.v.at<const Stored>(sequence.batch, t, h, first_value), p.v.stride[1] * size, int(values * size));
    ahead.add(p.q.at<const Stored>(sequence.batch, t, head), p.q.stride[1] * size, int(key_size * size));
    ahead.add(p.out.at<const Stored>(sequence.batch, t, head, first_value), p.out.stride[1] * size, int(values * size));
  }

  // False if there are numbers that are not finite: then it has to be done again, with care.
  template <class Unit, bool care>
  bool block(Block<Unit>& b, const Head& of, int64_t batch, int64_t t, int64_t h, int tokens, bool last) {
    const BlockDecay<Real>& decay = of.decay;
    Real* state = of.state;
    Rows<Unit>&k = b.kv.k, &v = b.kv.v;
    bool finite = k.load(p.k.at<const Stored>(batch, t, h), p.k.stride[1], tokens);
    finite &= v.load(p.v.at<const Stored>(batch, t, h, first_value), p.v.stride[1], tokens);
    if (!finite && !care) return false;
    Right<Unit> keys = over_channels(k, b.turned_keys, tokens);
    Right<Unit> right = over_rows(v, b.kv.packed_values, tokens);
    bool sees_state = !of.zero && decay.first_reset > 0;
    Right<Unit> before{};
    if (sees_state)
      before = over_rows<Unit>(state, row_stride(values), b.packed_state, padded(key_size), padded(values));
    int64_t group = p.q.size[2] / p.k.size[2];
    for (int64_t head = h * group; head < (h + 1) * group; head++) {
      if (!b.q.load(p.q.at<const Stored>(batch, t, head), p.q.stride[1], tokens) && !care) return false;
      lower_scores(b.q, keys, scores, tokens, ahead);
      weigh(scores, decay, Real(p.scale), tokens);
      if (sees_state)
        multiply<false>(b.q.units(), b.q.unit_stride(), before, out, row_stride(values), decay.first_reset,
                        padded(values), padded(key_size) / kPack<Unit>, ahead);
      scale_rows(out, values, decay.from_state, Real(p.scale), 0, sees_state ? decay.first_reset : 0, tokens);
      triangle<false, true, care>(b.weights_of(scores, tokens), row_stride(kMaxBlock) / kPack<Unit>, right, out,
                                  row_stride(values), int(padded(values)), tokens, decay, ahead);
      for (int i = 0; i < tokens; i++)
        store_row(out + i * row_stride(values), p.out.at<Stored>(batch, t + i, head, first_value), int(values));
    }
    if (!last) b.kv.advance(state, right, decay, tokens, of.zero, ahead);
    return true;
  }

  const LightningForwardParams& p;
  int64_t first_value, values, key_size;
  Block<Fast> fast;
  Block<Real> careful;
  Head heads[kTogether];
  Ahead ahead;
  Real *scores, *out;
};

// How many heads a thread takes together: they must leave all threads as much to do.
int heads_together(int64_t heads, int64_t items) {
  int64_t threads = omp_get_max_threads();
  int together = kTogether;
  auto balanced = [&](int64_t count) { return count % threads == 0 || count >= 4 * threads; };
  while (together > 1 && (heads % together != 0 || !balanced(items / together))) together /= 2;
  return together;
}

}  // namespace

void lightning_forward(const LightningForwardParams& params) {
  int64_t heads = params.k.size[2], group = params.q.size[2] / heads;
  int64_t items = sequences(params.cu_seqlens, params.k.size[0]) * heads;
  int together = heads_together(heads, items);
  int64_t cost = params.k.size[1] * params.k.size[3] * params.v.size[3] * (1 + group) * together;
  for_each_dtype(params.q.dtype, [&]<class Stored>(Stored) {
    for_each_part(items / together, params.v.size[3], cost, [&](int64_t i, int64_t first_value, int64_t values) {
      int64_t first = i * together;
      Forward<Stored>(params, first_value, values).run(first / heads, first % heads, together);
    });
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
