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
      Base::last_tile, Base::warp_feature;

  static constexpr bool kInt8 = sizeof(X) == 1, kFloat = sizeof(X) == 4;
  // Cell (h, c, r) of a lane is feature 16 h + 8 (r / 2) + lane / 4 of its warp. In the mma's layout row 8 c + 2 (lane
  // % 4) + r % 2; without tensor cores row 2 c + r % 2, of which the four lanes hold shares.
  static constexpr int kCells = kFloat ? kRows / 2 : kRows / 8;
  using Sum = std::conditional_t<kInt8, int, float>;

  Sum sum[2][kCells][4] = {};             // of the current group
  Sum ones[kFloat ? 1 : kCells][4] = {};  // of x over the current group, if zero points need it
  float total[2][kCells][4] = {};
  unsigned zero[2][2] = {};  // constants of decode_int4
  float zero_float[4] = {};  // or their zero points, [2 h + i]

  // Where this lane finds x as B operand: of 16 rows and 32 bytes, or of 8 rows and 64 bytes.
  const int x_offset = kRows == 8 ? swizzled<kRowBytes>(lane % 8, lane / 8)
                                  : swizzled<kRowBytes>(lane / 16 * 8 % kRows + lane % 8, lane / 8 % 2);

  DEVICE explicit Int4LinearBlock(const Int4LinearWork& w) : Base(w) {}

  // Whether groups of 1 << shift sixteens have a boundary in front of this one.
  static DEVICE bool is_boundary(int sixteen, int shift) { return (sixteen & ((1 << shift) - 1)) == 0; }

  DEVICE bool sums_x() const {
    return !kFloat && (kInt8 ? work.zeros.dtype != DType::none : work.zeros.dtype == DType::float32);
  }

  // The first feature of this lane among the parameters of a sixteen's group in its stage.
  DEVICE int parameter(int sixteen, int stage_sixteen) const {
    int group = (sixteen >> work.plan.group_shift) - (stage_sixteen >> work.plan.group_shift);
    return group * kColumnTile + warp * kInt4TileFeatures + lane / 4;
  }

  DEVICE void start_group(int buffer, int sixteen, int stage_sixteen) {
    if (work.zeros.dtype != DType::none && !sums_x())
      work.zeros.load(zero_float, buffer + work.plan.stage.zeros, parameter(sixteen, stage_sixteen));
    if constexpr (!kFloat && !kInt8)
#pragma unroll
      for (int i = 0; i < 4; i++) zero[i / 2][i % 2] = zero_constant<X>(i % 2, zero_float[i]);
  }

  // total += scale * (sum - zero * sum of x); begins the next sum.
  DEVICE void end_group(int buffer, int sixteen, int stage_sixteen) {
    if (sums_x())
      end_group<true>(buffer, sixteen, stage_sixteen);
    else
      end_group<false>(buffer, sixteen, stage_sixteen);
  }
  template <bool kZeros>
  DEVICE void end_group(int buffer, int sixteen, int stage_sixteen) {
    float scale[4], z[4] = {};
    int first = parameter(sixteen, stage_sixteen);
    work.scales.load(scale, buffer + work.plan.stage.scales, first);
    if constexpr (kZeros) work.zeros.load(z, buffer + work.plan.stage.zeros, first);
    if constexpr (kInt8)
#pragma unroll
      for (int i = 0; i < 4; i++) scale[i] *= 0.0625f, z[i] *= 16;  // decode_int4 gives 16 times the weight
    int x_group = (sixteen >> work.plan.sum_shift) - (stage_sixteen >> work.plan.sum_shift);
#pragma unroll
    for (int c = 0; c < kCells; c++) {
      float2 x_scale = make_float2(1, 1);
      if constexpr (kInt8)
        x_scale = shared_array<float>(buffer + work.plan.stage.x_scales, (x_group + 1) * kRows)
                      .template load<float2>(x_group * kRows + c * 8 + lane % 4 * 2);
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float value = float(sum[h][c][r]), factor = scale[2 * h + r / 2];
          if constexpr (kZeros && !kFloat) value = fmaf(-z[2 * h + r / 2], float(ones[c][r % 2]), value);
          if constexpr (kInt8) factor *= r % 2 ? x_scale.y : x_scale.x;
          total[h][c][r] = fmaf(factor, value, total[h][c][r]);
          sum[h][c][r] = 0;
        }
      if constexpr (kZeros && !kFloat)
#pragma unroll
        for (int r = 0; r < 4; r++) ones[c][r] = 0;
    }
  }

  DEVICE void multiply(Sum (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) const {
    if constexpr (kInt8)
      ptx::mma_m16n8k32_s8(d, a, b0, b1);
    else if constexpr (!kFloat)
      mma_m16n8k16<X>(d, a, b0, b1);
  }
  DEVICE void multiply_ones(Sum (&d)[4], unsigned b0, unsigned b1) const {
    constexpr unsigned kOne = kInt8 ? 0x01010101u : std::is_same_v<X, __half> ? 0x3c003c00u : 0x3f803f80u;
    const unsigned one[4] = {kOne, kOne, kOne, kOne};
    multiply(d, one, b0, b1);
  }

  // sum += a x^T for the 8 rows of cell c.
  DEVICE void multiply_rows(int c, const unsigned (&a)[2][4], unsigned b0, unsigned b1) {
    multiply(sum[0][c], a[0], b0, b1);
    multiply(sum[1][c], a[1], b0, b1);
    if (sums_x()) multiply_ones(ones[c], b0, b1);
  }

  // sum += a x^T for steps of 32 bytes along x's rows, from 16-byte chunk `chunk` on. A step is 16 columns, or 32 of
  // int8, of which kHalves can leave out the last (1) or first (2) 16.
  template <int kSteps, int kHalves = 3>
  DEVICE void multiply_steps(const char* x, int chunk, const unsigned (&a)[kSteps][2][4]) {
    auto half = [](unsigned b, int i) { return kHalves >> i & 1 ? b : 0u; };
    if constexpr (kRows == 8 && kSteps == 2) {
      unsigned b[4];
      ptx::ldmatrix_x4(b, x + swizzled_step<kRowBytes>(x_offset, 0, chunk));
      multiply_rows(0, a[0], b[0], b[1]);
      multiply_rows(0, a[1], b[2], b[3]);
    } else if constexpr (kRows == 8) {
      unsigned b[2];
      ptx::ldmatrix_x2(b, x + swizzled_step<kRowBytes>(x_offset, 0, chunk));
      multiply_rows(0, a[0], half(b[0], 0), half(b[1], 1));
    } else {
#pragma unroll
      for (int step = 0; step < kSteps; step++)
#pragma unroll
        for (int c = 0; c < kCells; c += 2) {
          if (c > 0 && c * 8 >= rows) break;
          unsigned b[4];
          ptx::ldmatrix_x4(b, x + swizzled_step<kRowBytes>(x_offset, c * 8, chunk + 2 * step));
          multiply_rows(c, a[step], half(b[0], 0), half(b[1], 1));
          multiply_rows(c + 1, a[step], half(b[2], 0), half(b[3], 1));
        }
    }
  }

  // The same for 16 columns without tensor cores.
  DEVICE void multiply_words(int x, int column, const unsigned (&words)[2]) {
    Shared<float> values = shared_array<float>(x, kRows * kRowBytes / 4);
#pragma unroll
    for (int half = 0; half < 2; half++) {  // columns 0 to 7, 8 to 15
      float w[2][2][2];
#pragma unroll
      for (int i = 0; i < 8; i++)
        w[i / 4][i / 2 % 2][i % 2] =
            int4_to_float(words[i / 4], i / 2 % 2 + 2 * half + 4 * (i % 2)) - zero_float[i / 2];
#pragma unroll
      for (int row = 0; row < kRows; row++) {
        if (row >= rows) break;
        int at = column + 8 * half + lane % 4 * 2;
        float2 v = values.template load<float2>(swizzled<kRowBytes>(row, at / 4) / 4 + at % 4);
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

  // All 64 columns of a tile.
  DEVICE void multiply_tile(const Shared<unsigned>& weights, int x, int column) {
    const uint4 loaded[2] = {weights.template load<uint4>(lane * 4), weights.template load<uint4>(128 + lane * 4)};
    auto word = [&](int h, int j) {
      return j == 0 ? loaded[h].x : j == 1 ? loaded[h].y : j == 2 ? loaded[h].z : loaded[h].w;
    };
    constexpr int kWords = kInt8 ? 2 : 1;  // per step
#pragma unroll
    for (int j = 0; j < 4; j += 2 * kWords) {
      if constexpr (kFloat) {
        multiply_words(x, column + j * 16, {word(0, j), word(1, j)});
        multiply_words(x, column + j * 16 + 16, {word(0, j + 1), word(1, j + 1)});
      } else {
        unsigned a[2][2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int step = i / 2, h = i % 2, first = j + step * kWords;
          if constexpr (kInt8)
            decode_int4(word(h, first), word(h, first + 1), a[step][h]);
          else
            decode_int4<X>(word(h, first), zero[h], a[step][h]);
        }
        multiply_steps<2>(shared + x, (column + j * 16) * int(sizeof(X)) / 16, a);
      }
    }
  }

  // The same where groups of 16 or 32 columns start and end within.
  DEVICE void multiply_tile_in_groups(const Shared<unsigned>& weights, int x, int column, int buffer, int sixteen,
                                      int stage_sixteen) {
    int shift = work.plan.group_shift;
#pragma unroll 1
    for (int j = 0; j < 4; j += kInt8 ? 2 : 1) {
      int at = sixteen + j, chunk = (column + j * 16) * int(sizeof(X)) / 16;
      const unsigned words[2] = {weights[lane * 4 + j], weights[128 + lane * 4 + j]};
      if constexpr (kInt8) {
        const unsigned next[2] = {weights[lane * 4 + j + 1], weights[129 + lane * 4 + j]};
        unsigned a[1][2][4];
        decode_int4(words[0], next[0], a[0][0]);
        decode_int4(words[1], next[1], a[0][1]);
        if (shift == 0) {
          multiply_steps<1, 1>(shared + x, chunk, a);
          end_group(buffer, at, stage_sixteen);
          multiply_steps<1, 2>(shared + x, chunk, a);
        } else {
          multiply_steps<1>(shared + x, chunk, a);
        }
        end_group(buffer, at + 1, stage_sixteen);
      } else {
        if (is_boundary(at, shift)) start_group(buffer, at, stage_sixteen);
        if constexpr (kFloat) {
          multiply_words(x, column + j * 16, words);
        } else {
          unsigned a[1][2][4];
          decode_int4<X>(words[0], zero[0], a[0][0]);
          decode_int4<X>(words[1], zero[1], a[0][1]);
          multiply_steps<1>(shared + x, chunk, a);
        }
        if (is_boundary(at + 1, shift)) end_group(buffer, at, stage_sixteen);
      }
    }
  }

  DEVICE void multiply_stage(int stage, int buffer) {
    int stage_tile = first_tile + stage * kTiles, x = buffer + work.plan.stage.x;
#pragma unroll 1
    for (int i = 0; i < kTiles; i++) {
      int tile = stage_tile + i, sixteen = tile * 4;
      if (tile >= last_tile) break;
      Shared<unsigned> weights =
          shared_array<unsigned>(buffer + (warp * kTiles + i) * kInt4TileBytes, kInt4TileBytes / 4);
      if (work.plan.group_shift < 2) {
        multiply_tile_in_groups(weights, x, i * kInt4TileColumns, buffer, sixteen, stage_tile * 4);
        continue;
      }
      // A group that spans splits is started and scaled in each.
      if (!kInt8 && (is_boundary(sixteen, work.plan.group_shift) || tile == first_tile))
        start_group(buffer, sixteen, stage_tile * 4);
      multiply_tile(weights, x, i * kInt4TileColumns);
      if (is_boundary(sixteen + 4, work.plan.sum_shift) || tile + 1 == last_tile)
        end_group(buffer, sixteen, stage_tile * 4);
    }
  }

  DEVICE void store(int feature, int row, float value) const {
    if (feature >= work.features || row >= rows) return;
    if (work.plan.splits > 1)
      work.partials[(int64_t(split) * work.rows + row0 + row) * work.features + feature] = value;
    else
      finish_element(work.out, work.bias, row0 + row, feature, value);
  }

  DEVICE void store_all() const {
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
  Int4LinearBlock<X, kRows, kWarps> block(work);
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  auto copy = [&](int stage, char* to) { block.copy_stage(stage, to); };
  auto compute = [&](int stage, int buffer) {
    if (block.active) block.multiply_stage(stage, buffer);
  };
  run_stages(block.stages(), work.plan.stages, work.plan.stage.bytes, copy, compute);
  if (block.active) block.store_all();
}

template <class X, int kRows, int kWarps>
void launch_int4_linear_tile(const Int4LinearWork& work, void* stream) {
  int64_t row_tiles = (work.rows + kRows - 1) / kRows;
  launch_kernel(work.x_prepared, int4_linear_kernel<X, kRows, kWarps>,
                row_tiles * work.plan.column_tiles * work.plan.splits, dim3(32 * kWarps),
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
