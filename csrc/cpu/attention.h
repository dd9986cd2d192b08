// SPDX-License-Identifier: Apache-2.0
// Online softmax over key tiles, the core of every CPU attention kernel.
//
// Scores are computed transposed: vectors run along query rows, so maxima and sums never need a horizontal reduction,
// and the keys of a tile are read from the cache as they lie. For a block of query rows:
//   scores[key, row] = keys[key, :] · queries[:, row]         queries are packed once
//   out[row, channel] += weights[:, row]^T · values[:, channel]
// Few rows do not fill a vector. Then those of several key/value heads share it: a lane is a row of one head. Each head
// has products of its own, so nothing gets from one to another.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/key_tiles.h"
#include "cpu/matmul.h"
#include "cpu/parallel.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

inline constexpr int kRowBlock = 64;  // lanes whose scores and outputs stay in cache together
inline constexpr int kRowAlign = 16;
inline constexpr double kLog2E = 1.4426950408889634;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// How a query dtype is multiplied. Pairs need K in whole 32s: the tile unit eats that many at once.
template <class Query>
struct Arithmetic {
  using Element = float;
  using Unit = float;
  static constexpr int kPack = 1, kChannelAlign = 1, kKeyAlign = 1;
};
template <>
struct Arithmetic<double> {
  using Element = double;
  using Unit = double;
  static constexpr int kPack = 1, kChannelAlign = 1, kKeyAlign = 1;
};
#if defined(__AVX512BF16__)
template <>
struct Arithmetic<BFloat16> {
  using Element = BFloat16;
  using Unit = Pair;
  static constexpr int kPack = 2, kChannelAlign = 32, kKeyAlign = 32;
};
#endif

// Which lanes see a key of a tile: a vector of masks for lanes [row, row + kLanes). keys() says how many of a tile's
// `count` keys any of the lanes [row, row + width) may see.
struct EverythingVisible {
  static constexpr bool kMasks = false;
  int keys(int, int, int count) const { return count; }
};

// A key for each lane, counted within the tile.
struct Borders {
  static constexpr bool kMasks = true;
  const int32_t* border;

  template <class Real>
  MaskOf<Real> of_lanes(int row) const {
    MaskOf<Real> borders;
    if constexpr (sizeof(Real) == sizeof *border) {
      std::memcpy(&borders, border + row, sizeof borders);
    } else {
      for (int i = 0; i < kLanes<Real>; i++) borders[i] = border[row + i];
    }
    return borders;
  }
};

// Row r sees the keys from border[r] on.
struct VisibleFrom : Borders {
  bool sees(int key, int row) const { return key >= border[row]; }
  int keys(int, int, int count) const { return count; }
  template <class Real>
  MaskOf<Real> lanes(int key, int row) const {
    return key >= of_lanes<Real>(row);
  }
};

// Row r sees the keys before border[r].
struct VisibleBefore : Borders {
  bool sees(int key, int row) const { return key < border[row]; }
  int keys(int row, int width, int count) const {
    return std::clamp(*std::max_element(border + row, border + row + width), 0, count);
  }
  template <class Real>
  MaskOf<Real> lanes(int key, int row) const {
    return key < of_lanes<Real>(row);
  }
};

// Row r sees key k if bit r of the key's bit row is set.
struct VisibleBits {
  static constexpr bool kMasks = true;
  const uint64_t* bits;  // [keys, words]
  int64_t words;

  int keys(int, int, int count) const { return count; }
  uint64_t word(int key, int row) const { return bits[key * words + row / 64] >> (row % 64); }
  bool sees(int key, int row) const { return word(key, row) & 1; }
  template <class Real>
  MaskOf<Real> lanes(int key, int row) const {
    MaskOf<Real> bit;
    for (int i = 0; i < kLanes<Real>; i++) bit[i] = 1 << i;
    uint64_t rows = word(key, row);
    return (bit & int(rows & 0xffff)) != 0;
  }
};

