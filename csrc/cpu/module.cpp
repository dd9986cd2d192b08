// SPDX-License-Identifier: Apache-2.0
// The Python module torch_kernels._cpu.
#include "core/bind.h"
#include "cpu/isa.h"

namespace torch_kernels {

void bind_tree_attention(nb::module_& module);
void bind_tree_validation(nb::module_& module);

// What an op's checks depend on: dtype, device, sizes and strides of every tensor, and every other argument. Two calls with equal signatures
// are checked once.
nb::bytes signature(nb::tuple arguments) {
  std::string key;
  auto append = [&](const auto&... values) { (key.append(reinterpret_cast<const char*>(&values), sizeof values), ...); };
  for (nb::handle argument : arguments) {
    PyObject* object = argument.ptr();
    if (object == Py_None) {
      append('n');
    } else if (PyFloat_Check(object)) {
      append('f', PyFloat_AS_DOUBLE(object));
    } else if (PyLong_Check(object)) {
      append('i', PyLong_AsLongLong(object));
    } else if (PyUnicode_Check(object)) {
      key += nb::str(argument).c_str();
    } else {
      Argument b = borrow(argument);
      append('t', b.dtype, b.device_type, b.device_index, b.rank);
      key.append(reinterpret_cast<const char*>(b.size), sizeof(int64_t) * b.rank);
      key.append(reinterpret_cast<const char*>(b.stride), sizeof(int64_t) * b.rank);
    }
  }
  return nb::bytes(key.data(), key.size());
}

}  // namespace torch_kernels

NB_MODULE(_cpu, module) {
  using namespace torch_kernels;
  module.def("signature", &signature);
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
}
