// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels over whole sequences share. They walk a sequence in blocks of tokens. Within a block, token i
// sees token j <= i with the weight e^(G_i - G_j), G being the sum of the log decays so far; the state before the block
// has the weight e^G_i, and token j enters the state after it with e^(G_last - G_j). All exponents are differences that
// are not positive. A reset (a log decay of -inf) cuts these triangles into smaller ones, by selection.
//
// Matrix products run over units: numbers, or pairs of bfloat16 (see matmul.h). A product with zero weights would still
// spread NaN and infinity, so a block that holds any goes through products of single rows over exactly what they see.
#pragma once
#include <cmath>

#include "core/tensor.h"
#include "cpu/dtypes.h"
#include "cpu/floats.h"
#include "cpu/matmul.h"
#include "cpu/parallel.h"
#include "lightning_attention/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

template <class Unit>
using ElementOf = std::conditional_t<std::is_same_v<Unit, Pair>, BFloat16, Unit>;
template <class Unit>
inline constexpr int kPack = int(sizeof(Unit) / sizeof(ElementOf<Unit>));

// How numbers of a dtype are multiplied, and where care is needed.
template <class Stored>
using CarefulUnit = std::conditional_t<std::is_same_v<Stored, double>, double, float>;
template <class Stored>
using FastUnit = std::conditional_t<kHasPairs && std::is_same_v<Stored, BFloat16>, Pair, CarefulUnit<Stored>>;

// Tokens of a block. Longer ones spare passes over the state, but triangles grow with their square.
template <class Unit>
inline constexpr int kBlock = kMultipliesTiles<Unit> ? 128 : 64;
inline constexpr int kMaxBlock = 128;

inline constexpr int kAlign = 32;  // sizes are padded to what a tile of pairs takes
constexpr int64_t padded(int64_t size) { return (size + kAlign - 1) / kAlign * kAlign; }
constexpr int64_t row_stride(int64_t size) { return padded(size) + 32; }  // neighbours fall into different cache sets

// ---- decay ----

inline double rate_of(const Tensor& tensor, int64_t i, int64_t j = 0, int64_t k = 0) {
  return tensor.dtype == DType::float64 ? *tensor.at<const double>(i, j, k) : *tensor.at<const float>(i, j, k);
}

template <class Real>
class BlockDecay {
 public:
  int first_reset, last_reset;  // tokens before the first see the state; -1: no reset, all enter the next state
  int first[kMaxBlock];         // the earliest token that token i sees
  int end[kMaxBlock];           // the first token after j that does not see j
  Real from_state[kMaxBlock];   // weight of the state for token i < first_reset
  Real to_state[kMaxBlock];     // weight of token j >= last_reset in the next state
  Real minus_one;               // weight of the state in the next one, less 1; -1 after a reset
  const Real* row(int i) const { return gated ? matrix + i * kMaxBlock : powers + kMaxBlock - 1 - i; }

  void take(Scratch& scratch) {
    matrix = scratch.take<Real>(kMaxBlock * kMaxBlock);
    powers = scratch.take<Real>(2 * kMaxBlock);
  }

  bool resets() const { return last_reset >= 0; }

  // Tokens [0, count) with the log decay -slope each.
  void constant(double slope, int count) {
    gated = false;
    bool forgets = slope == std::numeric_limits<double>::infinity();
    auto power = [&](int distance) {
      return distance == 0 ? Real(1) : forgets ? Real(0) : Real(std::exp(-slope * distance));
    };
    for (int i = 0; i < 2 * kMaxBlock; i++) powers[i] = i < kMaxBlock ? power(kMaxBlock - 1 - i) : Real(0);
    for (int i = 0; i < count; i++) {
      first[i] = forgets ? i : 0;
      end[i] = forgets ? i + 1 : count;
      from_state[i] = power(i + 1);
      to_state[i] = power(count - 1 - i);
    }
    first_reset = forgets ? 0 : count;
    last_reset = forgets ? count - 1 : -1;
    minus_one = forgets ? Real(-1) : Real(std::expm1(-slope * count));
  }

