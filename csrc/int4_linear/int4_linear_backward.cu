// SPDX-License-Identifier: Apache-2.0
// dx = grad W, W decoded a tile at a time.
//
// The products are W^T grad^T. A warp owns 64 columns of W and all rows of the block; it walks along the features in
// steps of 16, for which a lane's 16 bytes of the packed weight decode to four A operands. Those hold W by rows of
// features, so each of their 8x8 tiles is transposed in registers. Scales differ along the sum here: weights are scaled
// before the product and rounded to grad's dtype, as W.to(dtype) would be.
#include "cuda/dtypes.cuh"
#include "int4_linear/decode.cuh"
#include "int4_linear/kernels.h"
#include "int4_linear/prepare.cuh"
#include "int4_linear/stages.cuh"

namespace torch_kernels {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kColumnTile = kInt4TileColumns * kWarps;
constexpr int kFeatures = 64, kTiles = kFeatures / kInt4TileFeatures;  // of a stage

struct Int4BackwardWork {
  Int4Stage stage;
  int stages;
  int group_shift;
  const char* grad;  // rows whose starts are 16-byte aligned
  int64_t grad_row_bytes;
  int grad_columns;  // that exist
  int rows, row_tiles;
  Tensor weight, perm;
  Int4Parameters scales, zeros;
  Tensor out;
};

template <class T>
DEVICE unsigned multiply_pair(unsigned a, unsigned b) {
  if constexpr (std::is_same_v<T, __half>) return bits_of(__hmul2(half2_of(a), half2_of(b)));
  return bits_of(__hmul2(bfloat162_of(a), bfloat162_of(b)));
}

template <class T, int kRows>
struct Int4BackwardBlock {
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kRowBytes = kFeatures * int(sizeof(T));
  // Cell (j, c, r) of a lane, as the mma has it: column 16 j + 8 (r / 2) + lane / 4 of its warp, row 8 c + 2 (lane % 4)
  // + r % 2. Without tensor cores: column 16 j + 2 (lane % 4) + 8 (r / 2) + r % 2, row c, of which the eight lanes with
  // that lane % 4 hold shares.
  static constexpr int kCells = kFloat ? kRows : kRows / 8;

  const Int4BackwardWork& work;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row0 = int(blockIdx.x % work.row_tiles) * kRows, rows = min(work.rows - row0, kRows);
  const int tile_k = int(blockIdx.x / work.row_tiles) * kWarps + warp;
  const bool active = tile_k < work.weight.size[1];  // whether this warp has columns
  const int block_group = (tile_k - warp) * 4 >> work.group_shift;
  const int groups = max(1, kColumnTile / 16 >> work.group_shift);
  char* const shared = dynamic_shared<char>();
  float total[4][kCells][4] = {};

  DEVICE explicit Int4BackwardBlock(const Int4BackwardWork& w) : work(w) {}

  DEVICE void copy_stage(int stage, char* to) const {
#pragma unroll
    for (int i = 0; i < kTiles; i++)
      if (active && stage * kTiles + i < work.weight.size[0])
        copy_weight_tile(to + (warp * kTiles + i) * kInt4TileBytes,
                         weight_tile(work.weight, stage * kTiles + i, tile_k, lane), lane);
    constexpr int kChunks = kRowBytes / 16;
    int chunk = thread % kChunks, feature = stage * kFeatures;
    int valid = (work.grad_columns - feature) * int(sizeof(T)) - chunk * 16;
    valid = min(max(valid, 0), 16);
    const char* grad = work.grad + row0 * work.grad_row_bytes;
    if (valid) grad += int64_t(feature) * int(sizeof(T)) + chunk * 16;
#pragma unroll
    for (int row = thread / kChunks; row < kRows; row += kThreads / kChunks)
      if (row < rows)
        ptx::cp_async_16(to + work.stage.x + swizzled<kRowBytes>(row, chunk), grad + row * work.grad_row_bytes, valid);
    work.scales.template copy<kThreads, kFeatures>(to + work.stage.scales, block_group, groups, feature);
    work.zeros.template copy<kThreads, kFeatures>(to + work.stage.zeros, block_group, groups, feature);
  }

  // Scales and zero points, less 8, of features lane / 4 + 8 i of 16, for 16 columns.
  struct Parameters {
    float scale[2], zero[2] = {0, 0};
  };
  DEVICE Parameters parameters(int buffer, int feature, int j) const {
    Parameters p;
    int group = ((tile_k * 4 + j) >> work.group_shift) - block_group, first = group * kFeatures + feature + lane / 4;
    work.scales.load(p.scale, buffer + work.stage.scales, first);
    if (work.zeros.dtype != DType::none) work.zeros.load(p.zero, buffer + work.stage.zeros, first);
    return p;
  }

