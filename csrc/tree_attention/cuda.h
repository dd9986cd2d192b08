// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of tree attention. Outputs are contiguous; stream is a cudaStream_t.
#pragma once
#include "params.h"

namespace torch_kernels::cuda {

// What tree_attention needs as workspace, a function of shapes only: no data is touched.
int64_t tree_attention_workspace_bytes(const TreeAttentionParams& params);
void tree_attention(const TreeAttentionParams& params, void* workspace, void* stream);

void tree_mask(const TreeMaskParams& params, void* stream);
void tree_positions(const TreePositionsParams& params, void* stream);
void tree_verify_greedy(const TreeVerifyGreedyParams& params, void* stream);
void tree_verify_typical(const TreeVerifyTypicalParams& params, void* stream);
void tree_verify_sampling(const TreeVerifySamplingParams& params, void* stream);
void tree_commit_kv(const TreeCommitParams& params, void* stream);
void tree_compact_kv(const TreeCompactParams& params, void* stream);
void merge_attention_states(const MergeStatesParams& params, void* stream);

}  // namespace torch_kernels::cuda
