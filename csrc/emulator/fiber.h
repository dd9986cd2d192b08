// SPDX-License-Identifier: Apache-2.0
//
// Stackful fibers: one per emulated CUDA thread. The switch is hand-written for x86-64 and aarch64 Linux (a dozen
// instructions); elsewhere it is ucontext, which costs two system calls.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

// EMULATOR_UCONTEXT asks for the portable switch.
#if defined(__ELF__) && defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_SWITCH_X86_64
#elif defined(__ELF__) && defined(__aarch64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_SWITCH_AARCH64
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN
#endif
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// emulator_switch(void** save, void* load): pushes the callee-saved registers, stores the stack pointer in *save,
// continues at load.
#if defined(EMULATOR_SWITCH_X86_64)
asm(R"(
.section .text.emulator_switch,"axG",@progbits,emulator_switch,comdat
.weak emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
.text
)");
extern "C" void emulator_switch(void** save, void* load);
#elif defined(EMULATOR_SWITCH_AARCH64)
asm(R"(
.section .text.emulator_switch,"axG",@progbits,emulator_switch,comdat
.weak emulator_switch
.hidden emulator_switch
.type emulator_switch,%function
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulator_switch, .-emulator_switch
.text
)");
extern "C" void emulator_switch(void** save, void* load);
#endif

namespace emulator {

class Fiber {
 public:
  // Makes this fiber start at entry() on the given stack; a fiber without a stack stands for the thread that calls.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    stack_ = stack, bytes_ = bytes;
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(stack, bytes);  // what an abandoned run left behind
    fake_stack_ = nullptr;
#endif
#if defined(EMULATOR_SWITCH_X86_64)
    void** top =
        reinterpret_cast<void**>(stack + bytes) - 8;  // 16-byte aligned; entry sees rsp + 8 aligned, as after a call
    for (int i = 0; i < 8; i++) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(entry);
    pointer_ = top;
#elif defined(EMULATOR_SWITCH_AARCH64)
    void** top = reinterpret_cast<void**>(stack + bytes) - 20;
    for (int i = 0; i < 20; i++) top[i] = nullptr;
    top[11] = reinterpret_cast<void*>(entry);
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack, context_.uc_stack.ss_size = bytes, context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Leaves `from`, which is running, for `to`. `last`: from will never run again.
  static void transfer(Fiber& from, Fiber& to, [[maybe_unused]] bool last = false) {
#ifdef EMULATOR_ASAN
    previous() = &from;
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack_, to.stack_, to.bytes_);
#endif
#if defined(EMULATOR_SWITCH_X86_64) || defined(EMULATOR_SWITCH_AARCH64)
    emulator_switch(&from.pointer_, to.pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
    from.arrived();
  }

  // Called first thing in entry().
  void arrived() {
#ifdef EMULATOR_ASAN
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
    Fiber& came_from = *previous();
    if (!came_from.stack_) came_from.stack_ = static_cast<const char*>(bottom), came_from.bytes_ = bytes;
#endif
  }

 private:
  const char* stack_ = nullptr;
  size_t bytes_ = 0;
#if defined(EMULATOR_SWITCH_X86_64) || defined(EMULATOR_SWITCH_AARCH64)
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#ifdef EMULATOR_ASAN
  void* fake_stack_ = nullptr;
  static Fiber*& previous() {
    static thread_local Fiber* fiber = nullptr;
    return fiber;
  }
#endif
};

// Stacks for as many fibers as a block may have, each above an unmapped page. Pages that nobody touches cost nothing.
class Stacks {
 public:
#ifdef EMULATOR_ASAN
  static constexpr size_t bytes = 512 << 10;
#else
  static constexpr size_t bytes = 128 << 10;
#endif
  ~Stacks() { release(); }
  void reserve(int count) {
    if (count <= count_) return;
    release();
    memory_ = static_cast<char*>(
        mmap(nullptr, count * step(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED) {
      memory_ = nullptr;
      throw std::bad_alloc();
    }
    count_ = count;
    for (int i = 0; i < count; i++) mprotect((*this)[i], bytes, PROT_READ | PROT_WRITE);
  }
  char* operator[](int i) const { return memory_ + i * step() + (step() - bytes); }

 private:
  void release() {
    if (!memory_) return;
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(memory_, count_ * step());  // whoever gets these addresses next
#endif
    munmap(memory_, count_ * step());
    memory_ = nullptr, count_ = 0;
  }
  static size_t step() { return bytes + sysconf(_SC_PAGESIZE); }
  char* memory_ = nullptr;
  int count_ = 0;
};

}  // namespace emulator
