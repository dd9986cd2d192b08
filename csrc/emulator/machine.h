// SPDX-License-Identifier: Apache-2.0
//
// Runs a grid, block by block, each CUDA thread as a fiber that gives way only at barriers and warp collectives. Which
// fiber goes next is drawn from a seed. A fault (a race, a bad pointer, threads that wait for each other for ever) is
// an emulator::Error.
//
// A kernel that may start before the one before it has ended does, and its first block comes to its wait.
//
// Not emulated: blocks of one grid running at the same time, and any time or weak memory order beyond what the barriers
// say. Not seen: races through plain pointers to shared memory (only what Shared<T>, cp.async and ldmatrix touch is
// recorded; the rest shows in results, by 0xFF bytes or between seeds), races in global memory, and, without
// AddressSanitizer, bad global addresses.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <bit>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "shadow.h"

namespace emulator {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What the kernels did since reset(); a property that holds on the device too and needs no device to assert.
struct Statistics {
  long mma = 0, ldmatrix = 0;    // warp instructions
  long ldmatrix_tiles = 0;       // 8x8 tiles loaded
  long ldmatrix_wavefronts = 0;  // passes over shared memory they took: equal to the tiles when no banks conflict
  long cp_async_bytes = 0, barriers = 0, launches = 0;
  void reset() { *this = Statistics(); }
};

struct Settings {
  unsigned seed = 0;    // 0: threads in order. Others: odd seeds draw every step, even seeds draw which warps run ahead
  unsigned launch = 0;  // launches since set_seed
  bool races = true;
  size_t shared_limit = 227 << 10;  // bytes a block may ask for: sm_90's
};

inline Settings settings;
inline Statistics statistics;

inline void set_seed(unsigned seed) { settings.seed = seed, settings.launch = 0; }

class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_((seed + 1) * 0x9e3779b97f4a7c15u) {}
  unsigned operator()() {  // xorshift64*
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return unsigned((state_ * 0x2545f4914f6cdd1du) >> 32);
  }

 private:
  uint64_t state_;
};

struct Copy {  // a cp.async that has not landed
  char* to;
  const char* from;
  int bytes, valid;
  unsigned group;
  Site site;
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  int id = 0, lane = 0, warp = 0;
  bool done = false;
  const char* waits = nullptr;  // at what, and where
  Site site;
  int result = 0;  // of __syncthreads_or and its like
  std::vector<Copy> copies;
  unsigned committed = 0;
};

// Lanes of a warp that have reached the same collective.
struct Meeting {
  void (*run)(void* const* operands, unsigned lanes);
  unsigned mask, arrived;
  Site site;
  void* operands[32];
};

struct Barrier {
  int expected = 0, arrived = 0;
  const char* name = nullptr;
  Site site;
  int any = 0, all = 1, count = 0;
  Clock clock;
  std::vector<Thread*> waiting;
};

struct Machine {
  dim3 grid, size;
  uint3 index{};
  int count = 0, warps = 0;
  std::vector<Thread> threads;
  Thread* running = nullptr;
  Fiber scheduler;
  Stacks stacks;

  unsigned ready[max_warps] = {};  // lanes that can go on, by the warp's rank
  unsigned ready_ranks = 0;
  int rank_of[max_warps] = {}, warp_of[max_warps] = {};
  Random random;
  bool draw_warps = false, draw_lanes = false;

  unsigned lanes[max_warps] = {}, exited[max_warps] = {};
  std::vector<Meeting> meetings[max_warps];
  Barrier barriers[16];
  std::vector<Thread*> held;  // that wait for the previous kernel

  char* shared = nullptr;
  size_t shared_bytes = 0;
  Shadow shadow;

  void (*body)(void*) = nullptr;
  void* closure = nullptr;
  const void* kernel = nullptr;
  Site launched_at;
  std::exception_ptr error;

  void make_ready(const Thread& thread) { make_ready(thread.warp, 1u << thread.lane); }
  void make_ready(int warp, unsigned which) {
    ready[rank_of[warp]] |= which;
    ready_ranks |= 1u << rank_of[warp];
  }
  Thread* next() {
    if (!ready_ranks) return nullptr;
    int rank = choose(ready_ranks, draw_warps), lane = choose(ready[rank], draw_lanes);
    ready[rank] &= ~(1u << lane);
    if (!ready[rank]) ready_ranks &= ~(1u << rank);
    return &threads[warp_of[rank] * 32 + lane];
  }
  int choose(unsigned set, bool draw) {
    int turn = draw ? random() & 31 : 0;
    return (std::countr_zero(std::rotr(set, turn)) + turn) & 31;
  }
  // Lets others run until someone makes this thread ready and its turn comes.
  void wait(const char* at, Site site) {
    Thread& self = *running;
    self.waits = at, self.site = site;
    running = next();
    if (running != &self) Fiber::transfer(self.fiber, running ? running->fiber : scheduler);
    self.waits = nullptr;
  }
};