// The running softmax of `rows` query rows of each of a few neighbouring key/value heads.
template <class Query>
struct SoftmaxRows {
  using Element = typename Arithmetic<Query>::Element;
  using Unit = typename Arithmetic<Query>::Unit;
  using Real = AccumulatorOf<Unit>;
  static constexpr int kPack = Arithmetic<Query>::kPack, kLane = kLanes<Real>;
  static constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  // The running maximum moves only when a score passes it by this factor (in powers of two), which spares rescaling the
  // output.
  static constexpr Real kSlack = 8;

  // One cache line beyond a row, so that neighbouring rows fall into different cache sets.
  static constexpr int kSpare = 64 / int(sizeof(Unit)), kWeightStride = kKeyTile / kPack + kSpare;

  int heads, rows, channels, padded_channels, value_channels, padded_value_channels;
  int head_lanes;        // row r of head h is lane h * head_lanes + r; several heads fit into one block of lanes
  int padded_lanes;      // of all heads
  Unit* queries;         // [head][block][padded_channels / kPack][block_rows()]
  Real* out;             // [heads * head_lanes][padded_value_channels], each row in the order of out_column()
  Real* maximum_score;   // [padded_lanes], in powers of two
  Real* sum;             // [padded_lanes]
  Real* scale;           // [padded_lanes]
  Real* scores;          // [kKeyTile][width()], later the weights when a unit is one Real
  Unit* weights;         // [kKeyTile / kPack][width()]
  Unit* weights_by_row;  // [width()][kWeightStride]
  Unit* value_pairs;     // [heads][value_step() / kPack][pair_stride()]
  Element* key_tiles;    // [heads][kKeyTile][key_stride()]
  Element* value_tiles;  // [heads][kKeyTile][value_stride()]

  SoftmaxRows(int heads, int rows, int channels, int value_channels)
      : heads(heads),
        rows(rows),
        channels(channels),
        padded_channels(int(round_up(channels, Arithmetic<Query>::kChannelAlign))),
        value_channels(value_channels),
        padded_value_channels(int(round_up(value_channels, kPack > 1 ? 32 : 16))),
        head_lanes(lanes_of(rows)),
        padded_lanes(int(round_up(heads * head_lanes, kRowAlign))) {}

  static int lanes_of(int rows) { return rows <= kRowAlign ? rows : int(round_up(rows, kRowAlign)); }

  int64_t state_size() const { return int64_t(heads) * head_lanes * padded_value_channels + 2 * padded_lanes; }

  // A vector of queries may reach beyond the last row.
  int64_t queries_size() const { return int64_t(heads) * head_lanes * padded_channels / kPack + kRowAlign; }

  // The state is what survives the tiles: out, maximum and sum.
  void use_state(Real* state) {
    out = state;
    maximum_score = out + int64_t(heads) * head_lanes * padded_value_channels;
    sum = maximum_score + padded_lanes;
  }

  void take(Scratch& scratch) {
    scale = scratch.take<Real>(padded_lanes);
    scores = scratch.take<Real>(kKeyTile * kRowBlock + kRowAlign);
    weights = kPack > 1 ? scratch.take<Unit>(kKeyTile / kPack * kRowBlock) : nullptr;
    weights_by_row = kMultipliesTiles<Unit> ? scratch.take<Unit>(kWeightStride * kRowBlock) : nullptr;
    value_pairs = kPack > 1 ? scratch.take<Unit>(heads * value_step() / kPack * pair_stride()) : nullptr;
    key_tiles = scratch.take<Element>(heads * kKeyTile * key_stride());
    value_tiles = scratch.take<Element>(heads * kKeyTile * value_stride());
  }

  Real* out_row(int head, int row) const { return out + (int64_t(head) * head_lanes + row) * padded_value_channels; }

  void scale_output(int head, Real factor) {
    Real* from = out_row(head, 0);
    for (int64_t i = 0; i < int64_t(head_lanes) * padded_value_channels; i++) from[i] *= factor;
  }

  void set_scale(int head, Real value) { std::fill_n(scale + head * head_lanes, head_lanes, value); }

  int64_t key_stride() const { return padded_channels + 64 / int64_t(sizeof(Element)); }
  int64_t value_stride() const { return padded_value_channels + 64 / int64_t(sizeof(Element)); }

