// SPDX-License-Identifier: Apache-2.0
// Graph-KV attention of single tokens, bfloat16: one instance of decode_half.cuh per file, so that they compile side by
// side.
#include "graph_attention/decode_half.cuh"

namespace torch_kernels {

template void launch_graph_decode<__nv_bfloat16>(const GraphAttentionParams&, const GraphDecodePlan&,
                                                 const GraphDecodeTables&, Partials, unsigned, void*);

}  // namespace torch_kernels
