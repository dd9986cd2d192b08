// SPDX-License-Identifier: Apache-2.0
// Rows of activations as the kernels of this family read and quantise them: eight elements at a time.
#pragma once
#include <math.h>

#include "cuda/launch.cuh"
#include "cuda/pack.cuh"
#include "int8_linear/params.h"

namespace torch_kernels {

inline bool aligned_to(const Tensor& rows, uint64_t bytes) {
  uint64_t stride = rows.size[0] > 1 ? uint64_t(rows.stride[0] * size_of(rows.dtype)) : 0;
  return (reinterpret_cast<uint64_t>(rows.data) | stride) % bytes == 0;
}

// x / scale rounded as a float division, then to the nearest integer, half to even, at most `levels`; 0 where the scale
// is 0 or not finite. The division is a product with the reciprocal and one correction, which rounds right where
// nothing over- or underflows: hence the power of two that brings extreme scales near 1.
struct RowSteps {
  float factor, limit, scale, inverse;

  DEVICE RowSteps(float row_scale, int levels) {
    float magnitude = fabsf(row_scale);
    bool usable = magnitude > 0 && magnitude < INFINITY;
    factor = !usable ? 0.f : magnitude < 0x1p-64f ? 0x1p64f : magnitude > 0x1p64f ? 0x1p-64f : 1.f;
    scale = usable ? row_scale * factor : 1.f;
    limit = usable ? float(levels) * fabsf(scale) : 0.f;
    inverse = __frcp_rn(scale);
  }

  // The integer is the low byte.
  DEVICE unsigned operator()(float x) const {
    x = fminf(fmaxf(__fmul_rn(x, factor), -limit), limit);  // NaN, which only unusable rows hold, becomes 0
    float quotient = __fmul_rn(x, inverse);
    quotient = fmaf(fmaf(-quotient, scale, x), inverse, quotient);
    return __float_as_uint(__fadd_rn(quotient, 12582912.f));  // 1.5 * 2^23: the sum's last bit is worth 1
  }
};

DEVICE unsigned pack_bytes(unsigned b0, unsigned b1, unsigned b2, unsigned b3) {
  return ptx::prmt(ptx::prmt(b0, b1, 0x0040), ptx::prmt(b2, b3, 0x0040), 0x5410);
}

// Orders magnitudes as floats do, and puts NaN above all.
DEVICE unsigned magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The scale of a row whose largest magnitude is given: x_scale where there is one, but NaN for a row that holds a NaN
// or an infinity, which saturation would hide.
DEVICE float row_scale(unsigned largest, const float* x_scale, int levels) {
  if (!x_scale) return __fdiv_rn(__uint_as_float(largest), float(levels));
  return largest < 0x7f800000u ? *x_scale : NAN;
}

// The largest of the values that the threads of a row hold: blockDim.x of them, a power of two or whole warps. Every
// thread of the block takes part. `scratch` has a word per warp of the block.
DEVICE unsigned row_maximum(unsigned value, Shared<unsigned> scratch) {
  int threads = blockDim.x;
  if (threads < 32) {
    for (int step = threads / 2; step > 0; step /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, step));
    return value;
  }
  value = __reduce_max_sync(0xffffffffu, value);
  if (threads == 32) return value;
  int warps = threads / 32, first = int(threadIdx.y) * warps;
  if (threadIdx.x % 32 == 0) scratch[first + threadIdx.x / 32] = value;
  __syncthreads();
  unsigned largest = 0;
  for (int i = 0; i < warps; i++) {
    unsigned of_warp = scratch[first + i];
    largest = max(largest, of_warp);
  }
  return largest;
}

}  // namespace torch_kernels
