// SPDX-License-Identifier: Apache-2.0
// What a row keeps in a head, as runs of columns.
#pragma once
#include <algorithm>
#include <bit>

#include "sea/cells.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

// Columns [first, first + span), all of them or `count` spread evenly.
struct Run {
  int32_t first, span, count;
};

// The first bit from `bit` on that is `value`, or `end`.
inline int64_t next_bit(const int32_t* words, int64_t bit, int64_t end, bool value) {
  while (bit < end) {
    uint32_t word = uint32_t(words[bit / 32]);
    word = (value ? word : ~word) >> (bit % 32);
    if (word) return std::min(end, bit + std::countr_zero(word));
    bit = bit / 32 * 32 + 32;
  }
  return end;
}

// Calls emit(Run) for what the row keeps in a head, of cells that own columns of [from, to): ascending, and
// neighbouring cells as one run. The head's cells begin at bit `head_bit`.
template <class Emit>
inline void for_each_run(const int32_t* words, int64_t head_bit, CellMap map, int64_t max_columns, int64_t from,
                         int64_t to, const Emit& emit) {
  to = std::min(to, int64_t(map.width));
  if (from >= to) return;
  int64_t bit = head_bit + map.cell_of(from), end = head_bit + map.cell_of(to - 1) + 1;
  bool clips = max_columns > 0 && int64_t(map.width / map.cells) + 1 > max_columns;
  while ((bit = next_bit(words, bit, end, true)) < end) {
    int64_t stop = clips ? bit + 1 : next_bit(words, bit + 1, end, false);
    int64_t first = map.boundary(bit - head_bit), span = map.boundary(stop - head_bit) - first;
    if (span > 0) emit(Run{int32_t(first), int32_t(span), int32_t(clips ? std::min(span, max_columns) : span)});
    bit = stop;
  }
}

// Calls emit(column) for the columns of a run in [from, to), ascending.
template <class Emit>
inline void for_each_column(const Run& run, int64_t from, int64_t to, const Emit& emit) {
  if (run.count == run.span) {
    from = std::max<int64_t>(from, run.first), to = std::min<int64_t>(to, int64_t(run.first) + run.span);
    for (int64_t column = from; column < to; column++) emit(column);
  } else {
    for (int64_t t = run.count - 1; t >= 0; t--) {
      int64_t column = kept_column(run.first, run.span, run.count, t);
      if (column >= from && column < to) emit(column);
    }
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