  // The transposed weight of 16 columns and 16 features as A operand of m16n8k16.
  DEVICE void decode(unsigned word, const Parameters& p, unsigned (&a)[4]) const {
    // A scale of grad's own dtype and an integer zero point: one rounding in 16-bit arithmetic.
    bool same_type = work.scales.dtype == (std::is_same_v<T, __half> ? DType::float16 : DType::bfloat16) &&
                     work.zeros.dtype != DType::float32;
    unsigned w[4];
    if (same_type) {
      const unsigned zero[2] = {zero_constant<T>(0, p.zero[0]), zero_constant<T>(1, p.zero[1])};
      decode_int4<T>(word, zero, w);
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = multiply_pair<T>(w[i], pack<T>(p.scale[i % 2], p.scale[i % 2]));
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        w[i] = pack<T>(p.scale[i % 2] * (int4_to_float(word, i) - p.zero[i % 2]),
                       p.scale[i % 2] * (int4_to_float(word, i + 4) - p.zero[i % 2]));
    }
    // Tile (features 8 i, columns 8 f) is w[i + 2 f]; of the transposed operand it is register f + 2 i.
#pragma unroll
    for (int i = 0; i < 4; i++) a[i / 2 + i % 2 * 2] = ptx::transpose_8x8(w[i]);
  }

  // total += W^T grad^T for 16 features.
  DEVICE void multiply_features(const uint4& loaded, int buffer, int feature) {
    unsigned a[4][4];
    Parameters p = parameters(buffer, feature, 0);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j > 0 && work.group_shift < 2) p = parameters(buffer, feature, j);
      decode((&loaded.x)[j], p, a[j]);
    }
    const char* grad = shared + buffer + work.stage.x;
    int offset = swizzled<kRowBytes>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int c = 0; c < kCells; c += 2) {
      if (c * 8 >= rows) break;
      unsigned b[4];
      ptx::ldmatrix_x4(b, grad + swizzled_step<kRowBytes>(offset, c * 8, feature / 8));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        mma_m16n8k16<T>(total[j][c], a[j], b[0], b[1]);
        mma_m16n8k16<T>(total[j][c + 1], a[j], b[2], b[3]);
      }
    }
  }

  // The same without tensor cores.
  DEVICE void multiply_floats(const uint4& loaded, int buffer, int feature) {
    Shared<float> values = shared_array<float>(buffer + work.stage.x, kRows * kFeatures);
    float grad[kRows][2];
#pragma unroll
    for (int row = 0; row < kRows; row++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int at = feature + 8 * i + lane / 4;
        grad[row][i] = row < rows ? float(values[swizzled<kRowBytes>(row, at / 4) / 4 + at % 4]) : 0.f;
      }
    Parameters p = parameters(buffer, feature, 0);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j > 0 && work.group_shift < 2) p = parameters(buffer, feature, j);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float w = p.scale[i] * (int4_to_float((&loaded.x)[j], i + r / 2 * 2 + r % 2 * 4) - p.zero[i]);
#pragma unroll
          for (int row = 0; row < kRows; row++) total[j][row][r] = fmaf(w, grad[row][i], total[j][row][r]);
        }
    }
  }

  DEVICE void multiply_stage(int stage, int buffer) {
    Shared<unsigned> weights =
        shared_array<unsigned>(buffer + warp * kTiles * kInt4TileBytes, kTiles * kInt4TileBytes / 4);
#pragma unroll 1
    for (int step = 0; step < kFeatures / 16; step++) {
      if (stage * kTiles + step / 2 >= work.weight.size[0]) break;
      uint4 loaded = weights.template load<uint4>(step * 128 + lane * 4);
      if constexpr (kFloat)
        multiply_floats(loaded, buffer, step * 16);
      else
        multiply_features(loaded, buffer, step * 16);
    }
  }

  DEVICE void store(int64_t column, int row, float value) const {
    if (row >= rows) return;
    if (work.perm) column = column < work.perm.size[0] ? *work.perm.at<const int32_t>(column) : -1;
    if (column < 0 || column >= work.out.size[1]) return;
    *work.out.at<T>(row0 + row, column) = from_float<T>(value);
  }

  DEVICE void store_all() const {
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int c = 0; c < kCells; c++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          int64_t column = int64_t(tile_k) * kInt4TileColumns + 16 * j;
          float value = total[j][c][r];
          if constexpr (kFloat) {
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
            if (lane / 4 == c) store(column + lane % 4 * 2 + 8 * (r / 2) + r % 2, c, value);
          } else {
            store(column + 8 * (r / 2) + lane / 4, 8 * c + lane % 4 * 2 + r % 2, value);
          }
        }
  }
};

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 2)
    int4_linear_backward_kernel(const __grid_constant__ Int4BackwardWork work) {
  Int4BackwardBlock<T, kRows> block(work);
  auto copy = [&](int stage, char* to) { block.copy_stage(stage, to); };
  auto compute = [&](int stage, int buffer) {
    if (block.active) block.multiply_stage(stage, buffer);
  };
  run_stages(int((work.weight.size[0] + kTiles - 1) / kTiles), work.stages, work.stage.bytes, copy, compute);
  if (block.active) block.store_all();
}