  // Of the block of lanes from `block` on: rows per head, and lanes of all heads.
  int block_rows(int block) const { return std::min(kRowBlock, head_lanes - block); }
  int width(int block) const { return std::min(kRowBlock, padded_lanes - block); }

  void reset() {
    std::fill_n(out, int64_t(heads) * head_lanes * padded_value_channels, Real(0));
    std::fill_n(maximum_score, padded_lanes, -kInfinity);
    std::fill_n(sum, padded_lanes, Real(0));
    std::fill_n(scale, padded_lanes, Real(1));
    std::fill_n(scores, kKeyTile * kRowBlock, Real(0));  // lanes of no row are computed, too
  }

  const Unit* queries_of(int head, int block) const {
    return queries + (int64_t(head) * head_lanes + block) * padded_channels / kPack;
  }

  // row(h, r) points at query row r of head h, whose channels are `stride` apart.
  template <class RowPointer>
  void pack_queries(const RowPointer& row, int64_t stride) {
    std::fill_n(queries, queries_size(), Unit{});
    for (int h = 0; h < heads; h++)
      for (int r = 0; r < rows; r++) {
        int block = r / kRowBlock * kRowBlock, block_width = block_rows(block);
        const Query* from = row(h, r);
        Element* to = reinterpret_cast<Element*>(const_cast<Unit*>(queries_of(h, block))) + (r - block) * kPack;
        for (int c = 0; c < channels; c++)
          convert(from + c * stride, to + (c / kPack * int64_t(block_width)) * kPack + c % kPack, 1);
      }
  }

  // Packs up to 16 rows of a head from row `first`, a multiple of 16, on. Those are `stride` elements apart, in memory
  // for 16 of them, and zero from `count` and from channel `channels` on.
  void pack_rows(int head, int first, int count, const Element* from, int64_t stride) {
    int block = first / kRowBlock * kRowBlock, block_width = block_rows(block);
    Unit* to = const_cast<Unit*>(queries_of(head, block)) + (first - block);
    const Unit* units = reinterpret_cast<const Unit*>(from);
    int64_t row_units = stride / kPack;
#if defined(__AVX512BW__)
    if constexpr (kPack > 1) {
      if (head_lanes % kRowAlign == 0) {
        for (int c = 0; c < padded_channels / kPack; c += kRowAlign)
          transpose(units + c, row_units, to + int64_t(c) * block_width, block_width);
        return;
      }
    }
#endif
    for (int r = 0; r < count; r++)
      for (int c = 0; c < padded_channels / kPack; c++) to[int64_t(c) * block_width + r] = units[r * row_units + c];
  }

  // Joins the states of `count` splits, state_of(0 .. count - 1), in this order. sink(lane) is a logit more, in powers
  // of two; write(head, row, out, lse) gets each row.
  template <class StateOf, class Sink, class Write>
  void merge(int count, const StateOf& state_of, const Sink& sink, const Write& write) {
    int channels = padded_value_channels;
    static thread_local Scratch::Block block;
    Real *weight, *result;
    Scratch::plan(block, [&](Scratch& scratch) {
      weight = scratch.take<Real>(count * kLane);
      result = scratch.take<Real>(channels);
    });
    for (int first = 0; first < padded_lanes; first += kLane) {
      auto exists = [&](int i) { return first + i < heads * head_lanes && (first + i) % head_lanes < rows; };
      Vector<Real> highest;
      for (int i = 0; i < kLane; i++) highest[i] = exists(i) ? sink(first + i) : -kInfinity;
      Vector<Real> sinks = highest;
      for (int s = 0; s < count; s++) {
        use_state(state_of(s));
        highest = maximum(highest, load(maximum_score + first));
      }
      Vector<Real> base = highest == -kInfinity ? Vector<Real>{} : highest, total = exp2_vector(sinks - base);
      for (int s = 0; s < count; s++) {
        use_state(state_of(s));
        Vector<Real> w = exp2_vector(load(maximum_score + first) - base);
        store(weight + s * kLane, w);
        total += w * load(sum + first);
      }
      Vector<Real> inverse = 1 / total;
      for (int i = 0; i < kLane; i++) {
        if (!exists(i)) continue;
        int head = (first + i) / head_lanes, row = (first + i) % head_lanes;
        for (int s = 0; s < count; s++) {
          use_state(state_of(s));
          const Real *from = out_row(head, row), w = weight[s * kLane + i], last = s + 1 < count ? 1 : inverse[i];
          for (int c = 0; c < channels; c += kLane) {
            Vector<Real> so_far = s > 0 ? load(result + c) : Vector<Real>{};
            store(result + c, (so_far + load(from + c) * w) * last);
          }
        }
        if constexpr (kPack > 1) restore_order(result, channels);
        write(head, row, result, double(base[i]) * 0.69314718055994531 + std::log(double(total[i])));
      }
    }
  }