inline Machine* machine = nullptr;  // the block that is running

// Launches that have not run, of which all but the first may start early. An op's launches run as late as its stream
// allows: one that may start early has come as far as it can without the one before it when that runs.
inline thread_local std::vector<std::function<void()>> pending;
inline thread_local bool postponing = false;

inline Thread& self() { return *machine->running; }

// --- Reports ---

inline std::string place(const Site& site) {
  std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

inline std::string triple(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

inline std::string kernel_name() {
  Dl_info info;
  if (dladdr(machine->kernel, &info) && info.dli_sname && info.dli_saddr == machine->kernel) {
    std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr),
                                                std::free);
    return name ? name.get() : info.dli_sname;
  }
  return "the kernel launched at " + place(machine->launched_at);
}

[[noreturn]] inline void fail_in_block(const std::string& message) {
  throw Error("emulator: " + kernel_name() + ", block " + triple(machine->index) + ": " + message);
}

[[noreturn]] inline void fail(const std::string& message, Site site) {
  const Thread& t = self();
  std::string text = "thread " + std::to_string(t.id);
  if (machine->size.y * machine->size.z > 1) text += " " + triple(t.index);
  fail_in_block(text + " " + message + " [" + place(site) + " in " + site.function_name() + "]");
}

// "threads 0-31, 40 wait at __syncthreads a.cu:12; threads 32-39 have exited"
inline std::string whereabouts() {
  std::vector<std::pair<std::string, std::string>> groups;
  for (int first = 0, last; first < machine->count; first = last + 1) {
    auto state = [](const Thread& t) {
      if (t.done) return std::string("exited");
      return t.waits ? std::string("wait at ") + t.waits + " " + place(t.site) : std::string("running");
    };
    std::string text = state(machine->threads[first]);
    for (last = first; last + 1 < machine->count && state(machine->threads[last + 1]) == text;) last++;
    std::string range = std::to_string(first) + (last > first ? "-" + std::to_string(last) : "");
    auto group = std::find_if(groups.begin(), groups.end(), [&](auto& g) { return g.first == text; });
    if (group == groups.end())
      groups.emplace_back(text, range);
    else
      group->second += "," + range;
  }
  std::string all;
  for (auto& [text, range] : groups) all += (all.empty() ? "threads " : "; threads ") + range + " " + text;
  return all;
}

// --- Shared memory ---

// Records an access to dynamic shared memory; other addresses are ignored.
inline void record(bool write, const void* address, int bytes, Site site, bool in_flight = false) {
  if (!settings.races) return;
  size_t offset = static_cast<const char*>(address) - machine->shared;
  if (offset >= machine->shared_bytes || offset + bytes > machine->shared_bytes) return;
  int thread = self().id;
  Shadow::Conflict conflict = write ? machine->shadow.write(offset, bytes, thread, site, in_flight)
                                    : machine->shadow.read(offset, bytes, thread, site);
  if (conflict)
    fail(std::string(conflict.now) + " shared memory byte " + std::to_string(offset) + ", " + conflict.before +
             " by thread " + std::to_string(conflict.other.thread) + " at " + place(conflict.other.site) +
             ", with no barrier in between" + (conflict.other.in_flight ? " and no cp.async wait" : ""),
         site);
}

// --- Barriers ---

inline int block_barrier(int id, int threads, bool wait, int predicate, const char* name, Site site) {
  Machine& m = *machine;
  Thread& self = *m.running;
  bool everyone = threads == 0;
  if (everyone) threads = m.count;
  if (id < 0 || id > 15) fail(std::string(name) + " with id " + std::to_string(id) + ": ids are 0 to 15", site);
  if (!everyone && (threads % 32 || threads > (m.count + 31) / 32 * 32 || threads <= 0))
    fail(std::string(name) + " for " + std::to_string(threads) + " threads: not a multiple of 32 within the block",
         site);
  Barrier& b = m.barriers[id];
  if (!b.arrived) {
    b.expected = threads, b.name = name, b.site = site;
    b.any = 0, b.all = 1, b.count = 0;
    b.clock = Clock();
  } else if (b.expected != threads) {
    fail(std::string(name) + " for " + std::to_string(threads) + " threads at barrier " + std::to_string(id) +
             ", others came for " + std::to_string(b.expected) + ": " + whereabouts(),
         site);
  } else if (everyone && (b.name != name || b.site.line() != site.line() ||
                          std::strcmp(b.site.file_name(), site.file_name()) != 0)) {
    fail(std::string("diverged: it is at ") + name + " while " + whereabouts(), site);
  }
  b.arrived++;
  b.any |= predicate, b.all &= predicate, b.count += predicate;
  if (!everyone) m.shadow.arrive(b.clock, self.warp);
  if (wait) b.waiting.push_back(&self);
  if (b.arrived == b.expected) {
    statistics.barriers++;
    if (everyone) m.shadow.join_block();
    for (Thread* t : b.waiting) {
      t->result = b.any | b.all << 1 | b.count << 2;
      if (!everyone) m.shadow.leave(b.clock, t->warp);
      m.make_ready(*t);
    }
    b.arrived = 0;
    b.waiting.clear();
  }
  if (wait) m.wait(name, site);
  return self.result;
}

