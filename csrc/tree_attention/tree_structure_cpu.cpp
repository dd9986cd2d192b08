// SPDX-License-Identifier: Apache-2.0
// Ancestor masks and positions from parents.
#include "core/tree.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "tree_attention/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

void tree_mask(const TreeMaskParams& p) {
  int64_t size = p.parents.size[1];
  parallel_for(p.parents.size[0], size * size, [&](int64_t b) {
    Tree tree(p.parents, b);
    int nodes = tree.nodes();
    bool* mask = p.mask.at<bool>(b);
    std::fill_n(mask, int64_t(nodes) * nodes, false);
    for (int t = 0; t < nodes; t++)
      for (int a = tree.depth[t] < 0 ? -1 : t; a >= 0; a = tree.parent[a]) mask[int64_t(t) * nodes + a] = true;
  });
}

void tree_positions(const TreePositionsParams& p) {
  parallel_for(p.parents.size[0], p.parents.size[1], [&](int64_t b) {
    Tree tree(p.parents, b);
    int32_t prefix = int32_t(p.prefix_lens.index(b));
    for (int t = 0; t < tree.nodes(); t++)
      *p.positions.at<int32_t>(b, t) = tree.depth[t] < 0 ? 0 : prefix + tree.depth[t];
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
