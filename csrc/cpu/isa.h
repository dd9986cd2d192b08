// SPDX-License-Identifier: Apache-2.0
// The instruction sets the CPU kernels are compiled for, and which one runs. Every *_cpu.cpp is compiled once per set,
// in a namespace named after it; TORCH_KERNELS_CPU_KERNEL makes the function that calls the selected one.
#pragma once
#include <string>
#include <vector>

#include "core/context.h"

#if defined(__x86_64__)
#define TORCH_KERNELS_X86_ONLY(...) __VA_ARGS__
#else
#define TORCH_KERNELS_X86_ONLY(...)
#endif

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
#define TORCH_KERNELS_CPU_KERNEL(name, Params)                                                                    \
  namespace generic {                                                                                             \
  void name(const Params&);                                                                                       \
  }                                                                                                               \
  TORCH_KERNELS_X86_ONLY(                                                                                         \
      namespace avx2 { void name(const Params&); } namespace avx512 { void name(const Params&); } namespace amx { \
        void name(const Params&);                                                                                 \
      })                                                                                                          \
  inline void name(const Params& params, const Context&) {                                                        \
    static constexpr void (*kernels[])(const Params&) = {                                                         \
        generic::name TORCH_KERNELS_X86_ONLY(, avx2::name, avx512::name, amx::name)};                             \
    kernels[selected_index()](params);                                                                            \
  }