// --- Warp collectives: the last lane to arrive does the work for all of them. ---

// With `same_place`, lanes meet only at the same line of the source.
template <class Operand>
void collective(unsigned mask, Operand& operand, void (*run)(void* const*, unsigned), const char* name, Site site,
                bool same_place = true) {
  Machine& m = *machine;
  Thread& self = *m.running;
  unsigned bit = 1u << self.lane;
  if (!(mask & bit)) fail(std::string(name) + " with a mask that leaves out the calling lane", site);
  mask &= m.lanes[self.warp];
  if (mask & m.exited[self.warp]) fail(std::string(name) + " waits for lanes that have exited: " + whereabouts(), site);
  if (mask == bit) {
    void* operands[32] = {};
    operands[self.lane] = &operand;
    return run(operands, mask);
  }
  std::vector<Meeting>& meetings = m.meetings[self.warp];
  size_t i = 0;
  for (; i < meetings.size(); i++) {
    Meeting& meeting = meetings[i];
    if (meeting.run == run && meeting.mask == mask &&
        (!same_place || (meeting.site.line() == site.line() && meeting.site.column() == site.column())))
      break;
  }
  if (i == meetings.size()) meetings.push_back({run, mask, 0, site, {}});
  Meeting& meeting = meetings[i];
  meeting.operands[self.lane] = &operand;
  meeting.arrived |= bit;
  if (meeting.arrived != mask) return m.wait(name, site);
  Meeting full = meeting;
  meetings[i] = meetings.back();
  meetings.pop_back();
  m.make_ready(self.warp, mask & ~bit);
  run(full.operands, mask);
}

// For instructions that the whole warp must execute together.
template <class Operand>
void warp_instruction(Operand& operand, void (*run)(void* const*, unsigned), const char* name, Site site) {
  if (machine->lanes[self().warp] != ~0u) fail(std::string(name) + " in a warp of fewer than 32 threads", site);
  collective(~0u, operand, run, name, site);
}

// --- cp.async: a copy lands at the last legal moment; until then its destination holds 0xFF bytes. ---

inline void land_copies(unsigned up_to_group) {
  Thread& t = self();
  size_t kept = 0;
  for (Copy& copy : t.copies) {
    if (int(copy.group - up_to_group) >= 0) {
      t.copies[kept++] = copy;
      continue;
    }
    std::memcpy(copy.to, copy.from, copy.valid);
    std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
    size_t offset = copy.to - machine->shared;
    if (settings.races && offset < machine->shared_bytes) machine->shadow.land(offset, copy.bytes, t.id);
  }
  t.copies.resize(kept);
}

inline void start_copy(void* to, const void* from, int bytes, int valid, Site site) {
  if (valid < 0 || valid > bytes) fail("cp.async with " + std::to_string(valid) + " valid bytes", site);
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("cp.async of " + std::to_string(bytes) + " bytes at an unaligned address", site);
  size_t offset = static_cast<char*>(to) - machine->shared;
  if (offset < machine->shared_bytes ? offset + bytes > machine->shared_bytes
                                     : machine->shared_bytes && offset < machine->shared_bytes + 4096)
    fail("cp.async to byte " + std::to_string(offset) + " of " + std::to_string(machine->shared_bytes) +
             " bytes of shared memory",
         site);
  record(true, to, bytes, site, true);
  char probe[16];
  std::memcpy(probe, from, valid);  // a bad source faults here, not at the wait
  asm volatile("" ::"r"(probe) : "memory");
  std::memset(to, 0xFF, bytes);
  statistics.cp_async_bytes += valid;
  self().copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, valid, self().committed, site});
}

// --- Running ---

inline void thread_entry() {
  Machine& m = *machine;
  Thread& self = *m.running;
  self.fiber.arrived();
  try {
    m.body(m.closure);
    self.done = true;
    m.exited[self.warp] |= 1u << self.lane;
    m.running = m.next();
  } catch (...) {
    m.error = std::current_exception();
    m.running = nullptr;
  }
  Fiber::transfer(self.fiber, m.running ? m.running->fiber : m.scheduler, true);
}

