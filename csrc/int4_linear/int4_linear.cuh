// SPDX-License-Identifier: Apache-2.0
// y = x W^T with W decoded between shared memory and the tensor cores.
//
// The products are W x^T: a 32-bit word of the packed weight decodes to the whole A operand of m16n8k16 (16 features,
// 16 columns), and 8 rows of x are its B operand. So small M wastes nothing, and a lane holds few features, each with
// one scale. q - 8 (and an integer zero point) is exact in 16 bits; a group's sum stays in fp32 until the group ends
// and is scaled then. Fractional zero points take the sum of x over the group, which is one more product, with a
// matrix of ones. Every tile shape adds in the same order.
#pragma once
#include "int4_linear/decode.cuh"
#include "int4_linear/stages.cuh"

namespace torch_kernels {

template <class X, int kRows, int kWarps>
struct Int4LinearBlock : Int4LinearStages<X, kRows, kWarps> {
  using Base = Int4LinearStages<X, kRows, kWarps>;
  using Base::kColumnTile, Base::kRowBytes, Base::kTiles;
  using Base::work, Base::lane, Base::warp, Base::rows, Base::row0, Base::split, Base::shared, Base::first_tile,
      Base::last_tile, Base::group_in_stage, Base::warp_feature;

  static constexpr bool kInt8 = sizeof(X) == 1, kFloat = sizeof(X) == 4;
  // Cell (h, c, r) of a lane is feature 16 h + 8 (r / 2) + lane / 4 of its warp. In the mma's layout row 8 c + 2 (lane
  // % 4) + r % 2; without tensor cores row 2 c + r % 2, of which the four lanes hold shares.
  static constexpr int kCells = kFloat ? kRows / 2 : kRows / 8;
  using Sum = std::conditional_t<kInt8, int, float>;

  Sum sum[2][kCells][4] = {};             // of the current group
  Sum ones[kFloat ? 1 : kCells][4] = {};  // of x over the current group, if zero points need it
  float total[2][kCells][4] = {};
  unsigned zero[2][2] = {};  // constants of decode_int4
  float zero_float[2][2] = {};

  DEVICE explicit Int4LinearBlock(const Int4LinearWork& w) : Base(w) {}

  DEVICE bool sums_x() const { return kInt8 ? bool(work.zeros) : work.zeros.dtype == DType::float32 && !kFloat; }

  // Scale or zero point, as a float, of this lane's feature 16 h + 8 i + lane / 4.
  DEVICE float parameter(int offset, DType dtype, int group, int h, int i) const {
    return load_parameter(offset, dtype, group * kColumnTile + warp * kInt4TileFeatures + 16 * h + 8 * i + lane / 4);
  }

  DEVICE void start_group(int buffer, int group) {
    if constexpr (kInt8) return;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float z =
            work.zeros && !sums_x() ? parameter(buffer + work.plan.stage.zeros, work.zeros.dtype, group, h, i) : 0;
        if constexpr (kFloat)
          zero_float[h][i] = z;
        else if constexpr (!kInt8)
          zero[h][i] = zero_constant<X>(i, z);
      }
  }

