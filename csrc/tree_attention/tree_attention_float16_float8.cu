// SPDX-License-Identifier: Apache-2.0
// Tree attention, float16 queries, float8 caches: one instance of tree_attention.cuh per file, so that they compile
// side by side.
#include "tree_attention/tree_attention.cuh"

namespace torch_kernels {

template void launch_tree_attention<__half, __nv_fp8_e4m3>(const TreeAttentionParams&, const TreeAttentionPlan&,
                                                           Partials, void*);

}  // namespace torch_kernels
