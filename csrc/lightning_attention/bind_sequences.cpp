// SPDX-License-Identifier: Apache-2.0
// The ops over whole sequences as Python functions, which only the CPU module has: on GPUs they are Triton's.
#include "core/bind.h"
#include "lightning_attention/kernels.h"

namespace torch_kernels {
namespace {

enum Decay { kSlopes, kGates };

LightningDecay decay_of(Decay decay, const Tensor& rate) {
  return decay == kSlopes ? LightningDecay{rate, {}} : LightningDecay{{}, rate};
}

void bind_forward(nb::module_& module, const char* name, Decay decay) {
  module.def(name, [decay](const Argument& out, const Argument& final_state, const Argument& q, const Argument& k,
                           const Argument& v, const Argument& rate, const Argument& initial_state,
                           const Argument& cu_seqlens, std::optional<double> scale, bool) {
    run(cpu::lightning_forward, q,
        LightningForwardParams{.out = out,
                               .final_state = final_state,
                               .q = q,
                               .k = k,
                               .v = v,
                               .decay = decay_of(decay, rate),
                               .initial_state = initial_state,
                               .cu_seqlens = cu_seqlens,
                               .scale = scale.value_or(1)});
  });
}

void bind_backward(nb::module_& module, const char* name, Decay decay) {
  module.def(name, [decay](const Argument& grad_q, const Argument& grad_k, const Argument& grad_v,
                           const Argument& grad_decay, const Argument& grad_initial_state, const Argument& grad_out,
                           const Argument& q, const Argument& k, const Argument& v, const Argument& rate,
                           const Argument& grad_final_state, const Argument& initial_state, const Argument& cu_seqlens,
                           std::optional<double> scale, bool decay_gradient) {
    run(cpu::lightning_backward, q,
        LightningBackwardParams{.grad_q = grad_q,
                                .grad_k = grad_k,
                                .grad_v = grad_v,
                                .grad_decay = grad_decay,
                                .grad_initial_state = grad_initial_state,
                                .grad_out = grad_out,
                                .q = q,
                                .k = k,
                                .v = v,
                                .decay = decay_of(decay, rate),
                                .grad_final_state = grad_final_state,
                                .initial_state = initial_state,
                                .cu_seqlens = cu_seqlens,
                                .scale = scale.value_or(1),
                                .decay_gradient = decay_gradient});
  });
}

}  // namespace

static const Binding binding{[](nb::module_& module) {
  bind_forward(module, "lightning_attention", kSlopes);
  bind_forward(module, "simple_gla", kGates);
  bind_backward(module, "lightning_attention_backward", kSlopes);
  bind_backward(module, "simple_gla_backward", kGates);
  module.def("lightning_chunk_state", [](const Argument& state, const Argument& k, const Argument& v,
                                         const Argument& slopes, const Argument& cu_seqlens) {
    run(cpu::lightning_chunk_state, k,
        LightningChunkStateParams{.state = state, .k = k, .v = v, .slopes = slopes, .cu_seqlens = cu_seqlens});
  });
  module.def("lightning_apply_state",
             [](const Argument& out, const Argument& q, const Argument& state, const Argument& slopes,
                const Argument& cu_seqlens, std::optional<double> scale) {
               run(cpu::lightning_apply_state, q,
                   LightningApplyStateParams{.out = out,
                                             .q = q,
                                             .state = state,
                                             .slopes = slopes,
                                             .cu_seqlens = cu_seqlens,
                                             .scale = scale.value_or(1)});
             });
}};

}  // namespace torch_kernels
