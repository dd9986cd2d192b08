// SPDX-License-Identifier: Apache-2.0
// A borrowed view of a tensor: what every kernel sees of one. Plain data, so it can be passed to a CUDA kernel by
// value.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define TORCH_KERNELS_HOST_DEVICE __host__ __device__
#else
#define TORCH_KERNELS_HOST_DEVICE
#endif

namespace torch_kernels {

enum class DType : int32_t {
  none,
  float64,
  float32,
  float16,
  bfloat16,
  float8_e4m3,
  int64,
  int32,
  int8,
  uint8,
  boolean
};

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::none: return 0;
    case DType::float64:
    case DType::int64: return 8;
    case DType::float32:
    case DType::int32: return 4;
    case DType::float16:
    case DType::bfloat16: return 2;
    default: return 1;
  }
}

struct Tensor {
  static constexpr int kMaxRank = 5;

  void* data = nullptr;
  DType dtype = DType::none;
  int32_t rank = 0;
  int64_t size[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements

  // An optional argument that was not given is an empty view.
  TORCH_KERNELS_HOST_DEVICE explicit operator bool() const { return dtype != DType::none; }

  template <class T>
  TORCH_KERNELS_HOST_DEVICE T* at(int64_t i0 = 0, int64_t i1 = 0, int64_t i2 = 0, int64_t i3 = 0) const {
    return static_cast<T*>(data) + i0 * stride[0] + i1 * stride[1] + i2 * stride[2] + i3 * stride[3];
  }

  // One element of an index tensor, which may be int32 or int64.
  TORCH_KERNELS_HOST_DEVICE int64_t index(int64_t i0, int64_t i1 = 0) const {
    return dtype == DType::int64 ? *at<const int64_t>(i0, i1) : int64_t(*at<const int32_t>(i0, i1));
  }

  TORCH_KERNELS_HOST_DEVICE int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank; i++) n *= size[i];
    return n;
  }
};

// [..., C] as rows [M, C]. The leading dimensions must lie as if they were one, which the registry has seen to.
inline Tensor rows_of(const Tensor& tensor) {
  Tensor rows = tensor;
  rows.rank = 2;
  rows.size[0] = 1;
  for (int i = 0; i + 1 < tensor.rank; i++) rows.size[0] *= tensor.size[i];
  rows.size[1] = tensor.size[tensor.rank - 1];
  rows.stride[0] = rows.size[1];
  for (int i = 0; i + 1 < tensor.rank; i++)
    if (tensor.size[i] > 1) rows.stride[0] = tensor.stride[i];
  rows.stride[1] = tensor.stride[tensor.rank - 1];
  return rows;
}

}  // namespace torch_kernels
