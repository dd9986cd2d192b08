// SPDX-License-Identifier: Apache-2.0
// Where a kernel runs, and the memory it may ask for.
#pragma once
#include <cstdint>
#include <functional>

namespace torch_kernels {

struct Context {
  int device = 0;          // CUDA device index
  void* stream = nullptr;  // the caller's current CUDA stream
  // Device memory from torch's allocator, for use on `stream`; it stays alive until the call returns, which stream
  // order makes long enough.
  std::function<void*(int64_t bytes)> allocate;
};

}  // namespace torch_kernels