  // Tokens [0, count) with the log decay gate(i) each.
  template <class Gate>
  void gates(const Gate& gate, int count) {
    constexpr double kVanishes = -2000;  // e to this is 0, and finite sums of it keep their precision
    gated = true;
    double sum[kMaxBlock], total = 0;
    first_reset = count, last_reset = -1;
    for (int i = 0; i < count; i++) {
      double g = gate(i);
      if (g == -std::numeric_limits<double>::infinity()) {
        if (first_reset == count) first_reset = i;
        for (int j = std::max(last_reset, 0); j < i; j++) end[j] = i;
        last_reset = i;
      } else {
        total += std::max(g, kVanishes);
      }
      sum[i] = total;
      first[i] = std::max(last_reset, 0);
      from_state[i] = Real(std::exp(total));
    }
    for (int j = 0; j < count; j++) to_state[j] = Real(std::exp(total - sum[j]));
    for (int j = std::max(last_reset, 0); j < count; j++) end[j] = count;
    minus_one = resets() ? Real(-1) : Real(std::expm1(total));
    constexpr int lanes = kLanes<Real>;
    for (int i = 0; i < count; i++) {
      Real exponent[kMaxBlock];
      int filled = (i + lanes) / lanes * lanes;
      for (int j = 0; j < filled; j++) exponent[j] = Real((sum[i] - sum[std::min(j, i)]) * 1.4426950408889634);
      for (int j = 0; j < filled; j += lanes) store(matrix + i * kMaxBlock + j, exp2_vector(load(exponent + j)));
      std::fill(matrix + i * kMaxBlock + filled, matrix + (i + 1) * kMaxBlock, Real(0));
    }
  }

 private:
  bool gated;
  Real *matrix, *powers;  // [i][j]; and e^(-slope (kMaxBlock - 1 - i)) followed by zeros
};

// ---- rows of a tensor ----

// A block's rows of one head as matrix elements, padded with zeros to whole tiles: [padded(tokens)][stride].
template <class Unit>
struct Rows {
  using Element = ElementOf<Unit>;
  Element* data;
  int64_t stride;
  int width;

  void take(Scratch& scratch, int64_t size) {
    width = int(size), stride = row_stride(size);
    data = scratch.take<Element>(kMaxBlock * stride);
  }
  Element* row(int i) const { return data + i * stride; }
  const Unit* units() const { return reinterpret_cast<const Unit*>(data); }
  int64_t unit_stride() const { return stride / kPack<Unit>; }

  // Whether all numbers are finite.
  template <class Stored>
  bool load(const Stored* from, int64_t from_stride, int tokens) {
    bool finite = true;
    int filled = int(padded(width));
    for (int i = 0; i < padded(tokens); i++) {
      Element* to = row(i);
      int count = 0;
      if (i < tokens) {
        count = width;
        convert(from + i * from_stride, to, width);
        finite &= all_finite(to, width);
      }
      std::fill(to + count, to + filled, Element{});
    }
    return finite;
  }

  static bool all_finite(const Element* from, int count) {
    using Bits = std::conditional_t<sizeof(Element) == 2, uint16_t,
                                    std::conditional_t<sizeof(Element) == 4, uint32_t, uint64_t>>;
    constexpr Bits mask = sizeof(Element) == 2   ? Bits(0x7f80)
                          : sizeof(Element) == 4 ? Bits(0x7f800000)
                                                 : Bits(0x7ff0000000000000);
    Bits bad = 0;
    for (int i = 0; i < count; i++) {
      Bits bits;
      std::memcpy(&bits, from + i, sizeof bits);
      bad |= Bits((bits & mask) == mask);
    }
    return bad == 0;
  }
};

// Brings the rows of the next block into the cache while this one is computed: a few between products, because a core
// can wait for no more. They are far apart in memory, so the processor does not do it by itself.
class Ahead {
 public:
  void start(int tokens) { rows = tokens, next = count = 0; }
  void add(const void* first, int64_t row_bytes, int width_bytes) {
    sources[count++] = {static_cast<const char*>(first), row_bytes, width_bytes};
  }
  void step(int more) {
    for (int end = std::min(rows, next + more); next < end; next++)
      for (int i = 0; i < count; i++)
        for (int byte = 0; byte < sources[i].width; byte += 64)
          prefetch(sources[i].first + next * sources[i].stride + byte);
  }

 private:
  struct Source {
    const char* first;
    int64_t stride;
    int width;
  } sources[4];
  int count = 0, rows = 0, next = 0;
};

// Numbers of a head's rows in the tensor's dtype.
template <class Stored>
inline void store_row(const CarefulUnit<Stored>* from, Stored* to, int count) {
  if constexpr (std::is_same_v<Stored, double>) {
    std::copy(from, from + count, to);
  } else {
    constexpr int lanes = kLanes<float>;
    for (int c = 0; c < count; c += lanes) store_float(to + c, load(from + c), std::min(lanes, count - c));
  }
}

// ---- operands ----

// A matrix [K, columns] as the right operand of a product over its rows.
template <class Unit>
struct Right {
  const Unit* data;
  int64_t stride;
};

