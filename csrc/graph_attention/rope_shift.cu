// SPDX-License-Identifier: Apache-2.0
// Moves rotated keys to other positions. A thread turns two channel pairs of a token, for all heads.
#include "cuda/dtypes.cuh"
#include "cuda/launch.cuh"
#include "graph_attention/kernels.h"
#include "graph_attention/rotation.cuh"

namespace torch_kernels {
namespace {

// The segment that holds a token, or -1.
DEVICE int64_t segment_of(const Tensor& offsets, int64_t token) {
  int64_t low = 0, high = offsets.size[0] - 1;
  while (low < high) {  // the last that begins at or before the token is in low - 1 .. high - 1
    int64_t middle = (low + high) / 2;
    if (offsets.index(middle) <= token)
      low = middle + 1;
    else
      high = middle;
  }
  return low > 0 && token < offsets.index(low) ? low - 1 : -1;
}

template <class T>
__global__ void __launch_bounds__(256) rope_shift_kernel(RopeShiftParams p, bool aligned) {
  int lanes = int(p.inv_freq.size[0] / 2), heads = int(p.k.size[1]);
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, token = i / lanes;
  if (token >= p.k.size[0]) return;
  int64_t segment = segment_of(p.offsets, token);
  TwoPairs pairs(p.inv_freq, p.interleaved, int(i % lanes) * 2, segment < 0 ? 0 : p.delta.index(segment));
#pragma unroll 4
  for (int head = 0; head < heads; head++) {
    const T* from = p.k.at<const T>(token, head);
    T* to = p.out.at<T>(token, head);
    float x[4];
    load_two(from + pairs.low, aligned, x[0], x[1]);
    load_two(from + pairs.high, aligned, x[2], x[3]);
    if (segment >= 0) pairs.turn(x);
    store_two(to + pairs.low, x[0], x[1]);
    store_two(to + pairs.high, x[2], x[3]);
  }
}

}  // namespace

void cuda::rope_shift(const RopeShiftParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  if (p.out.elements() == 0) return;
  int64_t size = size_of(p.k.dtype), blocks = (p.k.size[0] * (p.k.size[2] / 4) + 255) / 256;
  bool aligned = copy_width(uint64_t(p.k.data) | uint64_t(p.k.stride[0] | p.k.stride[1]) * size) >= 2 * size;
  for_each_dtype(p.k.dtype,
                 [&]<class T>(T) { launch(rope_shift_kernel<T>, blocks, dim3(256), 0, context.stream, p, aligned); });
}

}  // namespace torch_kernels
