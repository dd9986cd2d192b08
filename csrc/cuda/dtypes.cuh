// SPDX-License-Identifier: Apache-2.0
// From a tensor's dtype to the type of its elements.
#pragma once
#include "core/tensor.h"
#include "cuda/ptx.cuh"

namespace torch_kernels {

// Calls body with a value of the type.
template <class Body>
void for_each_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float16: return body(__half{});
    case DType::bfloat16: return body(__nv_bfloat16{});
    default: return body(float{});
  }
}

}  // namespace torch_kernels
