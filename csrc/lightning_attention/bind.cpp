// SPDX-License-Identifier: Apache-2.0
// The decoding ops as Python functions: outputs first, then the arguments of the op's schema in order. Compiled into
// every native module; TORCH_KERNELS_BACKEND names the kernels it calls. bind_sequences.cpp has the other ops.
#include "core/bind.h"
#include "lightning_attention/kernels.h"

namespace torch_kernels {

static const Binding binding{[](nb::module_& module) {
  module.def("lightning_attention_step_",
             [](const Argument& out, const Argument& q, const Argument& k, const Argument& v, const Argument& state,
                const Argument& slopes, const Argument& state_indices, std::optional<double> scale) {
               run(TORCH_KERNELS_BACKEND::lightning_step, q,
                   LightningStepParams{.out = out,
                                       .q = q,
                                       .k = k,
                                       .v = v,
                                       .state = state,
                                       .slopes = slopes,
                                       .state_indices = state_indices,
                                       .scale = scale.value_or(1)});
             });
  module.def(
      "lightning_attention_verify",
      [](const Argument& out, const Argument& q, const Argument& k, const Argument& v, const Argument& state,
         const Argument& slopes, const Argument& parents, const Argument& state_indices, std::optional<double> scale) {
        run(TORCH_KERNELS_BACKEND::lightning_verify, q,
            LightningVerifyParams{.out = out,
                                  .q = q,
                                  .k = k,
                                  .v = v,
                                  .state = state,
                                  .slopes = slopes,
                                  .parents = parents,
                                  .state_indices = state_indices,
                                  .scale = scale.value_or(1)});
      });
  module.def("lightning_attention_commit_",
             [](const Argument& k, const Argument& v, const Argument& state, const Argument& slopes,
                const Argument& path, const Argument& num_accepted, const Argument& state_indices) {
               run(TORCH_KERNELS_BACKEND::lightning_commit, k,
                   LightningCommitParams{.k = k,
                                         .v = v,
                                         .state = state,
                                         .slopes = slopes,
                                         .path = path,
                                         .num_accepted = num_accepted,
                                         .state_indices = state_indices});
             });
}};

}  // namespace torch_kernels
