// SPDX-License-Identifier: Apache-2.0
// The kernels of the SEA family, per backend.
#pragma once
#include "core/context.h"
#include "cpu/isa.h"
#include "sea/params.h"

#define SEA_KERNELS(X)           \
  X(sea_select, SeaSelectParams) \
  X(sea_attention, SeaAttentionParams)

// On GPUs these are Triton's.
#define SEA_CPU_KERNELS(X)                              \
  X(sea_attention_backward, SeaAttentionBackwardParams) \
  X(sea_stretch, SeaStretchParams)                      \
  X(sea_stretch_backward, SeaStretchBackwardParams)     \
  X(sea_csr, SeaCsrParams)                              \
  X(running_mean, RunningMeanParams)                    \
  X(favor_features, FavorFeaturesParams)                \
  X(linear_attention, LinearAttentionParams)            \
  X(linear_attention_backward, LinearAttentionBackwardParams)

namespace torch_kernels::cpu {
SEA_KERNELS(TORCH_KERNELS_CPU_KERNEL)
SEA_CPU_KERNELS(TORCH_KERNELS_CPU_KERNEL)
}  // namespace torch_kernels::cpu

namespace torch_kernels::cuda {
#define TORCH_KERNELS_CUDA_KERNEL(name, Params) void name(const Params&, const Context&);
SEA_KERNELS(TORCH_KERNELS_CUDA_KERNEL)
#undef TORCH_KERNELS_CUDA_KERNEL
}  // namespace torch_kernels::cuda
