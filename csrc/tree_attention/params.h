// SPDX-License-Identifier: Apache-2.0
// The arguments of the tree attention kernels. B sequences, T tree nodes, S cache slots, P pages, Hq query heads, Hk
// key/value heads. The Python side has checked shapes, dtypes and devices; values inside index tensors are still
// garbage until proven otherwise.
#pragma once
#include "core/tensor.h"

namespace torch_kernels {

struct TreeAttentionParams {
  Tensor out;          // [B, T, Hq, Dv], q's dtype
  Tensor lse;          // [B, Hq, T], float32, natural logarithm
  Tensor q;            // [B, T, Hq, D]
  Tensor k_cache;      // [B, S, Hk, D], or pages [P, page, Hk, D]; q's dtype, float8_e4m3 or int8
  Tensor v_cache;      // [B, S, Hk, Dv], or pages [P, page, Hk, Dv]
  Tensor prefix_lens;  // [B]
  Tensor parents;      // [B, T]: parent node, -1 root, -2 padding
  Tensor k_tree;       // [B, T, Hk, D], q's dtype; absent: node i lives in cache slot prefix_lens[b] + i
  Tensor v_tree;       // [B, T, Hk, Dv]
  Tensor block_table;  // [B, pages]; absent: the caches are contiguous
  Tensor sinks;        // [Hq], float32; may be absent
  Tensor k_scale;      // [1] or [Hk], float32; present when the caches are quantised
  Tensor v_scale;      // [1] or [Hk]
  double scale;        // multiplies q·k
  double softcap;      // 0: none
  int64_t window;      // 0: none; else keys with position(q) - position(k) < window are kept
};

struct TreeMaskParams {
  Tensor mask;     // [B, T, T], bool
  Tensor parents;  // [B, T]
};

struct TreePositionsParams {
  Tensor positions;    // [B, T], int32
  Tensor parents;      // [B, T]
  Tensor prefix_lens;  // [B]
};

// What the three verification ops write.
struct TreeVerifyOutputs {
  Tensor path;          // [B, T], int32: accepted node ids from the root, -1 padded
  Tensor num_accepted;  // [B], int32
  Tensor tokens;        // [B, T], draft_tokens' dtype: accepted tokens, then the next one, -1 padded
};

struct TreeVerifyGreedyParams {
  TreeVerifyOutputs outputs;
  Tensor draft_tokens;   // [B, T]
  Tensor target_tokens;  // [B, T]
  Tensor parents;        // [B, T]
};

struct TreeVerifyTypicalParams {
  TreeVerifyOutputs outputs;
  Tensor draft_tokens;   // [B, T]
  Tensor target_logits;  // [B, T, V]
  Tensor parents;        // [B, T]
  Tensor uniforms;       // [B, T + 1], float32 or float64; may be absent: the next token is the argmax
  double temperature, epsilon, delta;
};

struct TreeVerifySamplingParams {
  TreeVerifyOutputs outputs;
  Tensor draft_tokens;  // [B, T]
  Tensor target_probs;  // [B, T, V]
  Tensor parents;       // [B, T]
  Tensor uniforms;      // [B, T + 1], float32 or float64
  Tensor draft_probs;   // [B, T, V]; may be absent: the children are deterministic
  bool replacement;     // whether siblings were drawn with replacement
};

struct TreeCommitParams {
  Tensor k_cache;       // [B, S, Hk, D] or pages; written
  Tensor v_cache;       // written
  Tensor k_tree;        // [B, T, Hk, D]
  Tensor v_tree;        // [B, T, Hk, Dv]
  Tensor prefix_lens;   // [B]
  Tensor path;          // [B, T]
  Tensor num_accepted;  // [B]
  Tensor block_table;   // [B, pages]; may be absent
  Tensor k_scale;       // [1] or [Hk]; present when the caches are quantised
  Tensor v_scale;
};

struct TreeCompactParams {
  Tensor k_cache;  // [B, S, Hk, D] or pages; changed in place
  Tensor v_cache;
  Tensor prefix_lens;   // [B]
  Tensor path;          // [B, T]
  Tensor num_accepted;  // [B]
  Tensor block_table;   // [B, pages]; may be absent
};

struct MergeStatesParams {
  Tensor out;           // [B, T, H, Dv]
  Tensor lse;           // [B, H, T], float32
  Tensor out_a, lse_a;  // one state, as out and lse
  Tensor out_b, lse_b;  // the other
};

}  // namespace torch_kernels
