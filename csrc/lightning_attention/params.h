// SPDX-License-Identifier: Apache-2.0
// The arguments of the lightning attention kernels. B batch, T tokens or tree nodes, N sequences, P states in a pool, H
// key/value heads, Hq query heads (a multiple of H), K key and V value size. States and their gradients are float32,
// float64 for float64 inputs. The Python side has checked shapes, dtypes and devices; values inside index tensors are
// still garbage until proven otherwise.
#pragma once
#include "core/tensor.h"

namespace torch_kernels {

// How a state decays: one of the two.
struct LightningDecay {
  Tensor slopes;  // [H], float32 or float64: the log decay is -slope; +inf resets
  Tensor gates;   // [B, T, H], float32 or float64: the log decay itself; -inf resets
};

struct LightningForwardParams {
  Tensor out;          // [B, T, Hq, V], q's dtype
  Tensor final_state;  // [N, H, K, V], or [0, H, K, V]: not asked for
  Tensor q;            // [B, T, Hq, K]
  Tensor k;            // [B, T, H, K]
  Tensor v;            // [B, T, H, V]
  LightningDecay decay;
  Tensor initial_state;  // [N, H, K, V]; absent: zero
  Tensor cu_seqlens;     // [N + 1] and B is 1; absent: N is B
  double scale;
};

struct LightningBackwardParams {
  Tensor grad_q, grad_k, grad_v;  // as q, k, v
  Tensor grad_decay;              // as the slopes or the gates; empty if not wanted
  Tensor grad_initial_state;      // [N, H, K, V], or [0, H, K, V] without an initial state
  Tensor grad_out;                // [B, T, Hq, V], q's dtype
  Tensor q, k, v;                 // as in the forward pass
  LightningDecay decay;
  Tensor grad_final_state;  // [N, H, K, V]; absent: zero
  Tensor initial_state;     // [N, H, K, V]; absent: zero
  Tensor cu_seqlens;        // [N + 1]; absent: N is B
  double scale;
  bool decay_gradient;
};

struct LightningChunkStateParams {
  Tensor state;       // [N, H, K, V]
  Tensor k;           // [B, T, H, K]
  Tensor v;           // [B, T, H, V]
  Tensor slopes;      // [H]
  Tensor cu_seqlens;  // [N + 1]; absent: N is B
};

struct LightningApplyStateParams {
  Tensor out;         // [B, T, Hq, V], q's dtype
  Tensor q;           // [B, T, Hq, K]
  Tensor state;       // [N, H, K, V]
  Tensor slopes;      // [H]
  Tensor cu_seqlens;  // [N + 1]; absent: N is B
  double scale;
};

struct LightningStepParams {
  Tensor out;            // [N, Hq, V], q's dtype; padding rows are 0
  Tensor q;              // [N, Hq, K]
  Tensor k;              // [N, H, K]
  Tensor v;              // [N, H, V]
  Tensor state;          // [P, H, K, V], changed in place
  Tensor slopes;         // [H]
  Tensor state_indices;  // [N]: outside [0, P) padding; absent: row n has state n
  double scale;
};

struct LightningVerifyParams {
  Tensor out;            // [N, T, Hq, V], q's dtype; padding is 0
  Tensor q;              // [N, T, Hq, K]
  Tensor k;              // [N, T, H, K]
  Tensor v;              // [N, T, H, V]
  Tensor state;          // [P, H, K, V]
  Tensor slopes;         // [H]
  Tensor parents;        // [N, T]: parent node, -1 root, -2 padding; absent: a chain
  Tensor state_indices;  // [N]: outside [0, P) padding; absent: row n has state n
  double scale;
};

struct LightningCommitParams {
  Tensor k;              // [N, T, H, K]
  Tensor v;              // [N, T, H, V]
  Tensor state;          // [P, H, K, V], changed in place
  Tensor slopes;         // [H]
  Tensor path;           // [N, T]: node ids; one outside [0, T) ends the path
  Tensor num_accepted;   // [N]: the nodes are path[n, 0 .. num_accepted[n]]
  Tensor state_indices;  // [N]: outside [0, P) padding; absent: row n has state n
};

// Which state of the pool row n has; -1: none.
TORCH_KERNELS_HOST_DEVICE inline int64_t state_of_row(const Tensor& state, const Tensor& state_indices, int64_t n) {
  int64_t index = state_indices ? state_indices.index(n) : n;
  return index >= 0 && index < state.size[0] ? index : -1;
}

}  // namespace torch_kernels
