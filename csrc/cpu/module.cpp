// SPDX-License-Identifier: Apache-2.0
// The Python module torch_kernels._cpu.
#include "core/bind.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/peaks.h"

NB_MODULE(_cpu, module) {
  using namespace torch_kernels;
  nb::set_leak_warnings(false);  // ops and their plans live as long as the interpreter
  module.def("instruction_sets", [] {
    nb::list names;
    for (auto& set : cpu::instruction_sets())
      if (set.supported()) names.append(set.name);
    return names;
  });
  module.def("instruction_set", [] { return cpu::instruction_sets()[cpu::selected_index()].name; });
  module.def("select_instruction_set", &cpu::select);
  cpu::watch_forks();
  // For tests, whose calls are small. Returns what was set before.
  module.def("set_worth_threads", [](int64_t operations) { return cpu::worth_threads.exchange(operations); });
  auto peak = [&](const char* name, void (*measure)(const PeakParams&, const Context&)) {
    module.def(name, [measure] {
      nb::gil_scoped_release unlocked;
      double rate = 0;
      measure({&rate, 0}, {});
      return rate;
    });
  };
  peak("peak_bandwidth", cpu::peak_bandwidth);
  peak("peak_float32", cpu::peak_float32);
  peak("peak_bfloat16", cpu::peak_bfloat16);
  peak("peak_int8", cpu::peak_int8);
  for (Bind bind : bindings()) bind(module);
}