  // Fetches keys [first, first + count) and their values from the sources, which are those of the first head. A tile
  // stays where it lies if each of its lines will be read once; otherwise it is copied, because cache rows are often a
  // large power of two apart and would compete for the same few lines of the processor's caches.
  struct Tiles {
    Tile keys, values;
    Ahead ahead;
  };
  void load_tiles(Tiles& tiles, const RowSource& keys, const RowSource& values, int64_t first, int count, bool masked) {
    constexpr int kReadOnceRows = 32;
    int padded_count = int(round_up(count, Arithmetic<Query>::kKeyAlign));
    auto lies_ready = [&](const RowSource& source) {
      return kPack > 1 && source.tensor.dtype == DType::bfloat16 && source.tensor.stride[3] == 1;
    };
    bool keys_stay = lies_ready(keys) && head_lanes <= kReadOnceRows && count == kKeyTile &&
                     channels == padded_channels && keys.run() % 16 == 0;
    if (keys_stay) {
      tiles.keys.stay(keys, first, count);
    } else {
      gather(keys, heads, first, count, padded_count, channels, padded_channels, key_tiles, key_stride());
      tiles.keys.copied(key_tiles, key_stride() * sizeof(Element), padded_count);
    }
    if (lies_ready(values) && !masked) {
      tiles.values.stay(values, first, count);
    } else {
      gather(values, heads, first, count, padded_count, value_channels, padded_value_channels, value_tiles,
             value_stride());
      tiles.values.copied(value_tiles, value_stride() * sizeof(Element), padded_count);
    }
    int next = int(std::clamp<int64_t>(keys.slots - first - count, 0, kKeyTile));
    tiles.ahead.heads = heads;
    tiles.ahead.key_bytes = keys_stay ? 0 : int(channels * keys.element_size());
    tiles.ahead.value_bytes = int(value_channels * values.element_size());
    tiles.ahead.keys.stay(keys, first + count, next);
    tiles.ahead.values.stay(values, first + count, next);
  }

  // Adds the `count` keys of a tile to every row. Scores are scale · q·k, capped at ±softcap if that is not 0.
  template <class Visible>
  void absorb(Tiles& tiles, int count, Real softcap, const Visible& visible, MatmulSession& session) {
    auto padded = [](int keys) { return int(round_up(keys, Arithmetic<Query>::kKeyAlign)); };
    int tile_rows = std::min(head_lanes, kRowAlign);
    tiles.ahead.start(padded_lanes / kLane * padded(count) / kPack);
    nonfinite.clear();
    if constexpr (Visible::kMasks) take_nonfinite(count);
    bool paired = false;
    for (int block = 0; block < head_lanes; block += kRowBlock) {
      int seen = visible.keys(block, width(block), count), padded_seen = padded(seen);
      if (seen == 0) continue;
      session.shape(kRowAlign, tile_rows);
      multiply_keys(tiles, block, padded_seen);
      softmax(block, seen, padded_seen, softcap, visible, tiles.ahead);
      session.shape(tile_rows, kRowAlign);
      // With several blocks, one step is the whole tile.
      if (!few_rows() && !paired) pair_values(tiles, 0, padded(count), count), paired = true;
      for (int key = 0; key < padded_seen; key += value_step()) {
        int step = std::min(value_step(), padded_seen - key);
        if (few_rows()) pair_values(tiles, key, step, count);
        for (int h = 0; h < heads; h++) add_values(h, block, key, step);
      }
      if constexpr (Visible::kMasks) {
        for (auto [head, key, column, value] : nonfinite)
          for (int r = 0; r < block_rows(block); r++)
            if (visible.sees(key, head * head_lanes + block + r)) out_row(head, block + r)[column] += value;
      }
    }
  }

