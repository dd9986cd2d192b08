// SPDX-License-Identifier: Apache-2.0
// The kernels of the int8 linear family, per backend.
#pragma once
#include "core/context.h"
#include "cpu/isa.h"
#include "int8_linear/params.h"

#define INT8_LINEAR_KERNELS(X)                      \
  X(int8_quantize, Int8QuantizeParams)              \
  X(int8_mm, Int8MmParams)                          \
  X(int8_linear, Int8LinearParams)                  \
  X(int8_linear_backward, Int8LinearBackwardParams) \
  X(hadamard_transform, HadamardParams)             \
  X(rotate_quantize, RotateQuantizeParams)

namespace torch_kernels::cpu {
INT8_LINEAR_KERNELS(TORCH_KERNELS_CPU_KERNEL)
}

namespace torch_kernels::cuda {
#define TORCH_KERNELS_CUDA_KERNEL(name, Params) void name(const Params&, const Context&);
INT8_LINEAR_KERNELS(TORCH_KERNELS_CUDA_KERNEL)
#undef TORCH_KERNELS_CUDA_KERNEL
}  // namespace torch_kernels::cuda
