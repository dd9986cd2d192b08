// SPDX-License-Identifier: Apache-2.0
// What follows from the parents alone: the ancestor mask and the positions.
#include "tree_attention/kernels.h"
#include "tree_attention/tree.cuh"

namespace torch_kernels {
namespace {

// One warp per row of the mask: all lanes clear it, then one walks up and marks the ancestors.
__global__ void __launch_bounds__(128) tree_mask_kernel(TreeMaskParams p) {
  int nodes = int(p.parents.size[1]), lane = threadIdx.x % 32;
  int64_t item = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (item >= p.parents.size[0] * nodes) return;
  int64_t batch = item / nodes;
  int node = int(item % nodes);
  for (int j = lane; j < nodes; j += 32) *p.mask.at<bool>(batch, node, j) = false;
  __syncwarp();
  if (lane != 0 || node_depth(p.parents, batch, node) < 0) return;
  for (int j = node; j >= 0; j = checked_parent(p.parents, batch, j)) *p.mask.at<bool>(batch, node, j) = true;
}

__global__ void __launch_bounds__(128) tree_positions_kernel(TreePositionsParams p) {
  int nodes = int(p.parents.size[1]);
  int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= p.parents.size[0] * nodes) return;
  int64_t batch = item / nodes;
  int node = int(item % nodes), depth = node_depth(p.parents, batch, node);
  *p.positions.at<int32_t>(batch, node) = depth < 0 ? 0 : int32_t(p.prefix_lens.index(batch) + depth);
}

}  // namespace

namespace cuda {

void tree_mask(const TreeMaskParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  launch(tree_mask_kernel, dim3(unsigned((p.parents.elements() + 3) / 4)), dim3(128), 0, context.stream, p);
}

void tree_positions(const TreePositionsParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  launch(tree_positions_kernel, dim3(unsigned((p.parents.elements() + 127) / 128)), dim3(128), 0, context.stream, p);
}

}  // namespace cuda
}  // namespace torch_kernels
