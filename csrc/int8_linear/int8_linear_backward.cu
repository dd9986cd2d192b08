// SPDX-License-Identifier: Apache-2.0
// int8_linear_backward: dx [M, K] = (grad * weight_scale) [M, N] times weight [N, K].
//
// 16-bit gradients go through bfloat16 tensor cores, where an int8 weight is exact. grad * weight_scale is not: it is
// the sum of two bfloat16 numbers, split once in a workspace, which also keeps float16's small gradients. float32
// gradients are multiplied in float32.
#include <algorithm>

#include "int8_linear/gemm.cuh"
#include "int8_linear/kernels.h"
#include "int8_linear/rows.cuh"

namespace torch_kernels {
namespace {

using BackwardParams = Int8LinearBackwardParams;

constexpr int kRows = 64, kColumns = 128, kDepth = 64;  // of a block; features per stage
constexpr int kPartBytes = kRows * kDepth * 2, kStageBytes = 2 * kPartBytes + kDepth * kColumns;
constexpr int kStages = 4;

// parts [2, M, padded N]: grad * weight_scale rounded, then what is left of it, rounded.
__global__ void __launch_bounds__(256)
    split_gradient_kernel(BackwardParams p, __nv_bfloat16* parts, int64_t padded, bool aligned) {
  int64_t rows = p.grad.size[0], features = p.grad.size[1], packs = padded / 8;
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * packs) return;
  int64_t row = i / packs, feature = i % packs * 8;
  int valid = int(max(min(features - feature, int64_t(8)), int64_t(0)));
  float value[8];
  auto load = [&]<class T>() {
    Pack<T, 8> grad;
    grad.load(valid ? p.grad.at<const T>(row, feature) : p.grad.at<const T>(), valid, aligned);
#pragma unroll
    for (int j = 0; j < 8; j++)
      value[j] = j < valid ? __fmul_rn(grad[j], *p.weight_scale.at<const float>(feature + j)) : 0.f;
  };
  if (p.grad.dtype == DType::float16)
    load.template operator()<__half>();
  else
    load.template operator()<__nv_bfloat16>();
  unsigned high[4], low[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    high[j] = pack<__nv_bfloat16>(value[2 * j], value[2 * j + 1]);
    float rest[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      float rounded = unpack<__nv_bfloat16>(high[j], k);
      rest[k] = isfinite(rounded) ? value[2 * j + k] - rounded : 0.f;
    }
    low[j] = pack<__nv_bfloat16>(rest[0], rest[1]);
  }
  __nv_bfloat16* to = parts + row * padded + feature;
  *reinterpret_cast<uint4*>(to) = make_uint4(high[0], high[1], high[2], high[3]);
  *reinterpret_cast<uint4*>(to + rows * padded) = make_uint4(low[0], low[1], low[2], low[3]);
}

// A block's tile of dx: 2 x 4 warps of 32 rows and 32 columns.
__global__ void __launch_bounds__(256, 2)
    int8_linear_backward_kernel(BackwardParams p, Int8Rows weight, const __nv_bfloat16* parts, int64_t padded) {
  char* const shared = dynamic_shared();
  const int thread = threadIdx.x, lane = thread % 32, warp_m = thread / 128, warp_n = thread / 32 % 4;
  int64_t rows = p.out.size[0], columns = p.out.size[1], row_tiles = (rows + kRows - 1) / kRows;
  int64_t row0 = blockIdx.x % row_tiles * kRows, column0 = blockIdx.x / row_tiles * kColumns;
  int stages = int(padded / kDepth), next = 0, buffer = 0;

  auto issue = [&] {
    if (next < stages) {
      char* to = shared + buffer * kStageBytes;
#pragma unroll
      for (int i = 0; i < 4; i++) {  // two parts of 64 rows
        int slot = thread / 8 % 32 + i % 2 * 32;
        int64_t row = row0 + slot;
        bool exists = row < rows;
        const __nv_bfloat16* from =
            parts + (exists ? (i / 2 * rows + row) * padded + int64_t(next) * kDepth + thread % 8 * 8 : 0);
        ptx::cp_async_16(to + i / 2 * kPartBytes + swizzled<kDepth * 2>(slot, thread % 8), from, exists ? 16 : 0);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int slot = thread / 8 + i * 32;
        weight.copy_chunk(to + 2 * kPartBytes + swizzled<kColumns>(slot, thread % 8), int64_t(next) * kDepth + slot,
                          column0 + thread % 8 * 16, columns);
      }
    }
    ptx::cp_async_commit();
    next++;
    buffer = buffer + 1 == kStages ? 0 : buffer + 1;
  };

  float sums[2][4][4] = {};  // of 16 rows; of the even and the odd columns of sixteen
  int grad_at = swizzled<kDepth * 2>(warp_m * 32 + lane % 16, lane / 16);
  int weight_at = swizzled<kColumns>(lane / 8 % 2 * 8 + lane % 8, warp_n * 2 + lane / 16);
  for (int i = 0; i < kStages - 1; i++) issue();
  for (int stage = 0; stage < stages; stage++) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    issue();
    const char* from = shared + buffer * kStageBytes;
#pragma unroll
    for (int step = 0; step < kDepth / 16; step++) {
      unsigned loaded[4], b[4][2];
      ptx::ldmatrix_x4_trans(loaded, from + 2 * kPartBytes + swizzled_step<kColumns>(weight_at, step * 16, 0));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        unsigned pairs[2];
        decode<__nv_bfloat16, int8_t>(ptx::prmt(loaded[i], 0, 0x3120), pairs);
        b[i / 2 * 2][i % 2] = pairs[0], b[i / 2 * 2 + 1][i % 2] = pairs[1];
      }
#pragma unroll
      for (int part = 0; part < 2; part++)
#pragma unroll
        for (int m = 0; m < 2; m++) {
          unsigned a[4];
          ptx::ldmatrix_x4(a, from + part * kPartBytes + swizzled_step<kDepth * 2>(grad_at, m * 16, step * 2));
#pragma unroll
          for (int n = 0; n < 4; n++) ptx::mma_m16n8k16_bf16(sums[m][n], a, b[n][0], b[n][1]);
        }
    }
  }
  ptx::cp_async_wait_all();

  auto write = [&]<class T>() {
    bool aligned = reinterpret_cast<uint64_t>(p.out.data) % 8 == 0 && columns % 4 == 0;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
          int64_t row = row0 + warp_m * 32 + m * 16 + half * 8 + lane / 4;
          int64_t column = column0 + warp_n * 32 + n * 8 + lane % 4 * 4;
          const float *even = &sums[m][n][half * 2], *odd = &sums[m][n + 1][half * 2];
          T rounded[4] = {from_float<T>(even[0]), from_float<T>(odd[0]), from_float<T>(even[1]), from_float<T>(odd[1])};
          if (row < rows && column < columns)
            store_four(p.out.at<T>() + row * columns + column, rounded, columns - column, aligned);
        }
  };
  if (p.out.dtype == DType::float16)
    write.template operator()<__half>();
  else
    write.template operator()<__nv_bfloat16>();
}

