// SPDX-License-Identifier: Apache-2.0
//
// Shadow memory: who last wrote and read each word of shared memory, and which barriers lie between them and now.
// Order between threads is kept per warp, as vector clocks: seen(w, v) is the time up to which warp w has seen the
// accesses of warp v. A barrier advances the time and merges the clocks of the warps it joins.
#pragma once
#include <algorithm>
#include <cstdint>
#include <source_location>
#include <vector>

namespace emulator {

using Site = std::source_location;

constexpr int max_warps = 32;

struct Clock {
  uint32_t seen[max_warps] = {};
  void merge(const Clock& other, int warps) {
    for (int w = 0; w < warps; w++) seen[w] = std::max(seen[w], other.seen[w]);
  }
};

class Shadow {
 public:
  struct Access {
    uint32_t time = 0;
    int16_t thread = -1;
    uint8_t bytes = 0;  // which bytes of the word
    bool in_flight = false;
    Site site;
  };
  struct Conflict {
    const char* before = nullptr;  // null: none
    const char* now = nullptr;
    Access other;
    explicit operator bool() const { return before; }
  };

  // A new block: nothing of the last one counts any more.
  void start(size_t bytes, int warps) {
    if (words_.size() < (bytes + 3) / 4) words_.resize((bytes + 3) / 4);
    if (now_ > 1u << 31) std::fill(words_.begin(), words_.end(), Word()), now_ = 0;
    floor_ = ++now_;
    warps_ = warps;
    for (Clock& clock : clocks_) clock = Clock();
  }

  Conflict read(size_t offset, int bytes, int thread, Site site) {
    Conflict conflict;
    each_word(offset, bytes, [&](Word& word, uint8_t part) {
      if (clashes(word.write, part, thread)) {
        conflict = {"written", "reads", word.write};
        return;
      }
      if (current(word.write) && word.write.in_flight && (word.write.bytes & part)) {
        conflict = {"being copied by cp.async", "reads", word.write};
        return;
      }
      Access& same = word.reads[0].thread == thread || !current(word.reads[0]) ? word.reads[0] : word.reads[1];
      same = {now_, int16_t(thread), part, false, site};
    });
    return conflict;
  }

  Conflict write(size_t offset, int bytes, int thread, Site site, bool in_flight = false) {
    Conflict conflict;
    each_word(offset, bytes, [&](Word& word, uint8_t part) {
      if (clashes(word.write, part, thread)) conflict = {"written", "writes", word.write};
      for (Access& read : word.reads)
        if (clashes(read, part, thread)) conflict = {"read", "writes", read};
      if (current(word.write) && word.write.in_flight && (word.write.bytes & part))
        conflict = {"being copied by cp.async", "writes", word.write};
      word.write = {now_, int16_t(thread), part, in_flight, site};
    });
    return conflict;
  }

  // A cp.async copy has landed: it is a write of its thread at this moment.
  void land(size_t offset, int bytes, int thread) {
    each_word(offset, bytes, [&](Word& word, uint8_t) {
      if (word.write.thread == thread) word.write.in_flight = false, word.write.time = now_;
    });
  }

  // Barriers. A whole warp; a whole block; or some warps, whose clocks meet in `meeting`.
  void join_warp(int warp) { clocks_[warp].seen[warp] = now_++; }
  void join_block() {
    for (int w = 0; w < warps_; w++)
      for (int v = 0; v < warps_; v++) clocks_[w].seen[v] = now_;
    now_++;
  }
  void arrive(Clock& meeting, int warp) {
    meeting.merge(clocks_[warp], warps_);
    meeting.seen[warp] = now_++;
  }
  void leave(const Clock& meeting, int warp) { clocks_[warp].merge(meeting, warps_); }

 private:
  struct Word {
    Access write, reads[2];
  };

  bool current(const Access& access) const { return access.time >= floor_; }
  bool clashes(const Access& access, uint8_t part, int thread) const {
    return current(access) && access.thread != thread && (access.bytes & part) &&
           clocks_[thread / 32].seen[access.thread / 32] < access.time;
  }
  template <class Visit>
  void each_word(size_t offset, int bytes, Visit visit) {
    for (size_t end = offset + bytes; offset < end;) {
      int first = offset & 3, count = int(std::min<size_t>(4 - first, end - offset));
      visit(words_[offset / 4], uint8_t(((1 << count) - 1) << first));
      offset += count;
    }
  }

  std::vector<Word> words_;
  Clock clocks_[max_warps];
  uint32_t now_ = 0, floor_ = 1;
  int warps_ = 0;
};

}  // namespace emulator
