// SPDX-License-Identifier: Apache-2.0
// The kernels of the int4 linear family, per backend.
#pragma once
#include "core/context.h"
#include "cpu/isa.h"
#include "int4_linear/params.h"

#define INT4_LINEAR_KERNELS(X)     \
  X(int4_linear, Int4LinearParams) \
  X(int4_linear_backward, Int4LinearBackwardParams)

namespace torch_kernels::cpu {
INT4_LINEAR_KERNELS(TORCH_KERNELS_CPU_KERNEL)
}

namespace torch_kernels::cuda {
#define TORCH_KERNELS_CUDA_KERNEL(name, Params) void name(const Params&, const Context&);
INT4_LINEAR_KERNELS(TORCH_KERNELS_CUDA_KERNEL)
#undef TORCH_KERNELS_CUDA_KERNEL
}  // namespace torch_kernels::cuda