  // A few keys go through all heads at a time: memory is then read in the order in which it lies, and from few pages.
  void multiply_keys(const Tiles& tiles, int block, int padded_count) {
    const Tile& keys = tiles.keys;
    int run = std::min(keys.run, heads > 1 ? 16 : 32);
    for (int key = 0; key < padded_count; key += run)
      for (int h = 0; h < heads; h++)
        matmul<false, true>(reinterpret_cast<const Unit*>(keys.row(key, h)), keys.stride / sizeof(Unit),
                            queries_of(h, block), block_rows(block), scores + key * width(block) + h * head_lanes,
                            width(block), std::min(run, padded_count - key), block_rows(block),
                            padded_channels / kPack);
  }

  int64_t pair_stride() const { return padded_value_channels + kSpare; }
  bool few_rows() const { return head_lanes <= kRowAlign; }
  int value_step() const { return few_rows() ? 32 : kKeyTile; }
  Unit* value_pairs_of(int head) const { return value_pairs + head * value_step() / kPack * pair_stride(); }

  // Values of keys [first, first + step) as pairs; those from key `count` on are zero.
  void pair_values(const Tiles& tiles, int first, int step, int count) {
    if constexpr (kPack > 1) {
      static const Element zeros[256] = {};
      for (int key = first; key < first + step; key += 2)
        for (int h = 0; h < heads; h++) {
          if (few_rows()) tiles.ahead.fetch(key, h), tiles.ahead.fetch(key + 1, h);
          auto row = [&](int key) {
            return key < count ? reinterpret_cast<const Element*>(tiles.values.row(key, h)) : zeros;
          };
          interleave(row(key), row(key + 1), value_channels, value_pairs_of(h) + (key - first) / 2 * pair_stride());
        }
    }
  }

  void add_values(int head, int block, int first, int step) {
    const Unit *left, *right;
    int64_t left_stride = width(block), right_stride = pair_stride();
    int lane = head * head_lanes, pair = first / kPack;
    if constexpr (kPack == 1) {
      left = scores + pair * left_stride + lane;
      right_stride = value_stride();
      right = value_tiles + (int64_t(head) * kKeyTile + first) * right_stride;
    } else {
      right = value_pairs_of(head);
      if constexpr (kMultipliesTiles<Unit>) {
        left_stride = kWeightStride;
        left = weights_by_row + lane * left_stride + pair;
      } else {
        left = weights + pair * left_stride + lane;
      }
    }
    matmul<true, kMultipliesTiles<Unit>>(left, left_stride, right, right_stride, out_row(head, block),
                                         padded_value_channels, block_rows(block), padded_value_channels, step / kPack);
  }

