// SPDX-License-Identifier: Apache-2.0
// Walking a tree given by its parents in global memory. A chain has strictly decreasing node numbers, so every walk
// ends.
#pragma once
#include "cuda/launch.cuh"
#include "tree_attention/params.h"

namespace torch_kernels {

// The parent of a node, -1 for a root; -2 for padding and for whatever cannot be a parent.
DEVICE int checked_parent(const Tensor& parents, int64_t batch, int64_t node) {
  int64_t parent = parents.index(batch, node);
  return parent >= -1 && parent < node ? int(parent) : -2;
}

// How many steps a node is below its root; -1 for padding and for what hangs below padding.
DEVICE int node_depth(const Tensor& parents, int64_t batch, int node) {
  int depth = -1;
  for (; node >= 0; depth++) node = checked_parent(parents, batch, node);
  return node == -1 ? depth : -1;
}

}  // namespace torch_kernels
