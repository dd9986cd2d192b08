// SPDX-License-Identifier: Apache-2.0
// Per-feature numbers of a block of weights: scales, zero points, bias.
#pragma once
#include "core/tensor.h"
#include "cpu/lowbit.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

// `count` elements of a contiguous tensor of any float dtype from `offset` on as floats, then zeros.
inline void load_features(const Tensor& tensor, int64_t offset, int count, float* to) {
  std::fill(to + count, to + kFeatures, 0.f);
  switch (tensor.dtype) {
    case DType::float16: return convert(static_cast<const Half*>(tensor.data) + offset, to, count);
    case DType::bfloat16: return convert(static_cast<const BFloat16*>(tensor.data) + offset, to, count);
    default: return convert(static_cast<const float*>(tensor.data) + offset, to, count);
  }
}

inline void load_scales(const Tensor& scales, const Tensor& zeros, int64_t offset, int count, FeatureScales& to) {
  load_features(scales, offset, count, to.scale);
  if (zeros) {
    load_features(zeros, offset, count, to.zero);
    for (int n = 0; n < kFeatures; n++) to.zero[n] *= to.scale[n];
  } else {
    std::fill_n(to.zero, kFeatures, 0.f);
  }
}

// Scales of one block lie far apart, where the processor does not expect them.
__attribute__((always_inline)) inline void prefetch_scales(const Tensor& scales, const Tensor& zeros, int64_t offset) {
  for (const Tensor* tensor : {&scales, &zeros}) {
    if (!*tensor) continue;
    int64_t size = size_of(tensor->dtype);
    const char* from = static_cast<const char*>(tensor->data) + offset * size;
    for (int64_t byte = 0; byte < kFeatures * size; byte += 64) prefetch(from + byte);
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
