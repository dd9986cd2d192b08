// SPDX-License-Identifier: Apache-2.0
// Tree attention, bfloat16 queries, int8 caches: one instance of tree_attention.cuh per file, so that they compile side
// by side.
#include "tree_attention/tree_attention.cuh"

namespace torch_kernels {

template void launch_tree_attention<__nv_bfloat16, int8_t>(const TreeAttentionParams&, const TreeAttentionPlan&,
                                                           Partials, void*);

}  // namespace torch_kernels
