// SPDX-License-Identifier: Apache-2.0
// From a tensor's dtype to the type of its elements.
#pragma once
#include "core/tensor.h"
#include "cpu/simd.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

// Calls body with a value of the type.
template <class Body>
void for_each_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float64: return body(double{});
    case DType::float16: return body(Half{});
    case DType::bfloat16: return body(BFloat16{});
    default: return body(float{});
  }
}

// The same for a dtype that caches may have, too.
template <class Body>
void for_each_cache_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::int8: return body(int8_t{});
    case DType::float8_e4m3: return body(Float8E4M3{});
    default: return for_each_dtype(dtype, body);
  }
}

// What numbers of a type are computed in.
template <class Stored>
using RealOf = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

// One number of a tensor of any floating type.
inline double number_at(const Tensor& tensor, int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) {
  switch (tensor.dtype) {
    case DType::float64: return *tensor.at<const double>(i, j, k, l);
    case DType::float16: return to_float(*tensor.at<const Half>(i, j, k, l));
    case DType::bfloat16: return to_float(*tensor.at<const BFloat16>(i, j, k, l));
    default: return *tensor.at<const float>(i, j, k, l);
  }
}

inline void put_number(double value, const Tensor& tensor, int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) {
  for_each_dtype(tensor.dtype,
                 [&]<class Stored>(Stored) { *tensor.at<Stored>(i, j, k, l) = from_float<Stored>(value); });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
