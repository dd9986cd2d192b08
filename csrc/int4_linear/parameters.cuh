// SPDX-License-Identifier: Apache-2.0
// Scales and zero points on their way to the accumulators: groups of a stage are copied to shared memory together.
#pragma once
#include "core/tensor.h"
#include "cuda/tile.cuh"

namespace torch_kernels {

struct Int4Parameters {  // [groups, features]
  const char* data = nullptr;
  int64_t row_bytes = 0;
  int groups = 0, features = 0;
  int copy_width = 0;
  DType dtype = DType::none;

  Int4Parameters() = default;
  explicit Int4Parameters(const Tensor& t)
      : data(static_cast<const char*>(t.data)),
        row_bytes(t.stride[0] * size_of(t.dtype)),
        groups(int(t.size[0])),
        features(int(t.size[1])),
        copy_width(torch_kernels::copy_width(reinterpret_cast<uint64_t>(t.data) | uint64_t(row_bytes))),
        dtype(t.dtype) {}

  // Starts the copies of kWidth features from `feature` on of `count` groups from `group` on; what does not exist
  // becomes zero.
  template <int kThreads, int kWidth>
  DEVICE void copy(char* to, int group, int count, int feature) const {
    if (dtype == DType::none) return;
    int size = dtype == DType::float32 ? 4 : 2, shift = dtype == DType::float32 ? 2 : 3;  // 16 bytes are 1 << shift
    for (int i = threadIdx.x; i < count * kWidth >> shift; i += kThreads) {
      int row = group + (i << shift) / kWidth, column = feature + (i << shift) % kWidth;
      int valid = row < groups ? min((features - column) * size, 16) : 0;
      copy_chunk(to + i * 16, valid > 0 ? data + row * row_bytes + column * int64_t(size) : data, max(valid, 0),
                 copy_width);
    }
  }

  // Elements `first`, `first` + 8 and so on of what was copied to byte `offset`, as floats.
  template <int kCount>
  DEVICE void load(float (&values)[kCount], int offset, int first) const {
    if (dtype == DType::float32) {
      Shared<float> from = shared_array<float>(offset, first + 8 * kCount - 7);
#pragma unroll
      for (int i = 0; i < kCount; i++) values[i] = from[first + 8 * i];
      return;
    }
    Shared<uint16_t> from = shared_array<uint16_t>(offset, first + 8 * kCount - 7);
    unsigned bits[kCount];
#pragma unroll
    for (int i = 0; i < kCount; i++) bits[i] = from[first + 8 * i];
    if (dtype == DType::float16) {
#pragma unroll
      for (int i = 0; i < kCount; i++) values[i] = unpack<__half>(bits[i], 0);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i++) values[i] = unpack<__nv_bfloat16>(bits[i], 0);
    }
  }
};

}  // namespace torch_kernels
