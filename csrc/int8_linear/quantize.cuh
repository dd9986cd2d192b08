// SPDX-License-Identifier: Apache-2.0
// Rows of floats as int8: what int8_quantize, int8_linear and rotate_quantize share.
#pragma once
#include "core/context.h"
#include "int8_linear/params.h"

namespace torch_kernels {

struct QuantizeRows {
  Tensor x;                 // [M, K], last stride 1
  int8_t* q;                // [M, q_stride]
  int64_t q_stride;         //
  int q_columns;            // K, or more: those behind K become 0
  float* scale;             // [M]
  const float* x_scale;     // the scale of every row; or null
  uint8_t* outliers;        // [q_columns], written; or null when threshold is 0
  float threshold;          // 0: no outliers
  int levels = 127;         // the largest integer
  int* counters = nullptr;  // set to 0 on the way, for the kernel that follows
  int counter_count = 0;    //
};

void quantize_rows(const QuantizeRows& work, const Context& context);

}  // namespace torch_kernels
