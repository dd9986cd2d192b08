// SPDX-License-Identifier: Apache-2.0
// The state that a sequence leaves behind, and what the state before a sequence adds to its outputs.
#include "lightning_attention/block_cpu.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

template <class Stored>
void chunk_state(const LightningChunkStateParams& p, int64_t n, int64_t h, int64_t first_value, int64_t values) {
  using Real = CarefulUnit<Stored>;
  constexpr int kTokens = kBlock<FastUnit<Stored>>;
  [[maybe_unused]] MatmulSession session;
  static thread_local Scratch::Block memory;
  int64_t key_size = p.k.size[3];
  StateWalk<Stored> walk;
  BlockDecay<Real> decay;
  Real* state = nullptr;
  Scratch::plan(memory, [&](Scratch& scratch) {
    walk.take(scratch, key_size, values);
    decay.take(scratch);
    state = scratch.take<Real>(padded(key_size) * row_stride(values));
  });
  Sequence sequence = sequence_of(p.cu_seqlens, n, p.k.size[1]);
  load_state<Real>({}, n, h, first_value, values, key_size, state);
  int decayed = 0;
  for (int64_t t = sequence.begin; t < sequence.end; t += kTokens) {
    int tokens = int(std::min<int64_t>(kTokens, sequence.end - t));
    if (tokens != decayed) decay.constant(rate_of(p.slopes, h), decayed = tokens);
    walk.advance(state, p.k.at<const Stored>(sequence.batch, t, h), p.k.stride[1],
                 p.v.at<const Stored>(sequence.batch, t, h, first_value), p.v.stride[1], decay, tokens,
                 t == sequence.begin);
  }
  store_state(state, p.state, n, h, first_value, values, key_size);
}

template <class Stored>
void apply_state(const LightningApplyStateParams& p, int64_t n, int64_t h, int64_t first_value, int64_t values) {
  using Real = CarefulUnit<Stored>;
  using Unit = FastUnit<Stored>;
  constexpr int kTokens = kBlock<Unit>;
  [[maybe_unused]] MatmulSession session;
  static thread_local Scratch::Block memory;
  int64_t key_size = p.q.size[3], group = p.q.size[2] / p.state.size[1], stride = row_stride(values);
  Rows<Unit> q;
  Ahead nothing;
  Unit* packed = nullptr;
  Real *state = nullptr, *out = nullptr;
  Scratch::plan(memory, [&](Scratch& scratch) {
    q.take(scratch, key_size);
    packed = kPack<Unit> > 1 ? take_operand<Unit>(scratch, key_size / 2, values) : nullptr;
    state = scratch.take<Real>(padded(key_size) * stride);
    out = scratch.take<Real>(kMaxBlock * stride);
  });
  Sequence sequence = sequence_of(p.cu_seqlens, n, p.q.size[1]);
  double slope = rate_of(p.slopes, h);
  bool forgets = slope == std::numeric_limits<double>::infinity();
  load_state(p.state, n, h, first_value, values, key_size, state);
  Right<Unit> right = over_rows<Unit>(state, stride, packed, padded(key_size), padded(values));
  for (int64_t t = sequence.begin; t < sequence.end; t += kTokens) {
    int tokens = int(std::min<int64_t>(kTokens, sequence.end - t));
    for (int64_t head = h * group; head < (h + 1) * group; head++) {
      q.load(p.q.at<const Stored>(sequence.batch, t, head), p.q.stride[1], tokens);
      if (!forgets)
        multiply<false>(q.units(), q.unit_stride(), right, out, stride, tokens, padded(values),
                        padded(key_size) / kPack<Unit>, nothing);
      for (int i = 0; i < tokens; i++) {
        Real factor = Real(std::exp(-slope * double(t + i + 1 - sequence.begin)) * p.scale), *row = out + i * stride;
        for (int64_t c = 0; c < padded(values); c += kLanes<Real>)
          store(row + c, forgets ? Vector<Real>{} : load(row + c) * factor);
        store_row(row, p.out.at<Stored>(sequence.batch, t + i, head, first_value), int(values));
      }
    }
  }
}

}  // namespace

void lightning_chunk_state(const LightningChunkStateParams& params) {
  int64_t heads = params.k.size[2], items = sequences(params.cu_seqlens, params.k.size[0]) * heads;
  int64_t cost = params.k.size[1] * params.k.size[3] * params.v.size[3];
  for_each_dtype(params.k.dtype, [&]<class Stored>(Stored) {
    for_each_part(items, params.v.size[3], cost, [&](int64_t i, int64_t first_value, int64_t values) {
      chunk_state<Stored>(params, i / heads, i % heads, first_value, values);
    });
  });
}

void lightning_apply_state(const LightningApplyStateParams& params) {
  int64_t heads = params.state.size[1], items = sequences(params.cu_seqlens, params.q.size[0]) * heads;
  int64_t cost = params.q.size[1] * params.q.size[3] * params.state.size[3];
  for_each_dtype(params.q.dtype, [&]<class Stored>(Stored) {
    for_each_part(items, params.state.size[3], cost, [&](int64_t i, int64_t first_value, int64_t values) {
      apply_state<Stored>(params, i / heads, i % heads, first_value, values);
    });
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
