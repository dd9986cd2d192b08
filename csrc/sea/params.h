// SPDX-License-Identifier: Apache-2.0
// The arguments of the SEA kernels. B batch, H heads, Tq query rows, Tk keys, K cells of a row and head, D and Dv head
// sizes. The Python side has checked shapes, dtypes and devices; values inside index tensors are still garbage until
// proven otherwise.
#pragma once
#include "core/tensor.h"

namespace torch_kernels {

struct SeaSelectParams {
  Tensor cells;   // [B, Tq, words], int32: bit h * K + m says that cell m of head h is kept
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
  Tensor cells;   // [B, Tq, words], int32
  Tensor widths;  // [B, Tq]
  int64_t num_cells;
  int64_t max_columns;  // that a cell keeps; 0: all
  Tensor row_gain;      // [B, H, Tq], q's dtype or float32; absent: 1
  Tensor mix;           // [B, H, Tq], q's dtype or float32; absent: 1
  Tensor pooled;        // [B, Tq or 1, H, Dv], q's dtype; given with mix
  double scale;
};

}  // namespace torch_kernels