constexpr int kFloatTile = 64, kFloatDepth = 16;

// float32: 64 x 64 of dx per block, 4 x 4 per thread, 16 features at a time through two buffers.
__global__ void __launch_bounds__(256, 2) int8_linear_backward_float32_kernel(BackwardParams p) {
  constexpr int kBuffer = 2 * kFloatTile * kFloatDepth;
  const Shared<float> tiles = shared_array<float>(0, 2 * kBuffer);
  const int thread = threadIdx.x;
  int64_t rows = p.out.size[0], columns = p.out.size[1], features = p.grad.size[1];
  int64_t row_tiles = (rows + kFloatTile - 1) / kFloatTile;
  int64_t row0 = blockIdx.x % row_tiles * kFloatTile, column0 = blockIdx.x / row_tiles * kFloatTile;
  int row = thread % 64, feature_of_grad = thread / 64 * 4, feature_of_weight = thread / 16, column = thread % 16 * 4;

  float grad[4], weight[4];
  auto load = [&](int64_t feature0) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int64_t feature = feature0 + feature_of_grad + i;
      grad[i] = row0 + row < rows && feature < features
                    ? __fmul_rn(*p.grad.at<const float>(row0 + row, feature), *p.weight_scale.at<const float>(feature))
                    : 0.f;
      feature = feature0 + feature_of_weight;
      weight[i] = feature < features && column0 + column + i < columns
                      ? float(*p.weight.at<const int8_t>(feature, column0 + column + i))
                      : 0.f;
    }
  };
  float sums[4][4] = {};
  load(0);
  int buffer = 0;
  for (int64_t feature0 = 0; feature0 < features; feature0 += kFloatDepth, buffer ^= kBuffer) {
#pragma unroll
    for (int i = 0; i < 4; i++) tiles[buffer + (feature_of_grad + i) * kFloatTile + row] = grad[i];
    tiles.store(buffer + kBuffer / 2 + feature_of_weight * kFloatTile + column,
                make_float4(weight[0], weight[1], weight[2], weight[3]));
    __syncthreads();
    load(feature0 + kFloatDepth);
#pragma unroll
    for (int k = 0; k < kFloatDepth; k++) {
      float4 g = tiles.load<float4>(buffer + k * kFloatTile + thread / 16 * 4);
      float4 w = tiles.load<float4>(buffer + kBuffer / 2 + k * kFloatTile + column);
      float of_rows[4] = {g.x, g.y, g.z, g.w}, of_columns[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sums[i][j] = fmaf(of_rows[i], of_columns[j], sums[i][j]);
    }
  }
  bool aligned = reinterpret_cast<uint64_t>(p.out.data) % 16 == 0 && columns % 4 == 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int64_t to_row = row0 + thread / 16 * 4 + i, to_column = column0 + column;
    if (to_row < rows && to_column < columns)
      store_four(p.out.at<float>() + to_row * columns + to_column, sums[i], columns - to_column, aligned);
  }
}

}  // namespace

