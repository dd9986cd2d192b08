// SPDX-License-Identifier: Apache-2.0
// The Python module torch_kernels._cpu.
#include "core/bind.h"
#include "cpu/isa.h"

namespace torch_kernels {

void bind_dispatcher(nb::module_& module);
void bind_tree_attention(nb::module_& module);
void bind_tree_validation(nb::module_& module);
void bind_int8_linear(nb::module_& module);

}  // namespace torch_kernels

NB_MODULE(_cpu, module) {
  using namespace torch_kernels;
  nb::set_leak_warnings(false);  // ops and their plans live as long as the interpreter
  bind_dispatcher(module);
  module.def("instruction_sets", [] {
    nb::list names;
    for (auto& set : cpu::instruction_sets())
      if (set.supported()) names.append(set.name);
    return names;
  });
  module.def("instruction_set", [] { return cpu::instruction_sets()[cpu::selected_index()].name; });
  module.def("select_instruction_set", &cpu::select);
  bind_tree_attention(module);
  bind_tree_validation(module);
  bind_int8_linear(module);
}
