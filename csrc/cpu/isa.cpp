// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace torch_kernels::cpu {
namespace {

[[maybe_unused]] bool has_generic() { return true; }

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi2");
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

// Linux hands out the tile registers only to processes that ask.
[[maybe_unused]] bool has_amx() {
  if (!has_avx512()) return false;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if ((edx & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#endif

// A build for one instruction set may find that the system withholds it: AMX needs Linux's permission.
int best() {
  auto& sets = instruction_sets();
  for (int i = int(sets.size()) - 1; i >= 0; i--)
    if (sets[i].supported()) return i;
  throw std::runtime_error(std::string("torch_kernels: this processor or system does not run ") + sets.back().name +
                           ", the best that this build was compiled for; build it with all instruction sets");
}

int& selection() {
  static int index = best();
  return index;
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
#define ENTRY(isa, ...) {#isa, has_##isa},
  static const std::vector<InstructionSet> sets = {TORCH_KERNELS_EACH_ISA(ENTRY, )};
  return sets;
}

int selected_index() { return selection(); }

void select(const std::string& name) {
  for (size_t i = 0; i < instruction_sets().size(); i++) {
    if (name != instruction_sets()[i].name) continue;
    if (!instruction_sets()[i].supported())
      throw std::invalid_argument("this processor does not support the instruction set " + name);
    selection() = int(i);
    return;
  }
  throw std::invalid_argument("unknown instruction set " + name);
}

}  // namespace torch_kernels::cpu
