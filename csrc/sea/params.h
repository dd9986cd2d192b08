// SPDX-License-Identifier: Apache-2.0
// The arguments of the SEA kernels. B batch, Tq rows, Tk keys, H heads, D and Dv head sizes, K cells of a row and head,
// m features. Bit h * K + c of a row's words, least significant first, says that the row keeps cell c in head h. The
// Python side has checked shapes, dtypes and devices; widths and bits are still garbage until proven otherwise.
#pragma once
#include "core/tensor.h"

namespace torch_kernels {

struct SeaSelectParams {
  Tensor cells;   // [B, Tq, words], int32
  Tensor scores;  // [B, H, Tq, K]
  Tensor widths;  // [B, Tq]
  double k;
};

struct SeaAttentionParams {
  Tensor out;     // [B, Tq, H, Dv], q's dtype
  Tensor lse;     // [B, H, Tq], float32
  Tensor q;       // [B, Tq, H, D]
  Tensor k;       // [B, Tk, H, D]
  Tensor v;       // [B, Tk, H, Dv]
  Tensor cells;   // [B, Tq, words]
  Tensor widths;  // [B, Tq]
  int64_t num_cells;
  double scale;
  int64_t max_columns;  // that a cell keeps; 0: all
  Tensor row_gain;      // [B, H, Tq], q's dtype or float32; absent: 1
  Tensor mix;           // [B, H, Tq], q's dtype or float32; absent: 1
  Tensor pooled;        // [B, Tq | 1, H, Dv]; there if mix is
};

struct SeaAttentionBackwardParams {
  Tensor grad_q, grad_k, grad_v, grad_row_gain, grad_mix, grad_pooled;  // as what they belong to, empty if absent
  Tensor grad_out;                                                      // [B, Tq, H, Dv]
  SeaAttentionParams forward;                                           // with what it returned
};

struct SeaStretchParams {
  Tensor out;     // [B, H, Tq, length]
  Tensor x;       // [B, H, Tq, K]
  Tensor widths;  // [B, Tq]
  double fill;
};

struct SeaStretchBackwardParams {
  Tensor grad_x;    // [B, H, Tq, K]
  Tensor grad_out;  // [B, H, Tq, length]
  Tensor widths;    // [B, Tq]
};

struct SeaCsrParams {
  Tensor crow;    // [B * Tq * H + 1], int32
  Tensor col;     // [crow's last], int32; absent: crow is wanted
  Tensor cells;   // [B, Tq, words]
  Tensor widths;  // [B, Tq]
  int64_t num_heads, num_cells, max_columns;
};

struct RunningMeanParams {
  Tensor mean;         // [B, T, H, Dv], v's dtype
  Tensor sum_after;    // [B, H, Dv], float64
  Tensor count_after;  // [B], int64
  Tensor v;            // [B, T, H, Dv]
  Tensor sum;          // [B, H, Dv]; absent: zero
  Tensor count;        // [B]; there if sum is
};

struct FavorFeaturesParams {
  Tensor out;    // [B, T, H, m], x's dtype
  Tensor x;      // [B, T, H, D]
  Tensor proj;   // [m, D], x's dtype or float32
  Tensor shift;  // expanded to [B, T, H, 1], x's dtype or float32; absent: zero
  bool exponential;
  double eps;
};

struct LinearAttentionParams {
  Tensor out;    // [B, T, H, Dv], q's dtype
  Tensor state;  // [B, H, m, Dv], float32, float64 for float64 inputs
  Tensor norm;   // [B, H, m], state's dtype
  Tensor q;      // [B, T, H, m]
  Tensor k;      // [B, T, H, m]
  Tensor v;      // [B, T, H, Dv]
  bool causal;
  Tensor initial_state;  // [B, H, m, Dv]; absent: zero
  Tensor initial_norm;   // [B, H, m]; there if initial_state is
  double eps;
};

struct LinearAttentionBackwardParams {
  Tensor grad_q, grad_k, grad_v;  // as q, k, v
  Tensor grad_initial_state;      // [B, H, m, Dv], of B = 0 without an initial state
  Tensor grad_initial_norm;       // [B, H, m]
  Tensor grad_out;                // [B, T, H, Dv]
  Tensor q, k, v;                 // as in the forward pass
  Tensor grad_state;              // [B, H, m, Dv]; absent: zero
  Tensor grad_norm;               // [B, H, m]; absent: zero
  bool causal;
  Tensor initial_state, initial_norm;
  double eps;
};

}  // namespace torch_kernels
