// SPDX-License-Identifier: Apache-2.0
// Online softmax over key tiles, the core of every CPU attention kernel.
//
// Everything is computed transposed: vectors run along query rows, so scores, maxima and sums never need a horizontal
// reduction, and the keys of a tile are read from the cache as they lie. For a block of query rows:
//   scores[key, row] = keys[key, :] · queries[:, row]         queries are packed once
//   out[channel, row] += values^T[channel, :] · weights[:, row]
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "core/tensor.h"
#include "cpu/matmul.h"
#include "cpu/parallel.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

inline constexpr int kKeyTile = 128;  // keys that share one pass over the query rows
inline constexpr int kRowBlock = 64;  // query rows whose scores and outputs stay in cache together
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

// Rows of keys or values of one head, found by slot: contiguous in a cache, scattered over pages, or the tree's own.
struct RowSource {
  Tensor tensor;       // [B, S, H, D] or pages [P, page, H, D]
  Tensor block_table;  // [B, pages] or absent
  int64_t batch, head;
  int64_t slots;  // how many there are

  int64_t element_size() const { return size_of(tensor.dtype); }
  const char* address(int64_t slot) const {
    int64_t outer = batch;
    if (block_table) {
      int64_t page_size = tensor.size[1];
      outer = std::clamp<int64_t>(block_table.index(batch, slot / page_size), 0, tensor.size[0] - 1);
      slot %= page_size;
    }
    return tensor.at<const char>() +
           (outer * tensor.stride[0] + slot * tensor.stride[1] + head * tensor.stride[2]) * element_size();
  }
  template <class T>
  const T* row(int64_t slot) const {
    return reinterpret_cast<const T*>(address(slot));
  }

  // Of any tile, at least this many rows in a row are stride[1] apart.
  int run() const { return block_table ? int(std::gcd(tensor.size[1], int64_t(kKeyTile))) : kKeyTile; }
};

// Copies a tile's rows of `heads` neighbouring heads to `to` [heads][kKeyTile][stride] as matrix elements, zero-padded.
template <class Stored, class Element>
void gather_stored(const RowSource& source, int heads, int64_t first, int count, int padded_count, int width,
                   int padded_width, Element* to, int64_t stride) {
  int64_t step = source.tensor.stride[3], next_head = source.tensor.stride[2];
  for (int i = 0; i < padded_count; i++) {
    const Stored* row = i < count ? source.row<Stored>(first + i) : nullptr;
    for (int h = 0; h < heads; h++) {
      Element* copy = to + (int64_t(h) * kKeyTile + i) * stride;
      int copied = row ? width : 0;
      if (row && step == 1) {
        convert(row + h * next_head, copy, width);
      } else if (row) {
        for (int c = 0; c < width; c++) convert(row + h * next_head + c * step, copy + c, 1);
      }
      if (padded_width > copied) std::fill(copy + copied, copy + padded_width, Element{});
    }
  }
}

template <class Element>
void gather(const RowSource& source, int heads, int64_t first, int count, int padded_count, int width, int padded_width,
            Element* to, int64_t stride) {
  auto as = [&]<class Stored>(Stored) {
    gather_stored<Stored>(source, heads, first, count, padded_count, width, padded_width, to, stride);
  };
  switch (source.tensor.dtype) {
    case DType::float64: return as(double{});
    case DType::float16: return as(Half{});
    case DType::bfloat16: return as(BFloat16{});
    case DType::int8: return as(int8_t{});
    case DType::float8_e4m3: return as(Float8E4M3{});
    default: return as(float{});
  }
}

// Where the rows of a tile are, by key and head: in the cache itself, or copied.
struct Tile {
  const char* start[kKeyTile];  // of each run of `run` rows, a power of two, that are `stride` bytes apart
  int64_t stride, next_head;
  int run, log2_run, count = 0;

  const char* row(int key, int head) const {
    return start[key >> log2_run] + (key & (run - 1)) * stride + head * next_head;
  }

  void stay(const RowSource& source, int64_t first, int tile_count) {
    count = tile_count;
    run = source.run(), log2_run = std::countr_zero(unsigned(run));
    stride = source.tensor.stride[1] * source.element_size();
    next_head = source.tensor.stride[2] * source.element_size();
    for (int key = 0; key < count; key += run) start[key >> log2_run] = source.address(first + key);
  }
  void copied(const void* tiles, int64_t tile_stride, int tile_count) {
    count = tile_count;
    run = kKeyTile, log2_run = std::countr_zero(unsigned(run)), stride = tile_stride,
    next_head = kKeyTile * tile_stride;
    start[0] = static_cast<const char*>(tiles);
  }
};

