// SPDX-License-Identifier: Apache-2.0
// The columns that a row keeps in one head, in lists that a block makes one after another in shared memory.
#pragma once
#include <math.h>

#include "cuda/ptx.cuh"
#include "sea/cells.h"

namespace torch_kernels {

constexpr int kRowThreads = 128, kRowWarps = kRowThreads / 32;

struct ColumnLists {
  static constexpr int kCells = 512, kList = 512;  // cells that are looked at together, columns of a list
  // Byte offsets in shared memory.
  static constexpr int kOffsets = 0, kStarts = kOffsets + (kCells + 1) * 4, kColumns = kStarts + (kCells + 1) * 4,
                       kSums = kColumns + kList * 4, kBytes = (kSums + kRowWarps * 4 + 15) / 16 * 16;

  const int32_t* bits;   // of the row
  int64_t first_bit;     // of the head
  int num_cells, limit;  // limit: columns that a cell gives at most
  CellMap map;
  int first_cell = 0;     // of those to look at next
  int total = 0, at = 0;  // columns of the cells looked at last, and of them those in lists

  const Shared<int> offsets = shared_array<int>(kOffsets, kCells + 1), starts = shared_array<int>(kStarts, kCells + 1);
  const Shared<int> columns = shared_array<int>(kColumns, kList), sums = shared_array<int>(kSums, kRowWarps);

  DEVICE ColumnLists(const Tensor& cells, const Tensor& widths, int64_t batch, int64_t row, int64_t head, int cells_,
                     int64_t max_columns, int64_t keys)
      : bits(cells.at<const int32_t>(batch, row)), first_bit(head * cells_), num_cells(cells_) {
    int64_t width = width_of(widths, batch, row, keys);
    map = {uint64_t(width), uint64_t(num_cells)};
    limit = max_columns > 0 && max_columns < INT32_MAX ? int(max_columns) : INT32_MAX;
    if (width == 0) first_cell = num_cells;
  }

  DEVICE bool kept(int cell) const {
    int64_t bit = first_bit + cell;
    return bits[bit / 32] >> (bit % 32) & 1;
  }

  // Makes the next list and returns its length, 0 after the last. All threads of the block call it.
  DEVICE int next() {
    __syncthreads();
    while (at == total) {
      if (first_cell >= num_cells) return 0;
      look_at_cells();
    }
    const int count = min(total - at, kList);
    for (int i = threadIdx.x; i < count; i += kRowThreads) columns[i] = find(at + i);
    at += count;
    __syncthreads();
    return count;
  }
  DEVICE int column(int entry) const { return columns[entry]; }

  // The lanes of this thread's group.
  DEVICE unsigned group_mask(int lanes) const {
    return lanes == 32 ? 0xffffffffu : ((1u << lanes) - 1) << (threadIdx.x % 32 / lanes * lanes);
  }

 private:
  // offsets: columns before each cell. starts: where cells begin.
  DEVICE void look_at_cells() {
    const int count = min(num_cells - first_cell, kCells), each = (count + kRowThreads - 1) / kRowThreads;
    const int begin = min(int(threadIdx.x) * each, count), end = min(begin + each, count);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int own = 0, from = int(map.boundary(first_cell + begin));
    for (int i = begin; i < end; i++) {
      int to = int(map.boundary(first_cell + i + 1)),
          columns_of_cell = kept(first_cell + i) ? min(to - from, limit) : 0;
      starts[i] = from, offsets[i] = columns_of_cell;
      own += columns_of_cell, from = to;
    }
    if (begin < end && end == count) starts[count] = from;
    int before = own;
    for (int step = 1; step < 32; step *= 2) {
      int left = __shfl_up_sync(0xffffffffu, before, step);
      if (lane >= step) before += left;
    }
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    before -= own, total = 0, at = 0;
    for (int i = 0; i < kRowWarps; i++) {
      int sum = sums[i];
      if (i < warp) before += sum;
      total += sum;
    }
    for (int i = begin; i < end; i++) {
      int columns_of_cell = offsets[i];
      offsets[i] = before;
      before += columns_of_cell;
    }
    if (threadIdx.x == 0) offsets[count] = total;
    first_cell += count;
    looked_at = count;
    __syncthreads();
  }

  // The column of an entry: the last cell whose offset is at most the entry has it.
  DEVICE int find(int entry) const {
    int low = 0, high = looked_at - 1;
    while (low < high) {
      int middle = (low + high + 1) / 2, offset = offsets[middle];
      if (offset <= entry)
        low = middle;
      else
        high = middle - 1;
    }
    int offset = offsets[low], next_offset = offsets[low + 1], start = starts[low], end = starts[low + 1];
    return int(kept_column(start, end - start, next_offset - offset, entry - offset));
  }

  int looked_at = 0;
};

}  // namespace torch_kernels
