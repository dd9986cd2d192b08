// SPDX-License-Identifier: Apache-2.0
// The Python module torch_kernels._emulator: the CUDA kernels on the CPU, for tests.
#include "core/bind.h"
#include "emulator/machine.h"

NB_MODULE(_emulator, module) {
  module.def("set_seed", [](unsigned seed) { emulator::set_seed(seed); });
  for (torch_kernels::Bind bind : torch_kernels::bindings()) bind(module);
}
