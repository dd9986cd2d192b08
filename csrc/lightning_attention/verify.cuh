// SPDX-License-Identifier: Apache-2.0
// A tile of 16 query rows times a slice of the state, and times keys: for 16-bit types on tensor cores, for float32 in
// full. Row r of a key/value head is query head r % group of node r / group.
#pragma once
#include "lightning_attention/state_slice.cuh"

namespace torch_kernels {

constexpr int kTileRows = 16, kTileKeys = 64;
constexpr int kPartialStride = kSliceColumns + 4, kScoreStride = kTileKeys + 8;  // so that stores meet no bank twice

// The queries of one head and tile, and the keys, of one sequence.
template <class T>
struct VerifyRows {
  const LightningVerifyParams& p;
  const StateSlice& slice;
  int group, nodes, size, first;  // first: row of the tile
  bool aligned;

  DEVICE int node(int row) const { return (first + row) / group; }
  DEVICE int query_head(int row) const { return slice.head * group + (first + row) % group; }
  DEVICE bool exists(int row) const { return node(row) < nodes; }

  // Elements column .. column + kCount - 1 of the tile's query, or of a key; zeros where there are none.
  template <int kCount>
  DEVICE Pack<T, kCount> query(int row, int column) const {
    Pack<T, kCount> x;
    bool valid = exists(row) && column < size;
    x.load(valid ? p.q.at<const T>(slice.batch, node(row), query_head(row)) + column : nullptr, valid ? kCount : 0,
           aligned);
    return x;
  }
  template <int kCount>
  DEVICE Pack<T, kCount> key(int node, int column) const {
    Pack<T, kCount> x;
    bool valid = node < nodes && column < size;
    x.load(valid ? p.k.at<const T>(slice.batch, node, slice.head) + column : nullptr, valid ? kCount : 0, aligned);
    return x;
  }
};

// A float as a sum of two bfloat16 numbers: the upper half of its bits, and what is left. Pairs, the first in the low
// half.
struct Halves {
  unsigned high, low;

  DEVICE Halves(float x, float y) {
    high = ptx::prmt(__float_as_uint(x), __float_as_uint(y), 0x7632);
    auto rest = [](float whole) {
      float upper = __uint_as_float(__float_as_uint(whole) & 0xffff0000u);
      return isinf(whole) ? 0.f : whole - upper;
    };
    low = pack<__nv_bfloat16>(rest(x), rest(y));
  }
};

// The products of a warp's 32 rows of the state with query rows. The logical order of rows and columns in an mma is
// free as long as both sides agree: lane c of four holds rows 8c .. 8c + 7, 4 per step, and column 4g + t of the slice
// is column g of column tile t.
template <class T>
struct StateProduct {
  unsigned high[2][kLaneColumns][2], low[2][kLaneColumns][2];

  DEVICE explicit StateProduct(const StateSlice& slice) {
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
      for (int t = 0; t < kLaneColumns; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          Halves halves(slice.x[step * 4 + i * 2][t], slice.x[step * 4 + i * 2 + 1][t]);
          high[step][t][i] = halves.high, low[step][t][i] = halves.low;
        }
  }

  // Writes the warp's share of [kTileRows, kSliceColumns] products.
  DEVICE void multiply(const VerifyRows<T>& rows, const Shared<float>& partial) const {
    const StateSlice& slice = rows.slice;
    const int g = slice.lane / 4, c = slice.lane % 4;
    float sums[kLaneColumns][4] = {};
    Pack<T, 8> upper = rows.template query<8>(g, slice.row), lower = rows.template query<8>(g + 8, slice.row);
#pragma unroll
    for (int step = 0; step < 2; step++) {
      unsigned q[4] = {upper.words[step * 2], lower.words[step * 2], upper.words[step * 2 + 1],
                       lower.words[step * 2 + 1]};
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        multiply_step(q, high[step], sums);
        multiply_step(q, low[step], sums);
      } else {
        unsigned q_high[4], q_low[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          Halves halves(unpack<T>(q[i], 0), unpack<T>(q[i], 1));
          q_high[i] = halves.high, q_low[i] = halves.low;
        }
        multiply_step(q_high, high[step], sums);
        multiply_step(q_high, low[step], sums);
        multiply_step(q_low, high[step], sums);
      }
    }
#pragma unroll
    for (int i = 0; i < 4;
         i++)  // accumulators 0 and 1 are row g, 2 and 3 row g + 8; columns 2c and 2c + 1 of each tile
      partial.store((g + i / 2 * 8) * kPartialStride + (c * 2 + i % 2) * 4,
                    make_float4(sums[0][i], sums[1][i], sums[2][i], sums[3][i]));
  }

