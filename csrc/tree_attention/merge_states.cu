// SPDX-License-Identifier: Apache-2.0
// Joins attention over two disjoint key sets. One warp per row.
#include <math.h>

#include "cuda/dtypes.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"
#include "tree_attention/kernels.h"

namespace torch_kernels {
namespace {

template <class T>
__global__ void __launch_bounds__(128) merge_states_kernel(MergeStatesParams p) {
  int64_t nodes = p.out.size[1], heads = p.out.size[2],
          row = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= p.out.size[0] * nodes * heads) return;
  int64_t head = row % heads, node = row / heads % nodes, batch = row / heads / nodes;

  float a = *p.lse_a.at<const float>(batch, head, node), b = *p.lse_b.at<const float>(batch, head, node);
  float high = fmaxf(a, b), low = fminf(a, b);
  float lse = a == b ? a + 0.6931471805599453f : high + log1pf(expf(low - high));
  if (isnan(a) || isnan(b)) lse = NAN;
  bool seen_a = a != -INFINITY, seen_b = b != -INFINITY;
  float weight_a = expf(a - lse), weight_b = expf(b - lse);
  if (threadIdx.x % 32 == 0) *p.lse.at<float>(batch, head, node) = lse;
  for (int64_t i = threadIdx.x % 32; i < p.out.size[3]; i += 32) {
    float x = 0;
    if (seen_a) x += weight_a * to_float(*p.out_a.at<const T>(batch, node, head, i));
    if (seen_b) x += weight_b * to_float(*p.out_b.at<const T>(batch, node, head, i));
    *p.out.at<T>(batch, node, head, i) = from_float<T>(x);
  }
}

}  // namespace

void cuda::merge_attention_states(const MergeStatesParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  int64_t rows = p.out.size[0] * p.out.size[1] * p.out.size[2];
  for_each_dtype(p.out.dtype, [&]<class T>(T) {
    launch(merge_states_kernel<T>, dim3(unsigned((rows + 3) / 4)), dim3(128), 0, context.stream, p);
  });
}

}  // namespace torch_kernels
