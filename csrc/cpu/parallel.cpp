// SPDX-License-Identifier: Apache-2.0
#include "cpu/parallel.h"

#include <limits>

#if defined(__linux__)
#include <pthread.h>
#include <sys/stat.h>
#endif

namespace torch_kernels::cpu {

// libgomp's pool is at stake; other runtimes start a new one after a fork, and only Linux has it in torch.
void watch_forks() {
#if defined(__linux__)
  static bool has_threads;
  auto before = [] {
    struct stat tasks;  // a link for each thread, and two
    has_threads = stat("/proc/self/task", &tasks) != 0 || tasks.st_nlink != 3;
  };
  auto in_child = [] {
    if (has_threads) worth_threads = std::numeric_limits<int64_t>::max();
  };
  pthread_atfork(before, nullptr, in_child);
#endif
}

}  // namespace torch_kernels::cpu