 private:
  DEVICE static void multiply_step(const unsigned (&q)[4], const unsigned (&state)[kLaneColumns][2],
                                   float (&sums)[kLaneColumns][4]) {
#pragma unroll
    for (int t = 0; t < kLaneColumns; t++) mma_m16n8k16<__nv_bfloat16>(sums[t], q, state[t][0], state[t][1]);
  }
};

template <>
struct StateProduct<float> {
  const StateSlice& slice;

  DEVICE explicit StateProduct(const StateSlice& of) : slice(of) {}

  DEVICE void multiply(const VerifyRows<float>& rows, const Shared<float>& partial) const {
    const int c = slice.lane % 4;
#pragma unroll 1
    for (int first = 0; first < kTileRows && rows.exists(first); first += 4) {
      float sums[4][kLaneColumns] = {};
#pragma unroll
      for (int r = 0; r < 4; r++) {
        Pack<float, kLaneRows> q = rows.query<kLaneRows>(first + r, slice.row);
#pragma unroll
        for (int i = 0; i < kLaneRows; i++)
#pragma unroll
          for (int j = 0; j < kLaneColumns; j++) sums[r][j] = fmaf(q[i], slice.x[i][j], sums[r][j]);
      }
      // Over the four lanes of these columns, each of which keeps one row: its own number.
      float kept[kLaneColumns];
#pragma unroll
      for (int j = 0; j < kLaneColumns; j++) {
        bool odd = c & 1, second = c & 2;
        float even_rows[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float gone = odd ? sums[i * 2][j] : sums[i * 2 + 1][j], stays = odd ? sums[i * 2 + 1][j] : sums[i * 2][j];
          even_rows[i] = stays + __shfl_xor_sync(0xffffffffu, gone, 1);
        }
        float gone = second ? even_rows[0] : even_rows[1], stays = second ? even_rows[1] : even_rows[0];
        kept[j] = stays + __shfl_xor_sync(0xffffffffu, gone, 2);
      }
      partial.store((first + c) * kPartialStride + slice.lane / 4 * kLaneColumns,
                    make_float4(kept[0], kept[1], kept[2], kept[3]));
    }
  }
};

// The products of the tile's query rows with keys first .. last of a tile of keys, unscaled; the warps share them out.
// A key counts only for the nodes below it, so what others get is never used.
template <class T>
DEVICE void multiply_keys(const VerifyRows<T>& rows, int first, int last, const Shared<float>& scores) {
  const StateSlice& slice = rows.slice;
  if constexpr (std::is_same_v<T, float>) {
    constexpr int kKeys = 4, kKeyLanes = 32 / kKeys;  // at a time
    int steps = (last - first) / kKeys + 1;
    for (int item = slice.warp; item < steps * kTileRows; item += slice.warps) {
      int row = item % kTileRows, key = item / kTileRows * kKeys;
      if (!rows.exists(row) || first + key > rows.node(row)) continue;
      key += slice.lane / kKeyLanes;
      float sum = 0;
      for (int column = slice.lane % kKeyLanes * 4; column < rows.size; column += kKeyLanes * 4) {
        Pack<float, 4> a = rows.template query<4>(row, column), b = rows.template key<4>(first + key, column);
#pragma unroll
        for (int i = 0; i < 4; i++) sum = fmaf(a[i], b[i], sum);
      }
      for (int lane = 1; lane < kKeyLanes; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
      if (slice.lane % kKeyLanes == 0) scores[row * kScoreStride + key] = sum;
    }
  } else {
    const int g = slice.lane / 4, c = slice.lane % 4;
    for (int key = slice.warp * 8; first + key <= last; key += slice.warps * 8) {
      float sums[4] = {};
      for (int column = c * 8; column - c * 8 < rows.size; column += 32) {
        Pack<T, 8> upper = rows.template query<8>(g, column), lower = rows.template query<8>(g + 8, column),
                   keys = rows.template key<8>(first + key + g, column);
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          unsigned q[4] = {upper.words[i], lower.words[i], upper.words[i + 1], lower.words[i + 1]};
          mma_m16n8k16<T>(sums, q, keys.words[i], keys.words[i + 1]);
        }
      }
      scores.store(g * kScoreStride + key + c * 2, make_float2(sums[0], sums[1]));
      scores.store((g + 8) * kScoreStride + key + c * 2, make_float2(sums[2], sums[3]));
    }
  }
}

}  // namespace torch_kernels
