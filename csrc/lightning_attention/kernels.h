// SPDX-License-Identifier: Apache-2.0
// The kernels of the lightning attention family, per backend.
#pragma once
#include "core/context.h"
#include "cpu/isa.h"
#include "lightning_attention/params.h"

// On GPUs these are Triton's.
#define LIGHTNING_SEQUENCE_KERNELS(X)                 \
  X(lightning_forward, LightningForwardParams)        \
  X(lightning_backward, LightningBackwardParams)      \
  X(lightning_chunk_state, LightningChunkStateParams) \
  X(lightning_apply_state, LightningApplyStateParams)

#define LIGHTNING_DECODING_KERNELS(X)        \
  X(lightning_step, LightningStepParams)     \
  X(lightning_verify, LightningVerifyParams) \
  X(lightning_commit, LightningCommitParams)

namespace torch_kernels::cpu {
LIGHTNING_SEQUENCE_KERNELS(TORCH_KERNELS_CPU_KERNEL)
LIGHTNING_DECODING_KERNELS(TORCH_KERNELS_CPU_KERNEL)
}  // namespace torch_kernels::cpu

namespace torch_kernels::cuda {
#define TORCH_KERNELS_CUDA_KERNEL(name, Params) void name(const Params&, const Context&);
LIGHTNING_DECODING_KERNELS(TORCH_KERNELS_CUDA_KERNEL)
#undef TORCH_KERNELS_CUDA_KERNEL
}  // namespace torch_kernels::cuda