// Pairs along the rows have to be made, in `to`; other units are there.
template <class Unit, class From>
inline Right<Unit> over_rows(const From* from, int64_t from_row, Unit* to, int64_t rows, int64_t columns) {
  if constexpr (std::is_same_v<Unit, From>) {
    (void)to, (void)rows, (void)columns;
    return {from, from_row};
  } else {
    int64_t stride = row_stride(columns);
    for (int64_t r = 0; r < rows; r += 2)
      interleave_in_order(from + r * from_row, from + (r + 1) * from_row, int(columns), to + r / 2 * stride);
    return {to, stride};
  }
}
template <class Unit>
inline Right<Unit> over_rows(const Rows<Unit>& rows, Unit* to, int tokens) {
  return over_rows<Unit>(rows.data, rows.stride, to, padded(tokens), padded(rows.width));
}

// The transposed rows [width, tokens] as the right operand of a product over their channels.
template <class Unit>
inline Right<Unit> over_channels(const Rows<Unit>& rows, Unit* to, int tokens) {
  int64_t stride = row_stride(kMaxBlock);
  transpose_units(rows.units(), rows.unit_stride(), to, stride, padded(tokens), padded(rows.width) / kPack<Unit>);
  return {to, stride};
}

// Room for either.
template <class Unit>
inline Unit* take_operand(Scratch& scratch, int64_t rows, int64_t columns) {
  return scratch.take<Unit>(padded(rows) * row_stride(columns));
}

// ---- products ----

// Rows of a product that are computed together, when some of its weights are known to be zero.
template <class Unit, bool careful>
inline constexpr int kGroup = careful                  ? 1
                              : kMultipliesTiles<Unit> ? 32
                                                       : kTileM;

// scores[i][j] = left[i] · right[j] for j <= i at least; `channels` counts units.
template <class Unit>
inline void lower_scores(const Rows<Unit>& left, Right<Unit> right, AccumulatorOf<Unit>* scores, int tokens,
                         Ahead& ahead) {
  constexpr int group = kGroup<Unit, false>;
  for (int i = 0; i < tokens; i += group) {
    ahead.step(group / 4);
    int rows = kMultipliesTiles<Unit> ? group : std::min(group, tokens - i);
    int columns = (i + rows + 15) / 16 * 16;
    matmul<false, true>(left.units() + i * left.unit_stride(), left.unit_stride(), right.data, right.stride,
                        scores + i * row_stride(kMaxBlock), row_stride(kMaxBlock), rows, columns,
                        int(padded(left.width)) / kPack<Unit>);
  }
}

// Scores become weights: times `factor` and the decay from j to i where i sees j, else zero. All of [padded, padded].
template <class Real>
inline void weigh(Real* scores, const BlockDecay<Real>& decay, Real factor, int tokens) {
  constexpr int lanes = kLanes<Real>;
  MaskOf<Real> lane;
  for (int c = 0; c < lanes; c++) lane[c] = c;
  int filled = int(padded(tokens));
  for (int i = 0; i < filled; i++, scores += row_stride(kMaxBlock)) {
    int j = 0;
    if (i < tokens) {
      const Real* powers = decay.row(i);
      for (; j <= i; j += lanes) {
        MaskOf<Real> place = lane + j;
        Vector<Real> weight = load(scores + j) * (load(powers + j) * factor);
        store(scores + j, (place >= decay.first[i]) & (place <= i) ? weight : Vector<Real>{});
      }
    }
    for (; j < filled; j += lanes) store(scores + j, Vector<Real>{});
  }
}

// out[i] += sum of weights[i][j] right[j] over the j that token i sees or, `upper`, over those that see it, when
// weights are those of their transpose unless `row_major`.
template <bool upper, bool row_major, bool careful, class Unit, class Real = AccumulatorOf<Unit>>
inline void triangle(const Unit* weights, int64_t stride, Right<Unit> right, Real* out, int64_t out_stride, int columns,
                     int tokens, const BlockDecay<Real>& decay, Ahead& ahead) {
  constexpr int group = kGroup<Unit, careful>, whole = kMultipliesTiles<Unit> ? 32 : kPack<Unit>;
  for (int i = 0; i < tokens; i += group) {
    ahead.step((group + 3) / 4);
    int rows = kMultipliesTiles<Unit> ? group : std::min(group, tokens - i);
    int from = upper ? i : careful ? decay.first[i] : 0;
    int to = !upper ? std::min(i + group, tokens) : careful ? decay.end[i] : tokens;
    from = from / whole * whole / kPack<Unit>, to = (to + whole - 1) / whole * whole / kPack<Unit>;
    matmul<true, row_major>(row_major ? weights + i * stride + from : weights + i + from * stride, stride,
                            right.data + from * right.stride, right.stride, out + i * out_stride, out_stride, rows,
                            columns, to - from);
  }
}