// Brings the tile after this one into the cache while this one is computed: a few rows with each call, because a core
// can wait for few lines at a time. The softmax calls every kKeysPerFetch keys, in both of its passes.
inline constexpr int kKeysPerFetch = 4;
struct Ahead {
  Tile keys, values;
  int key_bytes, value_bytes, head, at, each;

  void start(int next_head, int calls) { head = next_head, at = 0, each = 2 * keys.count / std::max(1, calls) + 1; }
  void fetch() {
    for (int end = std::min(at + each, 2 * keys.count); at < end; at++) {
      bool key = at < keys.count;
      const char* row = key ? keys.row(at, head) : values.row(at - keys.count, head);
      for (int c = 0, bytes = key ? key_bytes : value_bytes; c < bytes; c += 64) prefetch(row + c);
    }
  }
};

// Which query rows see a key of a tile: a vector of lane masks for rows [row, row + lanes).
struct EverythingVisible {
  static constexpr bool kMasks = false;
};

template <class Real>
using MaskOf = decltype(Vector<Real>{} == Vector<Real>{});

// Row r sees the keys from first_visible[r] on (counted within the tile).
struct VisibleFrom {
  static constexpr bool kMasks = true;
  const int32_t* first_visible;

  bool sees(int key, int row) const { return key >= first_visible[row]; }
  template <class Real>
  MaskOf<Real> lanes(int key, int row) const {
    MaskOf<Real> first;
    if constexpr (sizeof(Real) == sizeof *first_visible) {
      std::memcpy(&first, first_visible + row, sizeof first);
    } else {
      for (int i = 0; i < kLanes<Real>; i++) first[i] = first_visible[row + i];
    }
    return key >= first;
  }
};

// Row r sees key k if bit r of the key's bit row is set.
struct VisibleBits {
  static constexpr bool kMasks = true;
  const uint64_t* bits;  // [keys, words]
  int64_t words;

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

// The running softmax of `rows` query rows of one key/value head.
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

  int rows, padded_rows, channels, padded_channels, value_channels, padded_value_channels;
  Unit* queries;              // [row block][padded_channels / kPack][block rows]
  Real* out;                  // [row block][padded_value_channels][block rows]
  Real* maximum;              // [padded_rows], in powers of two
  Real* sum;                  // [padded_rows]
  Real* scores;               // [kKeyTile][kRowBlock], later the weights when a unit is one Real
  Unit* weights;              // [kKeyTile / kPack][kRowBlock]
  Element* key_tiles;         // [heads][kKeyTile][key_stride()]
  Element* value_tiles;       // [heads][kKeyTile][value_stride()]
  Element* value_transposed;  // [round_up(value_channels, 32)][kKeyTile]

  SoftmaxRows(int rows, int channels, int value_channels)
      : rows(rows),
        padded_rows(int(round_up(rows, kRowAlign))),
        channels(channels),
        padded_channels(int(round_up(channels, Arithmetic<Query>::kChannelAlign))),
        value_channels(value_channels),
        padded_value_channels(int(round_up(value_channels, kPack > 1 ? 16 : 1))) {}

  int64_t state_size() const { return int64_t(padded_rows) * (padded_value_channels + 2); }

  int64_t queries_size() const { return int64_t(padded_rows) * padded_channels / kPack; }

  // The state is what survives the tiles: out, maximum and sum.
  void use_state(Real* state) {
    out = state;
    maximum = out + int64_t(padded_rows) * padded_value_channels;
    sum = maximum + padded_rows;
  }

  void take(Scratch& scratch, int heads) {
    scores = scratch.take<Real>(kKeyTile * kRowBlock);
    weights = kPack > 1 ? scratch.take<Unit>(kKeyTile / kPack * kRowBlock) : nullptr;
    key_tiles = scratch.take<Element>(heads * kKeyTile * key_stride());
    value_tiles = scratch.take<Element>(heads * kKeyTile * value_stride());
    value_transposed = kPack > 1 ? scratch.take<Element>(kKeyTile * round_up(value_channels, 32)) : nullptr;
  }

