// SPDX-License-Identifier: Apache-2.0
// Products with weights that are small integers:
//   c[m, n] += (sum over a span of columns of x[m, k] · w[n, k]) · scale[n] · row_scale[m] - zero[n] · total[m]
// Vectors run along n, so nothing is ever summed across lanes.
//
// A `Unit` is what one multiply-add consumes: a float, a Pair of bfloat16 or a Quad of int8 neighbours along k. Columns
// come in octets: 8 floats, 4 pairs or 2 quads.
#pragma once
#include <algorithm>

#include "cpu/matmul.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

inline constexpr int kSpan = 128;     // the most columns that are summed before the scales are applied
inline constexpr int kFeatures = 64;  // output features side by side: a block of weights
inline constexpr int kOctet = 8;

struct Quad {
  int8_t value[4];
};

template <class Unit>
inline constexpr int kUnitColumns = 1;
template <>
inline constexpr int kUnitColumns<Pair> = 2;
template <>
inline constexpr int kUnitColumns<Quad> = 4;
template <class Unit>
inline constexpr int kOctetUnits = kOctet / kUnitColumns<Unit>;

template <class Unit>
using SumOf = std::conditional_t<std::is_same_v<Unit, Quad>, int32_t, float>;

// c + a · b, exactly, with unsigned weights b. Without an instruction for all of it, pairs of products pass through 16
// bits, where weights up to 127 fit.
#if defined(__AVX512VNNI__)
inline constexpr bool kHasQuads = true;
inline Vector<int32_t> multiply_add(Quad a, Vector<int32_t> b, Vector<int32_t> c) {
  __m512i all = _mm512_set1_epi32(std::bit_cast<int>(a));
  return Vector<int32_t>(_mm512_dpbusd_epi32(__m512i(c), __m512i(b), all));
}
#elif defined(__AVX2__)
inline constexpr bool kHasQuads = true;
inline Vector<int32_t> multiply_add(Quad a, Vector<int32_t> b, Vector<int32_t> c) {
  __m256i pairs = _mm256_maddubs_epi16(__m256i(b), _mm256_set1_epi32(std::bit_cast<int>(a)));
  return c + Vector<int32_t>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
inline constexpr bool kHasQuads = false;
#endif

// Rows of x over one span.
template <class Unit>
struct RowSpan {
  const Unit* units;     // [part][row][unit]: x is the sum of its parts
  int64_t row, part;     // strides, in units
  int octets, count;     // columns / 8, and how many rows
  const float* scale;    // [row], or null for 1
  const float* total;    // [row]: sum of x over the span; null if there are no zero points
  const int32_t* start;  // [row]: where integer sums with unsigned weights start; null for 0

  RowSpan from(int first, int most) const {
    RowSpan some = *this;
    some.units += first * row;
    some.count = std::min(count - first, most);
    if (scale) some.scale += first;
    if (total) some.total += first;
    if (start) some.start += first;
    return some;
  }
};

// Scales of a block of weights over one span; zero = scale · zero point.
struct FeatureScales {
  alignas(64) float scale[kFeatures];
  alignas(64) float zero[kFeatures];
};

// The weights of a block over one span, unpacked to [unit][feature].
template <class Unit>
struct Panel {
  const Unit* units;

  void enter(int) const {}
  Vector<SumOf<Unit>> unit(int octet, int j, int vector) const {
    Vector<SumOf<Unit>> v;
    std::memcpy(&v, units + (octet * kOctetUnits<Unit> + j) * kFeatures + vector * kLanes<float>, sizeof v);
    return v;
  }
};

// The one place where a sum becomes part of the result, so that every path rounds alike.
template <bool row_scaled, bool zeros, class Sums>
inline Vector<float> add_scaled(Vector<float> c, Sums sum, Vector<float> scale, Vector<float> zero, float row_scale,
                                float total) {
  Vector<float> product = __builtin_convertvector(sum, Vector<float>);
  if constexpr (row_scaled) {
    product = product * scale;
    c = c + product * row_scale;
  } else {
    c = c + product * scale;
  }
  if constexpr (zeros) c = c - zero * total;
  return c;
}

#if defined(__AVX512F__)
inline constexpr int kMostRows = 6;
constexpr int vectors_for(int) { return 4; }
#else
inline constexpr int kMostRows = 4;
constexpr int vectors_for(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }  // enough chains to hide latency
#endif

// Not inlined, here and in add_tiles: callers for every dtype of x share what is unrolled so far.
template <int Rows, bool row_scaled, bool zeros, class Unit, class Weights>
[[gnu::noinline]] void add_row_tile(const RowSpan<Unit>& x, int first_row, const Weights& weights,
                                    const FeatureScales& features, float* c) {
  using Sum = SumOf<Unit>;
  constexpr int lanes = kLanes<float>, Vectors = vectors_for(Rows), units = kOctetUnits<Unit>;
  const Unit* rows = x.units + first_row * x.row;
  for (int first = 0; first < kFeatures / lanes; first += Vectors) {
    Vector<Sum> sum[Rows][Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; i++)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v++) {
        sum[i][v] = Vector<Sum>{};
        if constexpr (std::is_same_v<Unit, Quad>) sum[i][v] += x.start[first_row + i];
      }
    for (int octet = 0; octet < x.octets; octet++) {
      weights.enter(octet);
#pragma GCC unroll 8
      for (int j = 0; j < units; j++) {
        Vector<Sum> w[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; v++) w[v] = weights.unit(octet, j, first + v);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; i++) {
          Unit value = rows[i * x.row + octet * units + j];
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; v++) sum[i][v] = multiply_add(value, w[v], sum[i][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++) {
      Vector<float> scale = load(features.scale + (first + v) * lanes), zero{};
      if constexpr (zeros) zero = load(features.zero + (first + v) * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; i++) {
        int row = first_row + i;
        float* at = c + row * kFeatures + (first + v) * lanes;
        store(at, add_scaled<row_scaled, zeros>(load(at), sum[i][v], scale, zero, row_scaled ? x.scale[row] : 1.f,
                                                zeros ? x.total[row] : 0.f));
      }
    }
  }
}

// c[row, feature] += the product of the rows and a block of weights over one span. x has one part.
template <bool row_scaled, bool zeros, class Unit, class Weights>
inline void add_product(const RowSpan<Unit>& x, const Weights& weights, const FeatureScales& features, float* c) {
  auto tile = [&]<int Rows>(int row) { add_row_tile<Rows, row_scaled, zeros>(x, row, weights, features, c); };
  int row = 0;
  for (; row + kMostRows <= x.count; row += kMostRows) tile.template operator()<kMostRows>(row);
  switch (x.count - row) {
    case 1: return tile.template operator()<1>(row);
    case 2: return tile.template operator()<2>(row);
    case 3: return tile.template operator()<3>(row);
#if defined(__AVX512F__)
    case 4: return tile.template operator()<4>(row);
    case 5: return tile.template operator()<5>(row);
#endif
  }
}

#if defined(__AMX_TILE__)
inline constexpr bool kHasTiles = true;
inline constexpr int kTileRows = 16;

// Tile 0 holds sums (renamed by the processor, so that several are in flight), 2-3 rows of x, 4-7 weights: up to 16
// units deep, as deep as the span.
class TileSession {
 public:
  TileSession(int span_units, int row_count) {
    TileConfiguration configuration;
    int depth = std::min(span_units, 16), rows = std::min(row_count, kTileRows);  // fewer rows take less time
    for (int tile : {0, 2, 3}) configuration.rows[tile] = uint8_t(rows);
    for (int tile : {2, 3}) configuration.bytes_per_row[tile] = uint16_t(depth * 4);
    for (int tile : {4, 5, 6, 7}) configuration.rows[tile] = uint8_t(depth);
    asm volatile("" : : "r"(&configuration) : "memory");  // GCC's intrinsic does not say that it reads all of it
    _tile_loadconfig(&configuration);
  }
  ~TileSession() { _tile_release(); }
};

#define TORCH_KERNELS_TILE_PRODUCT(x, w)      \
  if constexpr (std::is_same_v<Unit, Quad>) { \
    _tile_dpbssd(0, x, w);                    \
  } else {                                    \
    _tile_dpbf16ps(0, x, w);                  \
  }

// sums[16 rows][16 features] of one tile of rows; the weights are in tiles 4 and up.
template <int Depth, class Unit>
inline void multiply_tile(const RowSpan<Unit>& x, int parts, int row, SumOf<Unit>* sums) {
  _tile_zero(0);
  for (int part = 0; part < parts; part++) {
    const Unit* from = x.units + part * x.part + row * x.row;
    _tile_loadd(2, from, x.row * 4);
    TORCH_KERNELS_TILE_PRODUCT(2, 4)
    if constexpr (Depth > 1) {
      _tile_loadd(3, from + 16, x.row * 4);
      TORCH_KERNELS_TILE_PRODUCT(3, 5)
    }
    if constexpr (Depth > 2) {
      _tile_loadd(2, from + 32, x.row * 4);
      TORCH_KERNELS_TILE_PRODUCT(2, 6)
      _tile_loadd(3, from + 48, x.row * 4);
      TORCH_KERNELS_TILE_PRODUCT(3, 7)
    }
  }
  _tile_stored(0, sums, 64);
}
#undef TORCH_KERNELS_TILE_PRODUCT

// RowTiles tiles of rows and the whole panel. Sums are added while the unit works on the next two tiles: it is fast,
// but answers late. Unrolled, because branches between tile instructions cost a third of the speed.
template <int Depth, int RowTiles, bool row_scaled, bool zeros, class Unit>
[[gnu::noinline]] void add_tiles(const RowSpan<Unit>& x, int parts, int first_row, const Unit* panel,
                                 const FeatureScales& features, float* c) {
  constexpr int kTiles = RowTiles * (kFeatures / 16), kBehind = 2, kRing = 4;
  alignas(64) SumOf<Unit> ring[kRing][kTileRows * 16];
#pragma GCC unroll 20
  for (int tile = 0; tile < kTiles + kBehind; tile++) {
    if (tile < kTiles) {
      int row = first_row + tile % RowTiles * kTileRows;
      if (tile % RowTiles == 0) {
        constexpr int next = 16 * kFeatures, stride = kFeatures * 4;
        const Unit* weights = panel + tile / RowTiles * 16;
        _tile_loadd(4, weights, stride);
        if constexpr (Depth > 1) _tile_loadd(5, weights + next, stride);
        if constexpr (Depth > 2) _tile_loadd(6, weights + 2 * next, stride);
        if constexpr (Depth > 2) _tile_loadd(7, weights + 3 * next, stride);
      }
      multiply_tile<Depth>(x, parts, row, ring[tile % kRing]);
    }
    if (tile >= kBehind) {
      int done = tile - kBehind, row = first_row + done % RowTiles * kTileRows, first = done / RowTiles * 16;
      const SumOf<Unit>* sums = ring[done % kRing];
      Vector<float> scale = load(features.scale + first), zero{};
      if constexpr (zeros) zero = load(features.zero + first);
      auto add_row = [&](int i) __attribute__((always_inline)) {
        float* at = c + (row + i) * kFeatures + first;
        store(at, add_scaled<row_scaled, zeros>(load(at), load(sums + i * 16), scale, zero,
                                                row_scaled ? x.scale[row + i] : 1.f, zeros ? x.total[row + i] : 0.f));
      };
      if (RowTiles > 1 || row + kTileRows <= x.count) {
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; i++) add_row(i);
      } else {
        for (int i = 0; row + i < x.count; i++) add_row(i);
      }
    }
  }
}

// As add_product, with signed weights and any number of parts. Rows of x and c are there in whole tiles.
template <bool row_scaled, bool zeros, class Unit>
inline void add_tile_product(const RowSpan<Unit>& x, int parts, const Unit* panel, const FeatureScales& features,
                             float* c) {
  auto product = [&]<int Depth>() {
    int row = 0;
    for (; row + 4 * kTileRows <= x.count; row += 4 * kTileRows)
      add_tiles<Depth, 4, row_scaled, zeros>(x, parts, row, panel, features, c);
    for (; row + kTileRows < x.count; row += 2 * kTileRows)
      add_tiles<Depth, 2, row_scaled, zeros>(x, parts, row, panel, features, c);
    if (row < x.count) add_tiles<Depth, 1, row_scaled, zeros>(x, parts, row, panel, features, c);
  };
  int units = x.octets * kOctetUnits<Unit>;
  if (units <= 16) return product.template operator()<1>();
  if (units <= 32) return product.template operator()<2>();
  product.template operator()<4>();
}
#else
inline constexpr bool kHasTiles = false;
inline constexpr int kTileRows = 1;
struct TileSession {
  TileSession(int, int) {}
};
#endif

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
