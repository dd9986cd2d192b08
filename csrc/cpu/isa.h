// SPDX-License-Identifier: Apache-2.0
// The instruction sets the CPU kernels are compiled for, and which one runs. Every *_cpu.cpp is compiled once per set,
// in a namespace named after it; TORCH_KERNELS_CPU_KERNEL makes the function that calls the selected one.
#pragma once
#include <string>
#include <vector>

#include "core/context.h"

namespace torch_kernels::cpu {

struct InstructionSet {
  const char* name;
  bool (*supported)();
};

const std::vector<InstructionSet>& instruction_sets();  // ascending: a later one is faster
int selected_index();
void select(const std::string& name);  // throws if this processor lacks it

}  // namespace torch_kernels::cpu

// Declares `void name(const Params&)` in every instruction set's namespace and defines the one that calls the selected.
// The build gives TORCH_KERNELS_EACH_ISA(X, ...), X(generic, ...) and so on, to the CPU module; others have no CPU
// kernels.
#ifdef TORCH_KERNELS_EACH_ISA
#define TORCH_KERNELS_CPU_KERNEL(name, Params)                                                              \
  TORCH_KERNELS_EACH_ISA(TORCH_KERNELS_DECLARE, name, Params)                                               \
  inline void name(const Params& params, const Context&) {                                                  \
    static constexpr void (*kernels[])(const Params&) = {TORCH_KERNELS_EACH_ISA(TORCH_KERNELS_LIST, name)}; \
    kernels[selected_index()](params);                                                                      \
  }
#define TORCH_KERNELS_DECLARE(isa, name, Params) \
  namespace isa {                                \
  void name(const Params&);                      \
  }
#define TORCH_KERNELS_LIST(isa, name) isa::name,
#else
#define TORCH_KERNELS_CPU_KERNEL(name, Params)
#endif