  void scale_output(Real factor) {
    for (int64_t i = 0; i < int64_t(padded_rows) * padded_value_channels; i++) out[i] *= factor;
  }

  // One cache line beyond a row, so that neighbouring rows fall into different cache sets.
  int64_t key_stride() const { return padded_channels + 64 / int64_t(sizeof(Element)); }
  int64_t value_stride() const { return padded_value_channels + 64 / int64_t(sizeof(Element)); }

  int block_rows(int block) const { return std::min(kRowBlock, padded_rows - block); }

  void reset() {
    std::fill(out, out + int64_t(padded_rows) * padded_value_channels, Real(0));
    std::fill(maximum, maximum + padded_rows, -kInfinity);
    std::fill(sum, sum + padded_rows, Real(0));
  }

  // row(r) points at query row r, whose channels are `stride` apart.
  template <class RowPointer>
  void pack_queries(const RowPointer& row, int64_t stride) {
    Element* packed = reinterpret_cast<Element*>(queries);
    std::fill(packed, packed + int64_t(padded_rows) * padded_channels, Element{});
    for (int r = 0; r < rows; r++) {
      int block = r / kRowBlock * kRowBlock, width = block_rows(block);
      const Query* from = row(r);
      Element* to = packed + int64_t(block) * padded_channels + (r - block) * kPack;
      for (int c = 0; c < channels; c++)
        convert(from + c * stride, to + (c / kPack * int64_t(width)) * kPack + c % kPack, 1);
    }
  }

