// SPDX-License-Identifier: Apache-2.0
// What the kernels of the int4 linear family get. M rows, K input and N output features, G groups along K; packed
// weights have a layout per device.
#pragma once
#include <cstdint>

#include "core/tensor.h"

namespace torch_kernels {

enum class Int4Mode : int32_t { exact, a8, fast };

struct Int4LinearParams {
  Tensor out;     // [M, N]
  Tensor x;       // [M, K], last stride 1
  Tensor weight;  // packed
  Tensor scales;  // [G, N]
  Tensor zeros;   // [G, N], zero point - 8, or absent
  Tensor perm;    // [packed K] int32: source column, -1 for none, or absent
  Tensor bias;    // [N] or absent
  int64_t out_features;
  int64_t group_size;  // in packed columns; -1 for one group
  Int4Mode mode;
};

struct Int4LinearBackwardParams {
  Tensor out;   // [M, K]
  Tensor grad;  // [M, N], last stride 1
  Tensor weight;
  Tensor scales;
  Tensor zeros;
  Tensor perm;
  int64_t in_features;
  int64_t group_size;
};

}  // namespace torch_kernels
