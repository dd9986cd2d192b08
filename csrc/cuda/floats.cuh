// SPDX-License-Identifier: Apache-2.0
// Single elements of tensors whose kind of float only the call knows: float32, float16 or bfloat16.
#pragma once
#include "core/tensor.h"
#include "cuda/tile.cuh"

namespace torch_kernels {

template <class... Index>
DEVICE float load_float(const Tensor& tensor, Index... index) {
  if (tensor.dtype == DType::float16) return to_float(*tensor.at<const __half>(index...));
  if (tensor.dtype == DType::bfloat16) return to_float(*tensor.at<const __nv_bfloat16>(index...));
  return *tensor.at<const float>(index...);
}

template <class... Index>
DEVICE void store_float(const Tensor& tensor, float value, Index... index) {
  if (tensor.dtype == DType::float16)
    *tensor.at<__half>(index...) = from_float<__half>(value);
  else if (tensor.dtype == DType::bfloat16)
    *tensor.at<__nv_bfloat16>(index...) = from_float<__nv_bfloat16>(value);
  else
    *tensor.at<float>(index...) = value;
}

}  // namespace torch_kernels