  // total += scale * (sum - zero * sum of x); begins the next sum.
  DEVICE void end_group(int buffer, int group, int sum_group) {
    float scale[2][2], z[2][2];
    bool with_zeros = sums_x();
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        scale[h][i] = parameter(buffer + work.plan.stage.scales, work.scales.dtype, group, h, i);
        z[h][i] = with_zeros ? parameter(buffer + work.plan.stage.zeros, work.zeros.dtype, group, h, i) : 0;
        if constexpr (kInt8) scale[h][i] *= 0.0625f, z[h][i] *= 16;
      }
#pragma unroll
    for (int c = 0; c < kCells; c++) {
      float2 x_scale = make_float2(1, 1);
      if constexpr (kInt8)
        x_scale = shared_array<float>(buffer + work.plan.stage.x_scales, (sum_group + 1) * kRows)
                      .template load<float2>(sum_group * kRows + c * 8 + lane % 4 * 2);
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float value = float(sum[h][c][r]);
          if constexpr (!kFloat)
            if (with_zeros) value = fmaf(-z[h][r / 2], float(ones[c][r % 2]), value);
          float factor = scale[h][r / 2];
          if constexpr (kInt8) factor *= r % 2 ? x_scale.y : x_scale.x;
          total[h][c][r] = fmaf(factor, value, total[h][c][r]);
          sum[h][c][r] = 0;
        }
      if constexpr (!kFloat)
#pragma unroll
        for (int r = 0; r < 4; r++) ones[c][r] = 0;
    }
  }

  DEVICE void multiply(Sum (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (kInt8)
      ptx::mma_m16n8k32_s8(d, a, b0, b1);
    else if constexpr (!kFloat)
      mma_m16n8k16<X>(d, a, b0, b1);
  }

  // sum += a x^T for 32 bytes of x's rows, `chunk` of 16 bytes and the next; `halves` says which of the two count.
  DEVICE void multiply_step(const char* x, int chunk, const unsigned (&a)[2][4], int halves = 3) {
    constexpr unsigned kOne = kInt8 ? 0x01010101u : std::is_same_v<X, __half> ? 0x3c003c00u : 0x3f803f80u;
    constexpr int kGroup = kRows == 8 ? 1 : 2;  // tiles of 8 rows per ldmatrix
    int offset = swizzled<kRowBytes>(lane / 16 * 8 % kRows + lane % 8, lane / 8 % 2);
    bool with_ones = sums_x();
#pragma unroll
    for (int c = 0; c < kCells; c += kGroup) {
      if (c * 8 >= rows) break;
      unsigned b[4];
      if constexpr (kGroup == 2) {
        ptx::ldmatrix_x4(b, x + swizzled_step<kRowBytes>(offset, c * 8, chunk));
      } else {
        unsigned pair[2];
        ptx::ldmatrix_x2(pair, x + swizzled_step<kRowBytes>(offset, c * 8, chunk));
        b[0] = pair[0], b[1] = pair[1];
      }
      if constexpr (kInt8)
#pragma unroll
        for (int i = 0; i < 2 * kGroup; i++)
          if (!(halves >> i % 2 & 1)) b[i] = 0;
#pragma unroll
      for (int i = 0; i < kGroup; i++) {
        multiply(sum[0][c + i], a[0], b[2 * i], b[2 * i + 1]);
        multiply(sum[1][c + i], a[1], b[2 * i], b[2 * i + 1]);
        if (with_ones) {
          const unsigned one[4] = {kOne, kOne, kOne, kOne};
          multiply(ones[c + i], one, b[2 * i], b[2 * i + 1]);
        }
      }
    }
  }

  // The same for 16 columns without tensor cores.
  DEVICE void multiply_words(int x, int column, unsigned word0, unsigned word1) {
    Shared<float> values = shared_array<float>(x, kRows * kRowBytes / 4);
#pragma unroll
    for (int half = 0; half < 2; half++) {  // columns 0 to 7, 8 to 15
      float w[2][2][2];
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int u = 0; u < 2; u++) {
            w[h][i][u] = int4_to_float(h ? word1 : word0, i + 2 * half + 4 * u) - zero_float[h][i];
          }
#pragma unroll
      for (int row = 0; row < kRows; row++) {
        if (row >= rows) break;
        int at = column + 8 * half + lane % 4 * 2;
        float2 v = values.template load<float2>((swizzled<kRowBytes>(row, at / 4) + at % 4 * 4) / 4);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float& to = sum[h][row / 2][2 * i + row % 2];
            to = fmaf(w[h][i][1], v.y, fmaf(w[h][i][0], v.x, to));
          }
      }
    }
  }

  // One tile of 64 columns. Groups may end after every 16.
  DEVICE void multiply_tile(int tile, int buffer) {
    int in_stage = (tile - first_tile) % kTiles;
    const char* x = shared + buffer + work.plan.stage.x;
    Shared<unsigned> weights =
        shared_array<unsigned>(buffer + (warp * kTiles + in_stage) * kInt4TileBytes, kInt4TileBytes / 4);
    uint4 loaded[2] = {weights.template load<uint4>(lane * 4), weights.template load<uint4>(128 + lane * 4)};
    int mask = (1 << work.plan.group_shift) - 1, sum_mask = (1 << work.plan.sum_shift) - 1;
    auto end = [&](int sixteen) {
      end_group(buffer, group_in_stage(sixteen, work.plan.group_shift), group_in_stage(sixteen, work.plan.sum_shift));
    };
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int sixteen = tile * 4 + j;
      unsigned word[2] = {(&loaded[0].x)[j], (&loaded[1].x)[j]};
      if (!kInt8 && ((sixteen & mask) == 0 || (j == 0 && tile == first_tile)))
        start_group(buffer, group_in_stage(sixteen, work.plan.group_shift));
      if constexpr (kInt8) {
        if (j % 2) continue;
        unsigned a[2][4];
        decode_int4((&loaded[0].x)[j], (&loaded[0].x)[j + 1], a[0]);
        decode_int4((&loaded[1].x)[j], (&loaded[1].x)[j + 1], a[1]);
        int chunk = in_stage * 4 + j;
        if (sum_mask == 0) {
          multiply_step(x, chunk, a, 1);
          end(sixteen);
          multiply_step(x, chunk, a, 2);
        } else {
          multiply_step(x, chunk, a);
        }
        if (((sixteen + 2) & sum_mask) == 0) end(sixteen + 1);
      } else {
        if constexpr (kFloat) {
          multiply_words(buffer + work.plan.stage.x, in_stage * 64 + j * 16, word[0], word[1]);
        } else {
          unsigned a[2][4];
          decode_int4<X>(word[0], zero[0], a[0]);
          decode_int4<X>(word[1], zero[1], a[1]);
          multiply_step(x, (in_stage * 4 + j) * 2, a);
        }
        if (((sixteen + 1) & sum_mask) == 0) end(sixteen);
      }
    }
    // A group that spans splits is scaled in each.
    if (tile + 1 == last_tile && ((tile * 4 + 4) & sum_mask) != 0) end(tile * 4 + 3);
  }

  DEVICE void store(int feature, int row, float value) const {
    if (feature >= work.features || row >= rows) return;
    if (work.plan.splits > 1) {
      work.partials[(int64_t(split) * work.rows + row0 + row) * work.features + feature] = value;
      return;
    }
    finish_element(work.out, work.bias, row0 + row, feature, value);
  }

  DEVICE void store_all() {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int c = 0; c < kCells; c++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          int feature = warp_feature() + 16 * h + 8 * (r / 2) + lane / 4;
          if constexpr (kFloat) {
            float value = quad_sum(total[h][c][r]);
            int row = 2 * c + r % 2;
            if (row % 4 == lane % 4) store(feature, row, value);
          } else {
            store(feature, 8 * c + lane % 4 * 2 + r % 2, total[h][c][r]);
          }
        }
  }
};

