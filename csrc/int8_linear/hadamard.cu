// SPDX-License-Identifier: Apache-2.0
// hadamard_transform and rotate_quantize. Rows that fit in a block's shared memory take one kernel. Longer ones are cut
// into pieces, whose transforms (float32, in a workspace) further kernels combine.
#include "int8_linear/hadamard.cuh"

#include <algorithm>

#include "cuda/floats.cuh"
#include "int8_linear/kernels.h"
#include "int8_linear/quantize.cuh"

namespace torch_kernels {
namespace {

// A power of two's two highest bits count as base 4.
struct Factors {
  int base, power;
};

Factors factors_of(int64_t n) {
  int base = n % 3 == 0 ? 12 : n % 5 == 0 ? 20 : 1, power = 0;
  while (int64_t(base) << power < n) power++;
  return {base, power};
}

template <int kBase, bool kQuantize>
__global__ void __launch_bounds__(kBase == 4 ? 1024 : 512) rotate_kernel(RotateWork work) {
  RotateBlock<kBase, kQuantize>(work).run();
}

template <int kBase>
size_t rotate_shared_bytes(int power, int rows) {
  int threads = (1 << power) / RotateBlock<kBase, true>::kWide;
  return size_t(rows) * RotateBlock<kBase, true>::row_words(power) * 4 + size_t(threads * rows + 31) / 32 * 4;
}

template <int kBase>
bool fits(int power, const Context& context) {
  return power <= (kBase == 4 ? 13 : 11) && rotate_shared_bytes<kBase>(power, 1) <= shared_memory_limit(context.device);
}

template <int kBase>
void launch_rotate(const RotateWork& work, bool quantize, const Context& context) {
  int threads = (1 << work.power) / RotateBlock<kBase, true>::kWide, rows = std::max(1, 128 / threads);
  int64_t pieces = work.x.size[0] * work.pieces;
  dim3 grid(unsigned((pieces + rows - 1) / rows)), block { unsigned(threads), unsigned(rows) };
  size_t shared = rotate_shared_bytes<kBase>(work.power, rows);
  if (quantize)
    launch(rotate_kernel<kBase, true>, grid, block, shared, context.stream, work);
  else
    launch(rotate_kernel<kBase, false>, grid, block, shared, context.stream, work);
}

// --- The shortest rows: every element is a sum over the row ---

constexpr int kShortThreads = 256;

__global__ void __launch_bounds__(kShortThreads)
    rotate_short_kernel(RotateWork work, int base, int rows, bool quantize) {
  int n = base << work.power;
  const Shared<float> x = shared_array<float>(0, rows * n), y = shared_array<float>(rows * n * 4, rows * n);
  int64_t row0 = int64_t(blockIdx.x) * rows;
  int count = int(min(int64_t(rows), work.x.size[0] - row0)) * n;
  for (int i = threadIdx.x; i < count; i += kShortThreads) {
    float value = load_float(work.x, row0 + i / n, i % n);
    if (work.signs) value *= work.signs[i % n];
    x[i] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kShortThreads) {
    int row = i / n * n, column = i % n, low = (1 << work.power) - 1;
    float sum = 0;
    for (int j = 0; j < n; j++) {
      bool negative = __popc(column & j & low) & 1;
      if (base == 12) negative ^= base_negative<12>(column >> work.power, j >> work.power);
      if (base == 20) negative ^= base_negative<20>(column >> work.power, j >> work.power);
      float value = x[row + j];
      sum += negative ? -value : value;
    }
    sum *= work.factor;
    if (work.smooth) sum = __fdiv_rn(sum, work.smooth[column]);
    y[i] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kShortThreads) {
    float value = y[i];
    if (!quantize) {
      store_float(work.out, value, row0 + i / n, i % n);
      continue;
    }
    unsigned largest = 0;
    for (int j = 0; j < n; j++) largest = max(largest, magnitude_bits(y[i / n * n + j]));
    float scale = row_scale(largest, work.x_scale, work.levels);
    if (i % n == 0) work.scale[row0 + i / n] = scale;
    work.out.at<int8_t>()[row0 * n + i] = int8_t(RowSteps(scale, work.levels)(value));
  }
}

// --- Long rows ---

// Combines kOrder neighbouring pieces of `length` elements, in place. The last call has whole rows: it writes `out`.
template <int kOrder>
__global__ void __launch_bounds__(256) combine_kernel(float* pieces, int64_t count, int64_t length, bool last,
                                                      Tensor out, float factor, const float* smooth) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  int64_t at = i / length * kOrder * length + i % length;
  float values[kOrder];
#pragma unroll
  for (int j = 0; j < kOrder; j++) values[j] = pieces[at + j * length];
  transform_base<kOrder, 1>(values, 0);
#pragma unroll
  for (int j = 0; j < kOrder; j++) {
    if (!last) {
      pieces[at + j * length] = values[j];
      continue;
    }
    float value = values[j] * factor;
    int64_t column = i % length + j * length;
    if (smooth) value = __fdiv_rn(value, smooth[column]);
    store_float(out, value, i / length, column);
  }
}

Tensor contiguous_floats(float* data, int64_t rows, int64_t columns) {
  Tensor tensor;
  tensor.data = data, tensor.dtype = DType::float32, tensor.rank = 2;
  tensor.size[0] = rows, tensor.size[1] = columns, tensor.stride[0] = columns, tensor.stride[1] = 1;
  return tensor;
}

void rotate_long(RotateWork work, Factors factors, bool quantize, const Context& context) {
  int64_t rows = work.x.size[0], n = work.x.size[1];
  int power = factors.power;  // of a piece
  for (; power > 13; power -= 3) {
  }
  Tensor pieces = contiguous_floats(static_cast<float*>(context.allocate(rows * n * 4)), rows, n);
  RotateWork piecewise = work;
  piecewise.out = pieces, piecewise.pieces = int(n >> power), piecewise.power = power - 2, piecewise.factor = 1;
  launch_rotate<4>(piecewise, false, context);

  Tensor out = quantize ? pieces : work.out;
  auto combine = [&]<int kOrder>(int64_t length) {
    int64_t count = rows * n / kOrder;
    launch(combine_kernel<kOrder>, dim3(unsigned((count + 255) / 256)), dim3(256), 0, context.stream,
           pieces.at<float>(), count, length, length * kOrder == n, out, work.factor, work.smooth);
  };
  for (; power < factors.power; power += 3) combine.template operator()<8>(int64_t(1) << power);
  if (factors.base == 12) combine.template operator()<12>(int64_t(1) << power);
  if (factors.base == 20) combine.template operator()<20>(int64_t(1) << power);
  if (quantize)
    quantize_rows({.x = pieces,
                   .q = work.out.at<int8_t>(),
                   .q_stride = n,
                   .q_columns = int(n),
                   .scale = work.scale,
                   .x_scale = work.x_scale,
                   .outliers = nullptr,
                   .threshold = 0,
                   .levels = work.levels},
                  context);
}

void rotate(RotateWork work, bool quantize, const Context& context) {
  DeviceGuard guard(context.device);
  if (work.out.elements() == 0) return;
  Factors factors = factors_of(work.x.size[1]);
  work.pieces = 1, work.aligned = aligned_to(work.x, 16);
  if (factors.base == 1 ? factors.power < 5 : factors.power < 2) {
    int n = int(work.x.size[1]), rows = std::max(1, kShortThreads / n);
    work.power = factors.power;
    launch(rotate_short_kernel, dim3(unsigned((work.x.size[0] + rows - 1) / rows)), dim3(kShortThreads),
           size_t(rows) * n * 8, context.stream, work, factors.base, rows, quantize);
  } else if (factors.base == 1 && fits<4>(factors.power - 2, context)) {
    work.power = factors.power - 2;
    launch_rotate<4>(work, quantize, context);
  } else if (factors.base == 12 && fits<12>(factors.power, context)) {
    work.power = factors.power;
    launch_rotate<12>(work, quantize, context);
  } else if (factors.base == 20 && fits<20>(factors.power, context)) {
    work.power = factors.power;
    launch_rotate<20>(work, quantize, context);
  } else {
    rotate_long(work, factors, quantize, context);
  }
}

}  // namespace

namespace cuda {

void hadamard_transform(const HadamardParams& p, const Context& context) {
  RotateWork work = {};
  work.x = p.x, work.out = p.out, work.factor = float(p.scale);
  rotate(work, false, context);
}

void rotate_quantize(const RotateQuantizeParams& p, const Context& context) {
  RotateWork work = {};
  work.x = p.x, work.out = p.q;
  work.signs = p.signs ? p.signs.at<const float>() : nullptr;
  work.smooth = p.smooth ? p.smooth.at<const float>() : nullptr;
  work.factor = float(1 / std::sqrt(double(p.x.size[1])));
  work.scale = p.scale.at<float>(), work.x_scale = p.x_scale ? p.x_scale.at<const float>() : nullptr;
  work.levels = (1 << (p.bits - 1)) - 1;
  rotate(work, true, context);
}

}  // namespace cuda
}  // namespace torch_kernels
