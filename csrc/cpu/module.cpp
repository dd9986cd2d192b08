// SPDX-License-Identifier: Apache-2.0
// The Python module torch_kernels._cpu.
#include "core/bind.h"
#include "cpu/isa.h"

namespace torch_kernels {

void bind_tree_attention(nb::module_& module);

// What an op's checks depend on: dtype, device, sizes and strides of every tensor, and every other argument. Two calls with equal signatures
// are checked once.
nb::object signature(nb::handle arguments) {
  std::string key;
  auto append = [&](const auto& value) { key.append(reinterpret_cast<const char*>(&value), sizeof value); };
  PyObject* others = nullptr;
  for (Py_ssize_t i = 0, n = PyTuple_GET_SIZE(arguments.ptr()); i < n; i++) {
    PyObject* object = PyTuple_GET_ITEM(arguments.ptr(), i);
    if (object == Py_None) {
      append('n');
    } else if (PyFloat_Check(object)) {
      append('f'), append(PyFloat_AS_DOUBLE(object));
    } else if (PyLong_Check(object)) {
      append('i'), append(PyLong_AsLongLong(object));
    } else if (PyUnicode_Check(object)) {
      append('s'), append(object), others = object;
    } else {
      Borrowed b = borrow(object);
      append('t'), append(b.tensor.dtype), append(b.device_type), append(b.device_index), append(b.tensor.rank);
      key.append(reinterpret_cast<const char*>(b.tensor.size), sizeof(int64_t) * b.tensor.rank);
      key.append(reinterpret_cast<const char*>(b.tensor.stride), sizeof(int64_t) * b.tensor.rank);
    }
  }
  (void)others;
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
  module.def("instruction_set", [] { return cpu::selected().name; });
  module.def("select_instruction_set", &cpu::select);
  bind_tree_attention(module);
}
