// SPDX-License-Identifier: Apache-2.0
#include "int4_linear/prepare.cuh"

#include "cuda/dtypes.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace torch_kernels {
namespace {

// The blocks of a grid that are one row's.
unsigned blocks_of(int64_t width, int64_t per_block) { return unsigned((width + per_block - 1) / per_block); }

// The column of x at packed column j, or -1. Whatever perm holds, it is one of x's.
DEVICE int64_t source_column(const Tensor& perm, int64_t columns, int64_t j) {
  int64_t column = !perm ? j : j < perm.size[0] ? *perm.at<const int32_t>(j) : -1;
  return column >= 0 && column < columns ? column : -1;
}

template <class T>
__global__ void __launch_bounds__(256)
    gather_columns_kernel(T* to, Tensor x, Tensor perm, int64_t row0, int64_t width, unsigned blocks) {
  ptx::let_next_kernel_start();
  int64_t row = blockIdx.x / blocks, j = blockIdx.x % blocks * 256 + threadIdx.x;
  if (j >= width) return;
  int64_t column = source_column(perm, x.size[1], j);
  to[row * width + j] = column < 0 ? T(0) : *x.at<const T>(row0 + row, column);
}

// One warp per row and group.
template <class T>
__global__ void __launch_bounds__(128)
    quantise_columns_kernel(int8_t* to, float* scales, Tensor x, Tensor perm, int64_t row0, int64_t width,
                            int group_shift, int64_t scale_stride, unsigned blocks) {
  ptx::let_next_kernel_start();
  int group_columns = 16 << group_shift, lane = threadIdx.x % 32;
  int64_t row = blockIdx.x / blocks, group = blockIdx.x % blocks * 4 + threadIdx.x / 32;
  if (group * group_columns >= width) return;

  // Lane i has the words (four packed bytes) i and so on of the group, of which there are at most 32.
  int64_t word = group * group_columns / 4 + lane;
  bool exists = lane < group_columns / 4 && word < width / 4;
  float value[4] = {};
  unsigned largest = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int64_t column = exists ? source_column(perm, x.size[1], word / 4 * 16 + word % 4 * 2 + i / 2 + 8 * (i % 2)) : -1;
    if (column >= 0) value[i] = to_float(*x.at<const T>(row0 + row, column));
    unsigned magnitude = __float_as_uint(value[i]) & 0x7fffffffu;  // its order as integers puts NaN above infinity
    if (magnitude > largest) largest = magnitude;
  }
  largest = __reduce_max_sync(0xffffffffu, largest);
  float scale = __uint_as_float(largest) / 127.f;
  bool usable = scale > 0 && largest < 0x7f800000u;
  unsigned packed = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float q = usable ? fminf(fmaxf(rintf(value[i] / scale), -127.f), 127.f) : 0.f;
    packed |= (unsigned(int(q)) & 255u) << 8 * i;
  }
  if (exists) reinterpret_cast<unsigned*>(to + row * width)[word] = packed;
  if (lane == 0) scales[group * scale_stride + row] = scale;
}

}  // namespace

Tensor aligned_weight(const Tensor& weight, const Context& context) {
  if (reinterpret_cast<uint64_t>(weight.data) % 16 == 0) return weight;
  Tensor words{.data = weight.data, .dtype = DType::float32, .rank = 2};
  words.size[0] = weight.size[0] * weight.size[1], words.size[1] = words.stride[0] = kInt4TileBytes / 4;
  words.stride[1] = 1;
  Tensor copy = weight;
  copy.data = context.allocate(words.size[0] * kInt4TileBytes);
  gather_columns(copy.data, words, Tensor{}, 0, words.size[0], words.size[1], context.stream);
  return copy;
}

void gather_columns(void* to, const Tensor& x, const Tensor& perm, int64_t row0, int64_t rows, int64_t width,
                    void* stream) {
  unsigned blocks = blocks_of(width, 256);
  if (x.dtype == DType::float32)
    launch(gather_columns_kernel<uint32_t>, rows * blocks, dim3(256), 0, stream, static_cast<uint32_t*>(to), x, perm,
           row0, width, blocks);
  else
    launch(gather_columns_kernel<uint16_t>, rows * blocks, dim3(256), 0, stream, static_cast<uint16_t*>(to), x, perm,
           row0, width, blocks);
}

void quantise_columns(int8_t* to, float* scales, const Tensor& x, const Tensor& perm, int64_t row0, int64_t rows,
                      int64_t width, int group_shift, int64_t scale_stride, void* stream) {
  unsigned blocks = blocks_of(width, 4 * (16 << group_shift));
  for_each_dtype(x.dtype, [&]<class T>(T) {
    launch(quantise_columns_kernel<T>, rows * blocks, dim3(128), 0, stream, to, scales, x, perm, row0, width,
           group_shift, scale_stride, blocks);
  });
}

}  // namespace torch_kernels
