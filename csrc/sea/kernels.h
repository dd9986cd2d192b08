// SPDX-License-Identifier: Apache-2.0
// The kernels of the SEA family, per backend.
#pragma once
#include "core/context.h"
#include "cpu/isa.h"
#include "sea/params.h"

#define SEA_KERNELS(X)           \
  X(sea_select, SeaSelectParams) \
  X(sea_attention, SeaAttentionParams)

namespace torch_kernels::cpu {
SEA_KERNELS(TORCH_KERNELS_CPU_KERNEL)
}

namespace torch_kernels::cuda {
#define TORCH_KERNELS_CUDA_KERNEL(name, Params) void name(const Params&, const Context&);
SEA_KERNELS(TORCH_KERNELS_CUDA_KERNEL)
#undef TORCH_KERNELS_CUDA_KERNEL
}  // namespace torch_kernels::cuda