  // Fetches keys [first, first + count) and their values for `heads` heads from those of the sources on. A tile stays
  // where it lies if each of its lines will be read once; otherwise it is copied, because cache rows are often a large
  // power of two apart and would compete for the same few lines of the processor's caches.
  struct Tiles {
    Tile keys, values;
    Ahead ahead;
  };
  void load_tiles(Tiles& tiles, const RowSource& keys, const RowSource& values, int heads, int64_t first, int count,
                  bool masked) {
    constexpr int kReadOnceRows = 32;
    int padded_count = int(round_up(count, Arithmetic<Query>::kKeyAlign));
    auto lies_ready = [&](const RowSource& source) {
      return kPack > 1 && source.tensor.dtype == DType::bfloat16 && source.tensor.stride[3] == 1;
    };
    if (lies_ready(keys) && padded_rows <= kReadOnceRows && count == kKeyTile && channels == padded_channels &&
        keys.run() % 16 == 0) {
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
    tiles.ahead.key_bytes = int(channels * keys.element_size());
    tiles.ahead.value_bytes = int(value_channels * values.element_size());
    tiles.ahead.keys.stay(keys, first + count, next);
    tiles.ahead.values.stay(values, first + count, next);
  }

  // Adds the `count` keys of tile `head` to every row. Scores are scale · q·k, capped at ±softcap if that is not 0.
  template <class Visible>
  void absorb(Tiles& tiles, int head, int count, Real scale, Real softcap, const Visible& visible) {
    const Tile &keys = tiles.keys, &values = tiles.values;
    Ahead& ahead = tiles.ahead;
    int padded_count = int(round_up(count, Arithmetic<Query>::kKeyAlign));
    Element* value_tile = value_tiles + head * kKeyTile * value_stride();
    ahead.start(head, padded_rows / kLane * 2 * (padded_count / kKeysPerFetch));
    nonfinite.clear();
    if constexpr (Visible::kMasks) take_nonfinite(value_tile, count);
    if constexpr (kPack > 1) {
      static const Element zeros[256] = {};
      for (int first = 0; first < padded_count; first += 32) {
        const Element* rows[32];
        for (int i = 0; i < 32; i++)
          rows[i] = first + i < count ? reinterpret_cast<const Element*>(values.row(first + i, head)) : zeros;
        for (int c = 0; c < value_channels; c += 32) {
          transpose(rows, c, std::min(32, value_channels - c), value_transposed + c * kKeyTile + first, kKeyTile);
          ahead.fetch();
        }
      }
    }
    for (int block = 0; block < padded_rows; block += kRowBlock) {
      int width = block_rows(block), run = std::min(keys.run, 32);
      for (int key = 0; key < padded_count; key += run) {
        matmul<false, true>(reinterpret_cast<const Unit*>(keys.row(key, head)), keys.stride / sizeof(Unit),
                            queries + int64_t(block) * padded_channels / kPack, width, scores + key * width, width,
                            std::min(run, padded_count - key), width, padded_channels / kPack);
        ahead.fetch();
      }
      softmax(block, width, count, padded_count, scale, softcap, visible, ahead);
      Real* block_out = out + int64_t(block) * padded_value_channels;
      if constexpr (kPack > 1) {
        matmul<true, true>(reinterpret_cast<const Unit*>(value_transposed), kKeyTile / kPack, weights, width, block_out,
                           width, padded_value_channels, width, padded_count / kPack);
      } else {
        matmul<true, false>(value_tile, value_stride(), scores, width, block_out, width, padded_value_channels, width,
                            padded_count);
      }
      if constexpr (Visible::kMasks) {
        for (auto [key, channel, value] : nonfinite)
          for (int r = 0; r < width; r++)
            if (visible.sees(key, block + r)) block_out[channel * width + r] += value;
      }
    }
  }

  // Turns the block's scores into weights 2^(score - maximum) and moves its maximum, sum and output along.
  template <class Visible>
  void softmax(int block, int width, int count, int padded_count, Real scale, Real softcap, const Visible& visible,
               Ahead& ahead) {
    bool rewrite = softcap > 0 || scale <= 0;
    Real to_log2 = (softcap > 0 ? softcap : scale <= 0 ? Real(1) : scale) * Real(kLog2E);
    for (int c = 0; c < width; c += kLane) {
      Vector<Real> highest = broadcast(-kInfinity);
      for (int key = 0; key < count; key++) {
        if (key % kKeysPerFetch == 0) ahead.fetch();
        Real* at = scores + key * width + c;
        Vector<Real> s = load(at);
        if (rewrite) s = softcap > 0 ? tanh_vector(s * (scale / softcap)) : s * scale;
        if constexpr (Visible::kMasks) s = visible.template lanes<Real>(key, block + c) ? s : broadcast(-kInfinity);
        if (rewrite || Visible::kMasks) store(at, s);
        highest = maximum_of(highest, s);
      }
      Vector<Real> before = load(maximum + block + c), after = highest * to_log2;
      after = after > before + kSlack ? after : before;
      Vector<Real> base = after == -kInfinity ? Vector<Real>{} : after;
      Vector<Real> total = load(sum + block + c);
      if (any(after != before)) {
        Vector<Real> factor = exp2_vector(before - base);
        total *= factor;
        Real* column = out + int64_t(block) * padded_value_channels + c;
        for (int d = 0; d < padded_value_channels; d++) store(column + d * width, load(column + d * width) * factor);
        store(maximum + block + c, after);
      }
      Vector<Real> tile_total{};
      auto weight = [&](int key) {
        Vector<Real> w = exp2_vector(load(scores + key * width + c) * to_log2 - base);
        tile_total += w;
        return w;
      };
      if constexpr (kPack == 1) {
        for (int key = 0; key < count; key++) store(scores + key * width + c, weight(key));
      } else {
        auto put = [&](int key, Vector<Real> low, Vector<Real> high) {
          store_pairs(weights + key / 2 * width + c, low, high);
        };
        int key = 0;
        for (; key + 2 <= count; key += 2) {
          if (key % kKeysPerFetch == 0) ahead.fetch();
          Vector<Real> low = weight(key), high = weight(key + 1);
          put(key, low, high);
        }
        if (key < count) put(key, weight(key), Vector<Real>{}), key += 2;
        for (; key < padded_count; key += 2) put(key, Vector<Real>{}, Vector<Real>{});
      }
      store(sum + block + c, total + tile_total);
    }
  }

  static Vector<Real> maximum_of(Vector<Real> a, Vector<Real> b) { return a > b ? a : b; }

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
  void take_nonfinite(Element* value_tile, int count) {
    for (int key = 0; key < count; key++) {
      Element* row = value_tile + key * value_stride();
      bool finite = true;
      for (int c = 0; c < value_channels; c++) finite &= is_finite(row[c]);
      for (int c = 0; !finite && c < value_channels; c++)
        if (!is_finite(row[c])) nonfinite.push_back({key, c, Real(to_float(row[c]))}), row[c] = Element{};
    }
  }

  struct NonfiniteValue {
    int key, channel;
    Real value;
  };
  std::vector<NonfiniteValue> nonfinite;
};

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
