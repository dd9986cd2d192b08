// SPDX-License-Identifier: Apache-2.0
// What the kernels of the int8 linear family get. M rows, K input and N output features. Activations are float32,
// float16 or bfloat16; leading dimensions are already one.
#pragma once
#include <cstdint>

#include "core/tensor.h"

namespace torch_kernels {

struct Int8QuantizeParams {
  Tensor q;          // [M, K] int8, contiguous
  Tensor scale;      // [M] float32
  Tensor outliers;   // [K] bool: columns with |x| >= threshold somewhere
  Tensor x;          // [M, K], last stride 1
  double threshold;  // 0: no outliers
};

struct Int8MmParams {
  Tensor out;  // [M, N] int32, contiguous
  Tensor a;    // [M, K] int8, last stride 1
  Tensor b;    // [N, K] int8, last stride 1
};

struct Int8LinearParams {
  Tensor out;           // [M, N], x's dtype, contiguous
  Tensor x;             // [M, K], last stride 1
  Tensor weight;        // [N, K] int8, last stride 1
  Tensor weight_scale;  // [N] float32
  Tensor bias;          // [N], x's dtype or float32; or absent
  Tensor x_scale;       // [1] float32: the scale of every row; or absent
  double threshold;     // 0: no outliers
};

struct Int8LinearBackwardParams {
  Tensor out;           // [M, K], grad's dtype, contiguous
  Tensor grad;          // [M, N], last stride 1
  Tensor weight;        // [N, K] int8, last stride 1
  Tensor weight_scale;  // [N] float32
};

struct HadamardParams {
  Tensor out;    // [M, n], x's dtype, contiguous
  Tensor x;      // [M, n], last stride 1
  double scale;  // multiplies the transform by the matrix of +1 and -1
};

struct RotateQuantizeParams {
  Tensor q;        // [M, n] int8, contiguous
  Tensor scale;    // [M] float32
  Tensor x;        // [M, n], last stride 1
  Tensor signs;    // [n] float32, +1 or -1; or absent
  Tensor smooth;   // [n] float32, divides after the transform; or absent
  Tensor x_scale;  // [1] float32: the scale of every row; or absent
  int64_t bits;    // 2..8
};

}  // namespace torch_kernels
