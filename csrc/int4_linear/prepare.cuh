// SPDX-License-Identifier: Apache-2.0
// Passes over x before the product: columns in packed order, or quantised to int8.
#pragma once
#include "core/context.h"
#include "int4_linear/plan.h"

namespace torch_kernels {

// The packed weight where its tiles can be copied 16 bytes at a time: itself, or a copy if it begins anywhere.
Tensor aligned_weight(const Tensor& weight, const Context& context);

// to[row, j] = x[row, perm[j]] for `width` columns, 0 where there is no such column; rows of `width` elements.
void gather_columns(void* to, const Tensor& x, const Tensor& perm, int64_t row0, int64_t rows, int64_t width,
                    void* stream);

// The same quantised to int8, symmetric, one scale per row and group of 16 << group_shift columns: scales[group, row],
// `scale_stride` from a group to the next. In each 16 columns the order is that of the packed weight's nibbles.
void quantise_columns(int8_t* to, float* scales, const Tensor& x, const Tensor& perm, int64_t row0, int64_t rows,
                      int64_t width, int group_shift, int64_t scale_stride, void* stream);

}  // namespace torch_kernels