// Runs what was launched last, and with it what it waits for.
inline void run_pending() {
  if (pending.empty()) return;
  std::function<void()> run = std::move(pending.back());
  pending.pop_back();
  run();
}

inline void submit(bool early, std::function<void()> run) {
  if (!early) run_pending();
  pending.push_back(std::move(run));
  if (!postponing) run_pending();
}

inline void run_block(uint3 index) {
  Machine& m = *machine;
  m.index = index;
  std::memset(m.shared, 0xFF, m.shared_bytes);
  m.shadow.start(m.shared_bytes, m.warps);
  for (int w = 0; w < m.warps; w++) m.warp_of[w] = w;
  if (m.draw_lanes && !m.draw_warps)
    for (int w = m.warps - 1; w > 0; w--) std::swap(m.warp_of[w], m.warp_of[m.random() % (w + 1)]);
  for (int w = 0; w < m.warps; w++) {
    m.rank_of[m.warp_of[w]] = w;
    m.lanes[w] = m.exited[w] = m.ready[w] = 0;
    m.meetings[w].clear();
  }
  for (Barrier& b : m.barriers) b.arrived = 0, b.waiting.clear();
  m.held.clear();
  for (int i = 0; i < m.count; i++) {
    Thread& t = m.threads[i];
    t.id = i, t.lane = i % 32, t.warp = i / 32;
    t.index = {i % m.size.x, i / m.size.x % m.size.y, i / (m.size.x * m.size.y)};
    t.done = false, t.waits = nullptr, t.committed = 0;
    t.copies.clear();
    t.fiber.prepare(m.stacks[i], Stacks::bytes, thread_entry);
    m.lanes[t.warp] |= 1u << t.lane;
  }
  for (int w = 0; w < m.warps; w++) m.make_ready(w, m.lanes[w]);
  while (true) {
    m.running = m.next();
    Fiber::transfer(m.scheduler, m.running->fiber);
    if (m.error) std::rethrow_exception(std::exchange(m.error, nullptr));
    if (m.held.empty()) break;
    machine = nullptr;
    run_pending();
    machine = &m;
    for (Thread* t : std::exchange(m.held, {})) m.make_ready(*t);
  }
  bool all_done = true;
  for (int i = 0; i < m.count; i++) all_done &= m.threads[i].done;
  if (!all_done) fail_in_block("deadlock: " + whereabouts());
}

inline void run_grid(const void* kernel, dim3 grid, dim3 size, size_t shared_bytes, void (*body)(void*), void* closure,
                     Site site) {
  static std::recursive_mutex one_at_a_time;
  static std::deque<Machine> machines;  // a kernel, the one that it waits for, and so on
  static size_t depth = 0;
  std::lock_guard<std::recursive_mutex> lock(one_at_a_time);
  if (machine) throw Error("emulator: a kernel cannot launch another");
  if (depth == machines.size()) machines.emplace_back();
  Machine& m = machines[depth];
  m.kernel = kernel, m.launched_at = site, m.body = body, m.closure = closure;
  struct Current {
    explicit Current(Machine* m) { machine = m, depth++; }
    ~Current() { machine = nullptr, depth--; }
  } current(&m);
  auto refuse = [](const std::string& why) { throw Error("emulator: launching " + kernel_name() + ": " + why); };
  uint64_t count = uint64_t(size.x) * size.y * size.z;
  if (count == 0 || count > 1024 || size.z > 64) refuse("a block of " + std::to_string(count) + " threads");
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) refuse("grid " + triple({grid.x, grid.y, grid.z}));
  if (shared_bytes > settings.shared_limit) refuse(std::to_string(shared_bytes) + " bytes of shared memory");
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, shared_bytes)) throw std::bad_alloc();
  std::unique_ptr<void, void (*)(void*)> owner(memory, std::free);
  m.shared = static_cast<char*>(memory), m.shared_bytes = shared_bytes;
  m.grid = grid, m.size = size;
  m.count = int(count), m.warps = (m.count + 31) / 32;
  if (int(m.threads.size()) < m.count) m.threads.resize(m.count);
  m.stacks.reserve(m.count);
  m.random = Random(settings.seed * 0x100000001ull + settings.launch++);
  m.draw_lanes = settings.seed != 0, m.draw_warps = settings.seed % 2 == 1;
  m.error = nullptr, m.ready_ranks = 0;
  statistics.launches++;
  // No block may rely on another one's having run: seeds also draw the order of blocks.
  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); i++) order[i] = i;
  if (settings.seed)
    for (uint64_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[m.random() % i]);
  for (uint64_t i : order)
    run_block({unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (uint64_t(grid.x) * grid.y))});
  if (!pending.empty()) fail_in_block("the kernel started early and has not waited for the one before it");
}

}  // namespace emulator