template <class X, int kRows, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kRows <= 16   ? 4
                                               : kRows == 32 ? 12 / kWarps
                                                             : 8 / kWarps)
    int4_linear_kernel(const __grid_constant__ Int4LinearWork work) {
  using Block = Int4LinearBlock<X, kRows, kWarps>;
  Block block(work);
  bool active = block.warp_feature() < work.features;
  auto copy = [&](int stage, char* to) { block.copy_stage(stage, to); };
  auto compute = [&](int stage, int buffer) {
    if (!active) return;
    int tile = block.first_tile + stage * Block::kTiles;
#pragma unroll 1
    for (int i = 0; i < Block::kTiles && tile + i < block.last_tile; i++) block.multiply_tile(tile + i, buffer);
  };
  run_stages(block.stages(), work.plan.stages, work.plan.stage.bytes, copy, compute);
  if (active) block.store_all();
}

template <class X, int kRows, int kWarps>
void launch_int4_linear_tile(const Int4LinearWork& work, void* stream) {
  int64_t row_tiles = (work.rows + kRows - 1) / kRows;
  launch(int4_linear_kernel<X, kRows, kWarps>, row_tiles * work.plan.column_tiles * work.plan.splits, dim3(32 * kWarps),
         size_t(work.plan.shared_bytes()), stream, work);
}

template <class X>
void launch_int4_linear(const Int4LinearWork& work, void* stream) {
  if constexpr (sizeof(X) == 4) {
    launch_int4_linear_tile<X, 8, 4>(work, stream);
  } else {
    bool wide = work.plan.warps == 8;
    if (work.plan.row_tile == 8)
      launch_int4_linear_tile<X, 8, 4>(work, stream);
    else if (work.plan.row_tile == 16)
      launch_int4_linear_tile<X, 16, 4>(work, stream);
    else if (work.plan.row_tile == 32)
      wide ? launch_int4_linear_tile<X, 32, 8>(work, stream) : launch_int4_linear_tile<X, 32, 4>(work, stream);
    else
      wide ? launch_int4_linear_tile<X, 64, 8>(work, stream) : launch_int4_linear_tile<X, 64, 4>(work, stream);
  }
}

}  // namespace torch_kernels