// Columns that no packed column comes from have gradient zero.
template <class T>
__global__ void __launch_bounds__(256) zero_kernel(Tensor out, unsigned blocks) {
  int64_t column = blockIdx.x % blocks * 256 + threadIdx.x;
  if (column < out.size[1]) *out.at<T>(blockIdx.x / blocks, column) = T(0);
}

template <class T>
void run(const Int4LinearBackwardParams& p, const Context& context) {
  constexpr int kRows = sizeof(T) == 4 ? 8 : 64;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  int64_t rows = p.grad.size[0];
  unsigned row_blocks = unsigned((p.out.size[1] + 255) / 256);
  if (p.perm) launch(zero_kernel<Bits>, rows * row_blocks, dim3(256), 0, context.stream, p.out, row_blocks);

  Int4BackwardWork work{};
  work.group_shift = int4_group_shift(p.group_size);
  int groups = std::max(1, kColumnTile / 16 >> work.group_shift);
  int scale_bytes = groups * kFeatures * int(size_of(p.scales.dtype));
  work.stage.x = kWarps * kTiles * kInt4TileBytes;
  work.stage.scales = work.stage.x + kRows * kFeatures * int(sizeof(T));
  work.stage.zeros = work.stage.scales + scale_bytes;
  work.stage.bytes = work.stage.zeros + groups * kFeatures * int(size_of(p.zeros.dtype));
  work.stages = std::min(kInt4MaxStages / 2, kSharedBytes / work.stage.bytes);

  bool direct = copy_width(reinterpret_cast<uint64_t>(p.grad.data) | uint64_t(p.grad.stride[0]) * sizeof(T)) == 16;
  int64_t width = p.weight.size[0] * kInt4TileFeatures, width_bytes = std::max<int64_t>(1, width * int64_t(sizeof(T)));
  int64_t slab = direct ? rows : std::min(rows, std::max<int64_t>(1, kInt4Workspace / width_bytes / kRows) * kRows);
  void* copy = direct ? nullptr : context.allocate(slab * width_bytes);
  work.grad_row_bytes = (direct ? p.grad.stride[0] : width) * int64_t(sizeof(T));
  work.grad_columns = int(direct ? p.grad.size[1] : width);
  work.weight = aligned_weight(p.weight, context), work.scales = Int4Parameters(p.scales);
  if (p.zeros) work.zeros = Int4Parameters(p.zeros);
  work.perm = p.perm, work.out = p.out;
  int64_t column_tiles = (p.weight.size[1] + kWarps - 1) / kWarps;
  for (int64_t row0 = 0; row0 < rows; row0 += slab) {
    work.rows = int(std::min(slab, rows - row0));
    work.row_tiles = (work.rows + kRows - 1) / kRows;
    work.out.data = p.out.at<T>(row0);
    work.grad = direct ? reinterpret_cast<const char*>(p.grad.at<const T>(row0)) : static_cast<const char*>(copy);
    if (!direct) gather_columns(copy, p.grad, Tensor{}, row0, work.rows, width, context.stream);
    launch(int4_linear_backward_kernel<T, kRows>, work.row_tiles * column_tiles, dim3(kThreads),
           size_t(work.stages * work.stage.bytes), context.stream, work);
  }
}

}  // namespace

namespace cuda {

void int4_linear_backward(const Int4LinearBackwardParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  if (p.out.elements() == 0) return;
  for_each_dtype(p.out.dtype, [&]<class T>(T) { run<T>(p, context); });
}

}  // namespace cuda
}  // namespace torch_kernels
