// SPDX-License-Identifier: Apache-2.0
// The tree attention ops as Python functions: outputs first, then the arguments of the op's schema in order.
// Compiled into every native module; TORCH_KERNELS_BACKEND names the kernels it calls.
#include "core/bind.h"
#include "tree_attention/kernels.h"

namespace torch_kernels {

using nb::handle;

void bind_tree_attention(nb::module_& module) {
  module.def("tree_attention", [](handle out, handle lse, handle q, handle k_cache, handle v_cache, handle prefix_lens, handle parents,
                                  handle k_tree, handle v_tree, handle block_table, std::optional<double> scale, double softcap, int64_t window,
                                  handle sinks, handle k_scale, handle v_scale) {
    Tensor query = tensor(q);
    double default_scale = 1 / std::sqrt(double(query.size[3]));
    run(TORCH_KERNELS_BACKEND::tree_attention, q,
        TreeAttentionParams{.out = tensor(out),
                            .lse = tensor(lse),
                            .q = query,
                            .k_cache = tensor(k_cache),
                            .v_cache = tensor(v_cache),
                            .prefix_lens = tensor(prefix_lens),
                            .parents = tensor(parents),
                            .k_tree = tensor(k_tree),
                            .v_tree = tensor(v_tree),
                            .block_table = tensor(block_table),
                            .sinks = tensor(sinks),
                            .k_scale = tensor(k_scale),
                            .v_scale = tensor(v_scale),
                            .scale = scale.value_or(default_scale),
                            .softcap = softcap,
                            .window = window});
  });
  module.def("tree_mask", [](handle mask, handle parents) {
    run(TORCH_KERNELS_BACKEND::tree_mask, parents, TreeMaskParams{.mask = tensor(mask), .parents = tensor(parents)});
  });
  module.def("tree_positions", [](handle positions, handle parents, handle prefix_lens) {
    run(TORCH_KERNELS_BACKEND::tree_positions, parents,
        TreePositionsParams{.positions = tensor(positions), .parents = tensor(parents), .prefix_lens = tensor(prefix_lens)});
  });
  module.def("tree_verify_greedy",
             [](handle path, handle num_accepted, handle tokens, handle draft_tokens, handle target_tokens, handle parents) {
               run(TORCH_KERNELS_BACKEND::tree_verify_greedy, parents,
                   TreeVerifyGreedyParams{.outputs = {tensor(path), tensor(num_accepted), tensor(tokens)},
                                          .draft_tokens = tensor(draft_tokens),
                                          .target_tokens = tensor(target_tokens),
                                          .parents = tensor(parents)});
             });
  module.def("tree_verify_typical", [](handle path, handle num_accepted, handle tokens, handle draft_tokens, handle target_logits,
                                       handle parents, double temperature, double epsilon, double delta, handle uniforms) {
    run(TORCH_KERNELS_BACKEND::tree_verify_typical, parents,
        TreeVerifyTypicalParams{.outputs = {tensor(path), tensor(num_accepted), tensor(tokens)},
                                .draft_tokens = tensor(draft_tokens),
                                .target_logits = tensor(target_logits),
                                .parents = tensor(parents),
                                .uniforms = tensor(uniforms),
                                .temperature = temperature,
                                .epsilon = epsilon,
                                .delta = delta});
  });
  module.def("tree_verify_sampling", [](handle path, handle num_accepted, handle tokens, handle draft_tokens, handle target_probs,
                                        handle parents, handle uniforms, handle draft_probs, bool replacement) {
    run(TORCH_KERNELS_BACKEND::tree_verify_sampling, parents,
        TreeVerifySamplingParams{.outputs = {tensor(path), tensor(num_accepted), tensor(tokens)},
                                 .draft_tokens = tensor(draft_tokens),
                                 .target_probs = tensor(target_probs),
                                 .parents = tensor(parents),
                                 .uniforms = tensor(uniforms),
                                 .draft_probs = tensor(draft_probs),
                                 .replacement = replacement});
  });
  module.def("tree_commit_kv_", [](handle k_cache, handle v_cache, handle k_tree, handle v_tree, handle prefix_lens, handle path,
                                   handle num_accepted, handle block_table, handle k_scale, handle v_scale) {
    run(TORCH_KERNELS_BACKEND::tree_commit_kv, k_cache,
        TreeCommitParams{.k_cache = tensor(k_cache),
                         .v_cache = tensor(v_cache),
                         .k_tree = tensor(k_tree),
                         .v_tree = tensor(v_tree),
                         .prefix_lens = tensor(prefix_lens),
                         .path = tensor(path),
                         .num_accepted = tensor(num_accepted),
                         .block_table = tensor(block_table),
                         .k_scale = tensor(k_scale),
                         .v_scale = tensor(v_scale)});
  });
  module.def("tree_compact_kv_",
             [](handle k_cache, handle v_cache, handle prefix_lens, handle path, handle num_accepted, handle block_table) {
               run(TORCH_KERNELS_BACKEND::tree_compact_kv, k_cache,
                   TreeCompactParams{.k_cache = tensor(k_cache),
                                     .v_cache = tensor(v_cache),
                                     .prefix_lens = tensor(prefix_lens),
                                     .path = tensor(path),
                                     .num_accepted = tensor(num_accepted),
                                     .block_table = tensor(block_table)});
             });
  module.def("merge_attention_states", [](handle out, handle lse, handle out_a, handle lse_a, handle out_b, handle lse_b) {
    run(TORCH_KERNELS_BACKEND::merge_attention_states, out_a,
        MergeStatesParams{.out = tensor(out),
                          .lse = tensor(lse),
                          .out_a = tensor(out_a),
                          .lse_a = tensor(lse_a),
                          .out_b = tensor(out_b),
                          .lse_b = tensor(lse_b)});
  });
}

}  // namespace torch_kernels
