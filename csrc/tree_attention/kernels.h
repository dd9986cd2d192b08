// SPDX-License-Identifier: Apache-2.0
// The kernels of the tree attention family, per backend.
#pragma once
#include "core/context.h"
#include "cpu/isa.h"
#include "tree_attention/params.h"

#define TREE_ATTENTION_KERNELS(X)                   \
  X(tree_attention, TreeAttentionParams)            \
  X(tree_mask, TreeMaskParams)                      \
  X(tree_positions, TreePositionsParams)            \
  X(tree_verify_greedy, TreeVerifyGreedyParams)     \
  X(tree_verify_typical, TreeVerifyTypicalParams)   \
  X(tree_verify_sampling, TreeVerifySamplingParams) \
  X(tree_commit_kv, TreeCommitParams)               \
  X(tree_compact_kv, TreeCompactParams)             \
  X(merge_attention_states, MergeStatesParams)

namespace torch_kernels::cpu {
TREE_ATTENTION_KERNELS(TORCH_KERNELS_CPU_KERNEL)
}

namespace torch_kernels::cuda {
#define TORCH_KERNELS_CUDA_KERNEL(name, Params) void name(const Params&, const Context&);
TREE_ATTENTION_KERNELS(TORCH_KERNELS_CUDA_KERNEL)
#undef TORCH_KERNELS_CUDA_KERNEL
}  // namespace torch_kernels::cuda
