// SPDX-License-Identifier: Apache-2.0
// One sequence's tree on the host: parents that make sense, and depths.
#pragma once
#include <numeric>
#include <vector>

#include "core/tensor.h"

namespace torch_kernels {

struct Tree {
  std::vector<int> parent;  // -1 for roots and padding
  std::vector<int> depth;   // 0 for roots, -1 for padding; a node whose parent is impossible or padding is padding

  Tree(const Tensor& parents, int64_t b) : Tree(int(parents.size[1])) {
    for (int t = 0; t < nodes(); t++) {
      int64_t up = parents.index(b, t);
      if (up < -1 || up >= t || (up >= 0 && depth[up] < 0)) continue;
      parent[t] = int(up);
      depth[t] = up < 0 ? 0 : depth[up] + 1;
    }
  }

  static Tree chain(int nodes) {
    Tree tree(nodes);
    std::iota(tree.parent.begin(), tree.parent.end(), -1);
    std::iota(tree.depth.begin(), tree.depth.end(), 0);
    return tree;
  }

  int nodes() const { return int(depth.size()); }
  bool has_root() const { return nodes() > 0 && depth[0] == 0; }

 private:
  explicit Tree(int nodes) : parent(nodes, -1), depth(nodes, -1) {}
};

}  // namespace torch_kernels
