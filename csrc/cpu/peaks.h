// SPDX-License-Identifier: Apache-2.0
// The measured ceilings of this processor, in operations or bytes per second over torch's threads.
#pragma once
#include "cpu/isa.h"

namespace torch_kernels {

struct PeakParams {
  double* rate;
  int seed;  // a value that the compiler cannot know
};

namespace cpu {
TORCH_KERNELS_CPU_KERNEL(peak_bandwidth, PeakParams)
TORCH_KERNELS_CPU_KERNEL(peak_float32, PeakParams)
TORCH_KERNELS_CPU_KERNEL(peak_bfloat16, PeakParams)
TORCH_KERNELS_CPU_KERNEL(peak_int8, PeakParams)
}  // namespace cpu

}  // namespace torch_kernels