namespace cuda {

void int8_linear_backward(const BackwardParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  int64_t rows = p.out.size[0], columns = p.out.size[1], features = p.grad.size[1];
  if (p.out.elements() == 0) return;
  auto blocks = [&](int64_t rows, int64_t row_tile, int64_t column_tile) {
    return dim3(unsigned((rows + row_tile - 1) / row_tile * ((columns + column_tile - 1) / column_tile)));
  };
  if (p.grad.dtype == DType::float32) {
    launch(int8_linear_backward_float32_kernel, blocks(rows, kFloatTile, kFloatTile), dim3(256),
           4 * kFloatTile * kFloatDepth * sizeof(float), context.stream, p);
    return;
  }
  // In slabs of rows that bound the workspace.
  int64_t padded = (features + kDepth - 1) / kDepth * kDepth;
  int64_t slab = std::max<int64_t>((int64_t(64) << 20) / (4 * std::max<int64_t>(padded, 1)) / kRows, 1) * kRows;
  slab = std::min(slab, rows);
  auto* parts = static_cast<__nv_bfloat16*>(context.allocate(2 * slab * padded * 2));
  for (int64_t row = 0; row < rows; row += slab) {
    BackwardParams part = p;
    part.grad.data = p.grad.at<uint16_t>(row), part.out.data = p.out.at<uint16_t>(row);
    part.grad.size[0] = part.out.size[0] = std::min(slab, rows - row);
    int64_t packs = part.grad.size[0] * padded / 8;
    launch(split_gradient_kernel, dim3(unsigned((packs + 255) / 256)), dim3(256), 0, context.stream, part, parts,
           padded, aligned_to(part.grad, 16));
    launch(int8_linear_backward_kernel, blocks(part.out.size[0], kRows, kColumns), dim3(256), kStages * kStageBytes,
           context.stream, part, Int8Rows::of(p.weight), parts, padded);
  }
}

}  // namespace cuda
}  // namespace torch_kernels