// A product with all rows; tiles need whole groups of 16, and the rows have room for that.
template <bool accumulate, bool row_major = true, class Unit>
inline void multiply(const Unit* left, int64_t stride, Right<Unit> right, AccumulatorOf<Unit>* out, int64_t out_stride,
                     int64_t rows, int64_t columns, int64_t units, Ahead& ahead) {
  constexpr int64_t group = 32;
  for (int64_t i = 0; i < rows; i += group) {
    int64_t part = std::min(group, rows - i);
    ahead.step(int(group) / 4);
    matmul<accumulate, row_major>(left + i * (row_major ? stride : 1), stride, right.data, right.stride,
                                  out + i * out_stride, out_stride,
                                  int(kMultipliesTiles<Unit> ? (part + 15) / 16 * 16 : part), int(columns), int(units));
  }
}

// Rows [from, to) of [tokens][row_stride(width)] times factor[i] * scale, the others zero.
template <class Real>
inline void scale_rows(Real* rows, int64_t width, const Real* factor, Real scale, int from, int to, int tokens) {
  for (int i = 0; i < padded(tokens); i++, rows += row_stride(width)) {
    bool present = i >= from && i < to;
    Real times = present ? factor[i] * scale : 0;
    for (int64_t c = 0; c < padded(width); c += kLanes<Real>)
      store(rows + c, present ? load(rows + c) * times : Vector<Real>{});
  }
}

// ---- states ----

// Keys and values of a block, and how they enter the state: [padded(K)][row_stride(V)], zero beyond K and V.
template <class Unit>
struct KeysAndValues {
  using Real = AccumulatorOf<Unit>;
  using Element = ElementOf<Unit>;
  Rows<Unit> k, v;
  Unit *packed_values, *packed_keys, *turned_keys;

  void take(Scratch& scratch, int64_t key_size, int64_t value_size) {
    k.take(scratch, key_size), v.take(scratch, value_size);
    packed_values = packed_keys = turned_keys = nullptr;
    if (kPack<Unit> == 1) return;
    packed_values = take_operand<Unit>(scratch, kMaxBlock / 2, value_size);
    packed_keys = take_operand<Unit>(scratch, kMaxBlock / 2, key_size);
    turned_keys = take_operand<Unit>(scratch, key_size, kMaxBlock / 2);
  }

  // state += left^T right over tokens [from, tokens); the rows of `left` before are zero.
  static void add_products(const Rows<Unit>& left, Right<Unit> right, Unit* packed, Unit* turned, Real* state,
                           int64_t value_size, int from, int tokens, Ahead& ahead) {
    int64_t rows = left.width, columns = padded(value_size);
    if constexpr (kPack<Unit> == 1) {
      multiply<true, false>(left.units() + from * left.unit_stride(), left.unit_stride(),
                            Right<Unit>{right.data + from * right.stride, right.stride}, state, row_stride(value_size),
                            rows, columns, tokens - from, ahead);
    } else {
      Right<Unit> pairs = over_rows(left, packed, tokens);
      int64_t stride = row_stride(kMaxBlock / 2), count = padded(tokens) / 2;
      transpose_units(pairs.data, pairs.stride, turned, stride, count, padded(rows));
      multiply<true>(turned, stride, right, state, row_stride(value_size), rows, columns, count, ahead);
    }
  }

  // Scales the keys. `right` are the values over_rows.
  void advance(Real* state, Right<Unit> right, const BlockDecay<Real>& decay, int tokens, bool zero, Ahead& ahead) {
    int64_t columns = padded(v.width), stride = row_stride(v.width);
    int from = std::max(decay.last_reset, 0);
    scale_rows(k, decay.to_state, from, tokens);
    for (int64_t c = 0; c < k.width && !zero; c++)
      for (int64_t e = 0; e < columns; e += kLanes<Real>) {
        Vector<Real> value = load(state + c * stride + e);
        store(state + c * stride + e, decay.resets() ? Vector<Real>{} : value * decay.minus_one + value);
      }
    add_products(k, right, packed_keys, turned_keys, state, v.width, from, tokens, ahead);
  }

