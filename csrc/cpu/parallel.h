// SPDX-License-Identifier: Apache-2.0
// Threads are OpenMP's: the pool that torch loaded, as many as torch.set_num_threads asks for.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>

namespace torch_kernels::cpu {

// Waking threads is worth it for so many operations. For none in a child of a process with threads: OpenMP's pool does
// not survive a fork, and to wait for it is to wait for ever.
inline std::atomic<int64_t> worth_threads = 1 << 16;
void watch_forks();

inline bool on_one_thread(int64_t n, int64_t cost) {
  return n <= 1 || n * cost < worth_threads.load(std::memory_order_relaxed) || omp_get_max_threads() == 1 ||
         omp_in_parallel();
}

// Runs body(i) for i in [0, n), each once; the first exception is rethrown. Work is handed out as threads become free,
// so a result must not depend on which thread computed it. `cost` is about how many operations one i takes.
template <class Body>
void parallel_for(int64_t n, int64_t cost, const Body& body) {
  if (on_one_thread(n, cost)) {
    for (int64_t i = 0; i < n; i++) body(i);
    return;
  }
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < n; i++) {
    try {
      body(i);
    } catch (...) {
#pragma omp critical
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// Each thread makes a worker, make(), and calls worker(i, next) for the i it gets, with the one it will get after that
// (n: none): it can fetch what that needs while it computes.
template <class Make>
void parallel_workers(int64_t n, int64_t cost, const Make& make) {
  std::atomic<int64_t> taken = 0;
  std::exception_ptr error;
  auto work = [&] {
    auto worker = make();
    auto take = [&] { return std::min(n, taken.fetch_add(1, std::memory_order_relaxed)); };
    for (int64_t i = take(), next = take(); i < n; i = next, next = take()) worker(i, next);
  };
  if (on_one_thread(n, cost)) return work();
#pragma omp parallel
  try {
    work();
  } catch (...) {
#pragma omp critical
    if (!error) error = std::current_exception();
  }
  if (error) std::rethrow_exception(error);
}

// Hands out uninitialised, 64-byte aligned pieces of a block of memory.
class Scratch {
 public:
  // Memory that outlives a call, so that repeated calls do not fault in fresh pages; usually `static thread_local`.
  class Block {
   public:
    char* reserve(int64_t bytes) {
      if (bytes > capacity_) {
        memory_.reset();
        capacity_ = 0;  // should there be no memory
        memory_.reset(static_cast<char*>(::operator new(size_t(bytes), kAlignment)));
        capacity_ = bytes;
      }
      return memory_.get();
    }

   private:
    struct Release {
      void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
    };
    std::unique_ptr<char, Release> memory_;
    int64_t capacity_ = 0;
  };

  // Calls takes(scratch) twice: to add up the sizes, then to hand out the memory.
  template <class Takes>
  static void plan(Block& block, const Takes& takes) {
    Scratch sizes, scratch;
    takes(sizes);
    scratch.memory_ = block.reserve(sizes.used_);
    takes(scratch);
  }

  template <class T>
  T* take(int64_t count) {
    char* piece = memory_ + used_;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  char* memory_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace torch_kernels::cpu
