// SPDX-License-Identifier: Apache-2.0
// A slice of one head's recurrent state in the registers of a block: 32 columns of all K rows. A warp has 32 rows, and
// a lane 8 rows by 4 columns of them. So every load or store of a warp moves four whole lines of 128 bytes, all eight
// loads of a lane are in flight at once, and keys and queries are read 8 neighbours at a time.
#pragma once
#include <math.h>

#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "lightning_attention/params.h"

namespace torch_kernels {

constexpr int kSliceColumns = 32, kWarpRows = 32, kLaneRows = 8, kLaneColumns = 4;
constexpr int kMaxSliceThreads = 256 / kWarpRows * 32;

// Whether every row of a tensor's last dimension begins at a multiple of so many bytes.
inline bool rows_aligned(const Tensor& tensor, uint64_t bytes) {
  uint64_t bits = reinterpret_cast<uint64_t>(tensor.data);
  for (int i = 0; i + 1 < tensor.rank; i++)
    if (tensor.size[i] > 1) bits |= uint64_t(tensor.stride[i] * size_of(tensor.dtype));
  return bits % bytes == 0;
}

// The blocks of a grid: slices of a head, heads, then rows of the batch.
struct SliceGrid {
  int slices, heads, threads;
  bool aligned;  // of the state's rows

  explicit SliceGrid(const Tensor& state)
      : slices(int((state.size[3] + kSliceColumns - 1) / kSliceColumns)),
        heads(int(state.size[1])),
        threads(int((state.size[2] + kWarpRows - 1) / kWarpRows) * 32),
        aligned(rows_aligned(state, 16)) {}

  dim3 blocks(int64_t rows) const { return dim3(unsigned(rows * heads * slices)); }
};

struct StateSlice {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int row = warp * kWarpRows + lane % 4 * kLaneRows;  // this lane's first
  int column, head;                                   // this lane's first; the block's
  int64_t batch;                                      // the block's row of the batch
  int64_t index;                                      // of its state in the pool, -1: padding
  int first_column;                                   // of the slice
  bool inside;                                        // whether the lane has any of the state
  float x[kLaneRows][kLaneColumns] = {};

  DEVICE StateSlice(const SliceGrid& grid, unsigned block, const Tensor& state, const Tensor& state_indices) {
    first_column = int(block % grid.slices) * kSliceColumns, block /= grid.slices;
    head = int(block % grid.heads), batch = block / grid.heads;
    index = state_of_row(state, state_indices, batch);
    column = first_column + lane / 4 * kLaneColumns;
    inside = row < state.size[2] && column < state.size[3];
  }

  DEVICE void load(const Tensor& state, bool aligned) {
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < kLaneRows; i++) {
      const float* from = state.at<const float>(index, head, row + i, column);
      if (aligned) {
        float4 four = *reinterpret_cast<const float4*>(from);
        x[i][0] = four.x, x[i][1] = four.y, x[i][2] = four.z, x[i][3] = four.w;
      } else {
#pragma unroll
        for (int j = 0; j < kLaneColumns; j++) x[i][j] = from[j];
      }
    }
  }

  DEVICE void store(const Tensor& state, bool aligned) const {
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < kLaneRows; i++) {
      float* to = state.at<float>(index, head, row + i, column);
      if (aligned) {
        *reinterpret_cast<float4*>(to) = make_float4(x[i][0], x[i][1], x[i][2], x[i][3]);
      } else {
#pragma unroll
        for (int j = 0; j < kLaneColumns; j++) to[j] = x[i][j];
      }
    }
  }

  // One token: x += (e^-slope - 1) x + k v, where e^-slope of a slow head cannot be told from 1. An infinite slope
  // forgets by selection.
  template <class T>
  DEVICE void advance(const T* k, const T* v, float slope, bool aligned) {
    Pack<T, kLaneRows> keys;
    Pack<T, kLaneColumns> values;
    keys.load(k + row, inside ? kLaneRows : 0, aligned);
    values.load(v + column, inside ? kLaneColumns : 0, aligned);
    float change = expm1f(-slope);
    bool forget = slope == INFINITY;
#pragma unroll
    for (int i = 0; i < kLaneRows; i++)
#pragma unroll
      for (int j = 0; j < kLaneColumns; j++) {
        float added = keys[i] * values[j];
        x[i][j] = forget ? added : x[i][j] + fmaf(change, x[i][j], added);
      }
  }
};

}  // namespace torch_kernels
