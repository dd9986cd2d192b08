// SPDX-License-Identifier: Apache-2.0
// int8_quantize: which columns hold outliers, then rows of x as int8. Every row's integers depend on all rows'
// outliers, so there are two kernels; for a few rows one, whose blocks all look at all rows.
#include <algorithm>

#include "cuda/dtypes.cuh"
#include "int8_linear/kernels.h"
#include "int8_linear/quantize.cuh"
#include "int8_linear/rows.cuh"

namespace torch_kernels {
namespace {

constexpr int kFewRows = 16, kHeld = 4;

// Bit i: element i is an outlier. Infinities are, NaN is not.
template <class T>
DEVICE unsigned outlier_bits(const Pack<T, 8>& x, float threshold) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) bits |= unsigned(fabsf(x[i]) >= threshold) << i;
  return bits;
}

// Four bytes of 0 or 1 as bits, bits as bytes of 0 or 255: products whose terms do not overlap.
DEVICE unsigned bits_of_flags(unsigned flags) { return flags * 0x10204080u >> 28; }
DEVICE unsigned bytes_of_bits(unsigned bits) { return ((bits & 15) * 0x00204081u & 0x01010101u) * 255; }

__global__ void __launch_bounds__(256) clear_kernel(uint8_t* bytes, int count) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) bytes[i] = 0;
}

// A block of 32 x 8 threads owns 256 columns of a slab of rows. With several slabs the flags are 0 before, and blocks
// that find the same column write the same value.
template <class T>
__global__ void __launch_bounds__(256) find_outliers_kernel(QuantizeRows p, int slab_rows, bool aligned) {
  const Shared<unsigned> found = shared_array<unsigned>(0, 256);
  int lane = threadIdx.x, warp = threadIdx.y, column = (blockIdx.x * 32 + lane) * 8;
  int64_t row = int64_t(blockIdx.y) * slab_rows, last = min(row + slab_rows, p.x.size[0]);
  int valid = int(min(p.x.size[1] - column, int64_t(8)));
  unsigned bits = 0;
  if (valid > 0)
#pragma unroll 4
    for (row += warp; row < last; row += 8) {
      Pack<T, 8> x;
      x.load(p.x.at<const T>(row, column), valid, aligned);
      bits |= outlier_bits(x, p.threshold);
    }
  found[warp * 32 + lane] = bits;
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < 8; w++) bits |= found[w * 32 + lane];
  for (int i = 0; i < 8; i++)
    if (column + i < p.q_columns && (gridDim.y == 1 || bits >> i & 1)) p.outliers[column + i] = bits >> i & 1;
}

// blockDim.x threads share a row, blockDim.y rows a block. A thread holds on to the first elements it reads, so that
// rows of up to kHeld * 8 * blockDim.x columns are read once.
// kFind: this kernel finds the outliers itself.
template <class T, bool kFind>
struct RowQuantizer {
  const QuantizeRows& p;
  const bool x_aligned, q_aligned;
  const int64_t row;
  const bool live;

  DEVICE RowQuantizer(const QuantizeRows& work, bool x_aligned, bool q_aligned)
      : p(work),
        x_aligned(x_aligned),
        q_aligned(q_aligned),
        row(int64_t(blockIdx.x) * blockDim.y + threadIdx.y),
        live(row < work.x.size[0]) {}

  DEVICE Pack<T, 8> load(int64_t from_row, int column) const {
    int64_t left = from_row < p.x.size[0] ? p.x.size[1] - column : 0;
    int valid = int(max(min(left, int64_t(8)), int64_t(0)));
    Pack<T, 8> x;
    x.load(valid ? p.x.at<const T>(from_row, column) : p.x.at<const T>(), valid, x_aligned);
    return x;
  }

  // Which of the eight columns are set to 0.
  DEVICE unsigned outlier_columns(int column) const {
    unsigned bits = 0;
    if constexpr (!kFind) {
      if (p.threshold == 0) return 0;
      const uint8_t* flags = p.outliers + column;
      if (reinterpret_cast<uint64_t>(flags) % 8 == 0 && column + 8 <= p.q_columns) {
        uint2 eight = *reinterpret_cast<const uint2*>(flags);
        return bits_of_flags(eight.x) | bits_of_flags(eight.y) << 4;
      }
      for (int i = 0; i < 8; i++)
        if (column + i < p.q_columns) bits |= unsigned(flags[i]) << i;
    } else {
      int64_t rows = p.x.size[0];
#pragma unroll 4
      for (int64_t r = 0; r < rows; r++) bits |= outlier_bits(load(r, column), p.threshold);
    }
    return bits;
  }