  // Rows [from, to) times a factor each, the others zero.
  static void scale_rows(Rows<Unit>& rows, const Real* factor, int from, int to) {
    for (int i = 0; i < padded(to); i++) {
      Element* row = rows.row(i);
      if (i < from || i >= to) {
        std::fill(row, row + padded(rows.width), Element{});
      } else if constexpr (std::is_same_v<Element, double>) {
        for (int c = 0; c < rows.width; c++) row[c] *= factor[i];
      } else {
        for (int c = 0; c < padded(rows.width); c += kLanes<float>)
          store_float(row + c, load_float(row + c) * factor[i]);
      }
    }
  }
};

// Walks the state alone over blocks of keys and values.
template <class Stored>
class StateWalk {
  using Real = CarefulUnit<Stored>;
  using Fast = FastUnit<Stored>;

 public:
  void take(Scratch& scratch, int64_t key_size, int64_t value_size) {
    fast.take(scratch, key_size, value_size);
    if constexpr (!std::is_same_v<Fast, Real>) careful.take(scratch, key_size, value_size);
  }

  void advance(Real* state, const Stored* k, int64_t k_stride, const Stored* v, int64_t v_stride,
               const BlockDecay<Real>& decay, int tokens, bool zero) {
    if (try_advance(fast, state, k, k_stride, v, v_stride, decay, tokens, zero)) return;
    if constexpr (!std::is_same_v<Fast, Real>)
      try_advance(careful, state, k, k_stride, v, v_stride, decay, tokens, zero);
  }

 private:
  // Units that are not pairs add products of exactly the tokens that enter the state, whatever the others hold.
  template <class Unit>
  bool try_advance(KeysAndValues<Unit>& kv, Real* state, const Stored* k, int64_t k_stride, const Stored* v,
                   int64_t v_stride, const BlockDecay<Real>& decay, int tokens, bool zero) {
    bool finite = kv.k.load(k, k_stride, tokens);
    finite &= kv.v.load(v, v_stride, tokens);
    if (!finite && kPack<Unit> > 1) return false;
    Ahead nothing;
    kv.advance(state, over_rows(kv.v, kv.packed_values, tokens), decay, tokens, zero, nothing);
    return true;
  }

  KeysAndValues<Fast> fast;
  KeysAndValues<Real> careful;
};

// A state between its tensor [K, V], of which columns [first, first + width) are wanted, and a block's layout.
template <class Real>
inline void load_state(const Tensor& states, int64_t n, int64_t h, int64_t first, int64_t width, int64_t rows,
                       Real* to) {
  std::fill_n(to, padded(rows) * row_stride(width), Real(0));
  if (states)
    for (int64_t c = 0; c < rows; c++)
      convert(states.at<const Real>(n, h, c, first), to + c * row_stride(width), width);
}
template <class Real>
inline void store_state(const Real* from, const Tensor& states, int64_t n, int64_t h, int64_t first, int64_t width,
                        int64_t rows) {
  if (n >= states.size[0]) return;
  for (int64_t c = 0; c < rows; c++) convert(from + c * row_stride(width), states.at<Real>(n, h, c, first), width);
}

// ---- sequences ----

struct Sequence {
  int64_t batch, begin, end;
};

inline Sequence sequence_of(const Tensor& cu_seqlens, int64_t n, int64_t tokens) {
  if (!cu_seqlens) return {n, 0, tokens};
  int64_t begin = std::clamp<int64_t>(cu_seqlens.index(n), 0, tokens);
  return {0, begin, std::clamp<int64_t>(cu_seqlens.index(n + 1), begin, tokens)};
}

inline int64_t sequences(const Tensor& cu_seqlens, int64_t batch) {
  return cu_seqlens ? cu_seqlens.size[0] - 1 : batch;
}

// While it lives, this thread's results below the normal range are zero. Decays get there, and operations on what they
// leave would take a hundred times as long.
class FlushToZero {
#if defined(__SSE__)
 public:
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

template <class Body>
void for_each_item(int64_t items, int64_t cost, const Body& body) {
  parallel_for(items, cost, [&](int64_t i) {
    [[maybe_unused]] FlushToZero flush;
    body(i);
  });
}

// Calls body(i, first value, values) for i in [0, items), all of one head each. Columns of values are independent of
// each other: where heads are fewer than threads, several share a head.
template <class Body>
void for_each_part(int64_t items, int64_t values, int64_t cost, const Body& body) {
  int64_t threads = omp_get_max_threads();
  int64_t parts = items == 0 || items >= threads ? 1 : std::min((threads + items - 1) / items, padded(values) / kAlign);
  int64_t width = padded((values + parts - 1) / parts);
  parts = (values + width - 1) / width;
  for_each_item(items * parts, cost / parts, [&](int64_t i) {
    int64_t first = i % parts * width;
    body(i / parts, first, std::min(width, values - first));
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