  // Turns the block's scores into weights 2^(score - maximum) and moves its maximum, sum and output along.
  template <class Visible>
  void softmax(int block, int count, int padded_count, Real softcap, const Visible& visible, Ahead& ahead) {
    int width = this->width(block);
    for (int c = 0; c < width; c += kLane) {
      // A scale that may turn the order of scores around is applied before the maximum is taken.
      Vector<Real> factor = load(scale + block + c), first = broadcast(Real(1)), to_log2 = factor * Real(kLog2E);
      if (softcap > 0) {
        first = factor / softcap, to_log2 = broadcast(softcap * Real(kLog2E));
      } else {
        first = factor <= 0 ? factor : first, to_log2 = factor <= 0 ? broadcast(Real(kLog2E)) : to_log2;
      }
      bool rewrite = softcap > 0 || any(factor <= 0);
      auto score = [&](int key) {
        Real* at = scores + key * width + c;
        Vector<Real> s = load(at);
        if (rewrite) s = softcap > 0 ? tanh_vector(s * first) : s * first;
        if constexpr (Visible::kMasks) s = visible.template lanes<Real>(key, block + c) ? s : broadcast(-kInfinity);
        if (rewrite || Visible::kMasks) store(at, s);
        return s;
      };
      Vector<Real> highest[4];  // several, so that none has to wait for the one before
      for (Vector<Real>& h : highest) h = broadcast(-kInfinity);
      int key = 0;
      for (; key + 4 <= count; key += 4)
        for (int i = 0; i < 4; i++) highest[i] = maximum(highest[i], score(key + i));
      for (; key < count; key++) highest[0] = maximum(highest[0], score(key));
      highest[0] = maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3]));

      Vector<Real> before = load(maximum_score + block + c), after = highest[0] * to_log2;
      after = after > before + kSlack ? after : before;
      Vector<Real> base = after == -kInfinity ? Vector<Real>{} : after;
      Vector<Real> total = load(sum + block + c);
      if (any(after != before)) {
        Vector<Real> shrink = exp2_vector(before - base);
        total *= shrink;
        for (int i = 0; i < std::min(kLane, heads * head_lanes - block - c); i++) {
          Real* row = out + int64_t(block + c + i) * padded_value_channels;
          if (shrink[i] != 1)
            for (int d = 0; d < padded_value_channels; d++) row[d] *= shrink[i];
        }
        store(maximum_score + block + c, after);
      }
      Vector<Real> tile_total{};
      auto weight = [&](int key) {
        Vector<Real> w = exp2_vector(load(scores + key * width + c) * to_log2 - base);
        tile_total += w;
        return w;
      };
      if constexpr (kPack == 1) {
        for (int key = 0; key < count; key++) {
          ahead.step();
          store(scores + key * width + c, weight(key));
        }
      } else {
        auto put = [&](int key, Vector<Real> low, Vector<Real> high) {
          store_pairs(weights + key / 2 * width + c, low, high);
        };
        int key = 0;
        for (; key + 2 <= count; key += 2) {
          if (!few_rows()) ahead.step();
          Vector<Real> low = weight(key), high = weight(key + 1);
          put(key, low, high);
        }
        if (key < count) put(key, weight(key), Vector<Real>{}), key += 2;
        for (; key < padded_count; key += 2) put(key, Vector<Real>{}, Vector<Real>{});
      }
      if constexpr (kMultipliesTiles<Unit>) {
        for (int pair = 0; pair < padded_count / kPack; pair += 16)
          transpose(weights + pair * width + c, width, weights_by_row + c * kWeightStride + pair, kWeightStride);
      }
      store(sum + block + c, total + tile_total);
    }
  }

  static bool any(MaskOf<Real> mask) {
    uint64_t words[kVectorBytes / 8], all = 0;
    std::memcpy(words, &mask, sizeof words);
    for (uint64_t word : words) all |= word;
    return all != 0;
  }

  // Non-negative floats to bfloat16 pairs (low, high), half away from zero.
  static void store_pairs(Pair* to, Vector<float> low, Vector<float> high) {
    using Bits = Vector<uint32_t>;
    Bits l = bit_cast_vector<Bits>(low) + 0x8000u, h = bit_cast_vector<Bits>(high) + 0x8000u;
    Bits both = (l >> 16) | (h & 0xffff0000u);
    std::memcpy(to, &both, sizeof both);
  }
  static void store_pairs(float*, Vector<float>, Vector<float>) {}
  static void store_pairs(double*, Vector<double>, Vector<double>) {}

  // A weight of zero must hide a value even if that is NaN or infinite. So under a mask such values leave the product,
  // and absorb() adds them one by one to the rows that see them.
  void take_nonfinite(int count) {
    for (int h = 0; h < heads; h++)
      for (int key = 0; key < count; key++) {
        Element* row = value_tiles + (int64_t(h) * kKeyTile + key) * value_stride();
        if (all_finite(row, value_channels)) continue;
        for (int c = 0; c < value_channels; c++)
          if (!is_finite(row[c])) nonfinite.push_back({h, key, out_column(c), to_float(row[c])}), row[c] = Element{};
      }
  }

  static int out_column(int channel) {
    if constexpr (kPack > 1) return interleaved_place(channel);
    return channel;
  }

  struct NonfiniteValue {
    int head, key, column;
    Real value;
  };
  std::vector<NonfiniteValue> nonfinite;
};

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
