// SPDX-License-Identifier: Apache-2.0
// The tree attention ops as Python functions: outputs first, then the arguments of the op's schema in order.
// Compiled into every native module; TORCH_KERNELS_BACKEND names the kernels it calls.
#include "core/bind.h"
#include "tree_attention/kernels.h"

namespace torch_kernels {

static const Binding binding{[](nb::module_& module) {
  module.def("tree_attention",
             [](const Argument& out, const Argument& lse, const Argument& q, const Argument& k_cache,
                const Argument& v_cache, const Argument& prefix_lens, const Argument& parents, const Argument& k_tree,
                const Argument& v_tree, const Argument& block_table, std::optional<double> scale, double softcap,
                int64_t window, const Argument& sinks, const Argument& k_scale, const Argument& v_scale) {
               double default_scale = 1 / std::sqrt(double(q.size[3]));
               run(TORCH_KERNELS_BACKEND::tree_attention, q,
                   TreeAttentionParams{.out = out,
                                       .lse = lse,
                                       .q = q,
                                       .k_cache = k_cache,
                                       .v_cache = v_cache,
                                       .prefix_lens = prefix_lens,
                                       .parents = parents,
                                       .k_tree = k_tree,
                                       .v_tree = v_tree,
                                       .block_table = block_table,
                                       .sinks = sinks,
                                       .k_scale = k_scale,
                                       .v_scale = v_scale,
                                       .scale = scale.value_or(default_scale),
                                       .softcap = softcap,
                                       .window = window});
             });
  module.def("tree_mask", [](const Argument& mask, const Argument& parents) {
    run(TORCH_KERNELS_BACKEND::tree_mask, parents, TreeMaskParams{.mask = mask, .parents = parents});
  });
  module.def("tree_positions", [](const Argument& positions, const Argument& parents, const Argument& prefix_lens) {
    run(TORCH_KERNELS_BACKEND::tree_positions, parents,
        TreePositionsParams{.positions = positions, .parents = parents, .prefix_lens = prefix_lens});
  });
  module.def("tree_verify_greedy",
             [](const Argument& path, const Argument& num_accepted, const Argument& tokens,
                const Argument& draft_tokens, const Argument& target_tokens, const Argument& parents) {
               run(TORCH_KERNELS_BACKEND::tree_verify_greedy, parents,
                   TreeVerifyGreedyParams{.outputs = {path, num_accepted, tokens},
                                          .draft_tokens = draft_tokens,
                                          .target_tokens = target_tokens,
                                          .parents = parents});
             });
  module.def("tree_verify_typical",
             [](const Argument& path, const Argument& num_accepted, const Argument& tokens,
                const Argument& draft_tokens, const Argument& target_logits, const Argument& parents,
                double temperature, double epsilon, double delta, const Argument& uniforms) {
               run(TORCH_KERNELS_BACKEND::tree_verify_typical, parents,
                   TreeVerifyTypicalParams{.outputs = {path, num_accepted, tokens},
                                           .draft_tokens = draft_tokens,
                                           .target_logits = target_logits,
                                           .parents = parents,
                                           .uniforms = uniforms,
                                           .temperature = temperature,
                                           .epsilon = epsilon,
                                           .delta = delta});
             });
  module.def("tree_verify_sampling",
             [](const Argument& path, const Argument& num_accepted, const Argument& tokens,
                const Argument& draft_tokens, const Argument& target_probs, const Argument& parents,
                const Argument& uniforms, const Argument& draft_probs, bool replacement) {
               run(TORCH_KERNELS_BACKEND::tree_verify_sampling, parents,
                   TreeVerifySamplingParams{.outputs = {path, num_accepted, tokens},
                                            .draft_tokens = draft_tokens,
                                            .target_probs = target_probs,
                                            .parents = parents,
                                            .uniforms = uniforms,
                                            .draft_probs = draft_probs,
                                            .replacement = replacement});
             });
  module.def("tree_commit_kv_",
             [](const Argument& k_cache, const Argument& v_cache, const Argument& k_tree, const Argument& v_tree,
                const Argument& prefix_lens, const Argument& path, const Argument& num_accepted,
                const Argument& block_table, const Argument& k_scale, const Argument& v_scale) {
               run(TORCH_KERNELS_BACKEND::tree_commit_kv, k_cache,
                   TreeCommitParams{.k_cache = k_cache,
                                    .v_cache = v_cache,
                                    .k_tree = k_tree,
                                    .v_tree = v_tree,
                                    .prefix_lens = prefix_lens,
                                    .path = path,
                                    .num_accepted = num_accepted,
                                    .block_table = block_table,
                                    .k_scale = k_scale,
                                    .v_scale = v_scale});
             });
  module.def("tree_compact_kv_", [](const Argument& k_cache, const Argument& v_cache, const Argument& prefix_lens,
                                    const Argument& path, const Argument& num_accepted, const Argument& block_table) {
    run(TORCH_KERNELS_BACKEND::tree_compact_kv, k_cache,
        TreeCompactParams{.k_cache = k_cache,
                          .v_cache = v_cache,
                          .prefix_lens = prefix_lens,
                          .path = path,
                          .num_accepted = num_accepted,
                          .block_table = block_table});
  });
  module.def("merge_attention_states", [](const Argument& out, const Argument& lse, const Argument& out_a,
                                          const Argument& lse_a, const Argument& out_b, const Argument& lse_b) {
    run(TORCH_KERNELS_BACKEND::merge_attention_states, out_a,
        MergeStatesParams{.out = out, .lse = lse, .out_a = out_a, .lse_a = lse_a, .out_b = out_b, .lse_b = lse_b});
  });
}};

}  // namespace torch_kernels