  DEVICE unsigned largest(const Pack<T, 8>& x) const {
    unsigned bits = 0;
    if (kFind || p.threshold > 0) {
#pragma unroll
      for (int i = 0; i < 8; i++) bits = max(bits, fabsf(x[i]) >= p.threshold ? 0u : magnitude_bits(x[i]));
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) bits = max(bits, magnitude_bits(x[i]));
    }
    return bits;
  }

  DEVICE void write(const Pack<T, 8>& x, int column, unsigned outliers, const RowSteps& steps) const {
    unsigned bytes[8];
#pragma unroll
    for (int i = 0; i < 8; i++) bytes[i] = steps(x[i]);
    unsigned low = pack_bytes(bytes[0], bytes[1], bytes[2], bytes[3]) & ~bytes_of_bits(outliers);
    unsigned high = pack_bytes(bytes[4], bytes[5], bytes[6], bytes[7]) & ~bytes_of_bits(outliers >> 4);
    int8_t* to = p.q + row * p.q_stride + column;
    if (q_aligned && column + 8 <= p.q_columns) {
      *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
    } else {
      for (int i = 0; i < 8; i++)
        if (column + i < p.q_columns) to[i] = int8_t((i < 4 ? low : high) >> (i % 4 * 8));
    }
  }

  DEVICE void run() const {
    int first = int(threadIdx.x) * 8, step = int(blockDim.x) * 8;
    if (blockIdx.x == 0 && threadIdx.y == 0)
      for (int i = threadIdx.x; i < p.counter_count; i += blockDim.x) p.counters[i] = 0;

    Pack<T, 8> held[kHeld];
    unsigned outliers[kHeld], top = 0;
#pragma unroll
    for (int i = 0; i < kHeld; i++)
      if (first + i * step < p.q_columns) held[i] = load(row, first + i * step);
#pragma unroll
    for (int i = 0; i < kHeld; i++)
      if (first + i * step < p.q_columns) {
        outliers[i] = outlier_columns(first + i * step);
        top = max(top, largest(held[i]));
      }
#pragma unroll 2
    for (int column = first + kHeld * step; column < p.q_columns; column += step)
      top = max(top, largest(load(row, column)));
    top = row_maximum(top, shared_array<unsigned>(0, blockDim.x * blockDim.y / 32));
    float scale = row_scale(top, p.x_scale, p.levels);
    if (live && threadIdx.x == 0) p.scale[row] = scale;

    RowSteps steps(scale, p.levels);
    auto finish = [&](const Pack<T, 8>& x, int column, unsigned outliers) {
      if (live) write(x, column, outliers, steps);
      if (row == 0 && p.outliers && (kFind || p.threshold == 0))
        for (int i = 0; i < 8; i++)
          if (column + i < p.q_columns) p.outliers[column + i] = outliers >> i & 1;
    };
#pragma unroll
    for (int i = 0; i < kHeld; i++)
      if (first + i * step < p.q_columns) finish(held[i], first + i * step, outliers[i]);
#pragma unroll 1
    for (int column = first + kHeld * step; column < p.q_columns; column += step)
      finish(load(row, column), column, outlier_columns(column));
  }
};

template <class T, bool kFind>
__global__ void __launch_bounds__(512, kFind || sizeof(T) == 4 ? 1 : 2)
    quantize_rows_kernel(QuantizeRows p, bool x_aligned, bool q_aligned) {
  ptx::let_next_kernel_start();
  RowQuantizer<T, kFind>(p, x_aligned, q_aligned).run();
}

template <class T>
void launch_quantize_rows(QuantizeRows p, const Context& context) {
  int64_t rows = p.x.size[0], packs = (p.q_columns + 7) / 8;
  bool x_aligned = aligned_to(p.x, 16);
  bool q_aligned = (reinterpret_cast<uint64_t>(p.q) | uint64_t(p.q_stride)) % 8 == 0;
  if (p.threshold > 0 && rows > kFewRows && packs > 0) {
    unsigned strips = unsigned((packs + 31) / 32);
    int64_t slabs = std::clamp<int64_t>(1024 / strips, 1, (rows + 63) / 64), slab_rows = (rows + slabs - 1) / slabs;
    slabs = (rows + slab_rows - 1) / slab_rows;
    if (slabs > 1)
      launch(clear_kernel, dim3(unsigned(p.q_columns + 255) / 256), dim3(256), 0, context.stream, p.outliers,
             p.q_columns);
    launch(find_outliers_kernel<T>, dim3(strips, unsigned(slabs)), dim3(32, 8), 1024, context.stream, p, int(slab_rows),
           x_aligned);
  }
  // Few rows: the more threads the sooner done. Many: all that a thread can hold in flight.
  int64_t per_thread = rows > 256 ? kHeld : 1;
  int64_t threads = std::clamp<int64_t>((packs + 32 * per_thread - 1) / (32 * per_thread) * 32, 32, 512);
  int64_t rows_per_block = std::max<int64_t>(1, 128 / threads);
  auto start = [&]<bool kFind>() {
    launch(quantize_rows_kernel<T, kFind>,
           dim3(unsigned(std::max<int64_t>(1, (rows + rows_per_block - 1) / rows_per_block))),
           dim3(unsigned(threads), unsigned(rows_per_block)), size_t(threads * rows_per_block / 32 * 4), context.stream,
           p, x_aligned, q_aligned);
  };
  if (p.threshold > 0 && rows <= kFewRows)
    start.template operator()<true>();
  else
    start.template operator()<false>();
}

}  // namespace

void quantize_rows(const QuantizeRows& work, const Context& context) {
  for_each_dtype(work.x.dtype, [&]<class T>(T) { launch_quantize_rows<T>(work, context); });
}

namespace cuda {

void int8_quantize(const Int8QuantizeParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  int64_t columns = p.x.size[1];
  if (columns == 0 && p.x.size[0] == 0) return;
  quantize_rows({.x = p.x,
                 .q = p.q.at<int8_t>(),
                 .q_stride = columns,
                 .q_columns = int(columns),
                 .scale = p.scale.at<float>(),
                 .x_scale = nullptr,
                 .outliers = p.outliers.at<uint8_t>(),
                 .threshold = float(p.threshold)},
                context);
}

}  // namespace cuda
}  // namespace torch_kernels
