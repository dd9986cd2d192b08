// SPDX-License-Identifier: Apache-2.0
// Where attention finds its keys and values: rows of caches, pages and trees, taken a tile at a time, in place or
// copied.
#pragma once
#include <algorithm>
#include <bit>
#include <numeric>
#include <span>

#include "core/tensor.h"
#include "cpu/dtypes.h"
#include "cpu/simd.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

inline constexpr int kKeyTile = 128;  // keys that share one pass over the query rows

// Slots [first, first + length) of one batch row, which are those from `begin` on of several pieces in a row.
struct Piece {
  int64_t begin, length, batch, first;
};

// Rows of keys or values of one head, found by slot: contiguous in a cache, scattered over pages, or the tree's own.
struct RowSource {
  Tensor tensor;       // [B, S, H, D] or pages [P, page, H, D]
  Tensor block_table;  // [B, pages] or absent
  int64_t batch, head;
  int64_t slots;                    // how many there are
  std::span<const Piece> pieces{};  // if any, what the slots are pieced together from

  int64_t element_size() const { return size_of(tensor.dtype); }
  const char* address(int64_t slot) const {
    int64_t outer = batch;
    if (!pieces.empty()) {
      auto begins_after = [](int64_t slot, const Piece& piece) { return slot < piece.begin; };
      const Piece& piece = *--std::upper_bound(pieces.begin() + 1, pieces.end(), slot, begins_after);
      outer = piece.batch, slot += piece.first - piece.begin;
    }
    if (block_table) {
      int64_t page_size = tensor.size[1];
      outer = std::clamp<int64_t>(block_table.index(outer, slot / page_size), 0, tensor.size[0] - 1);
      slot %= page_size;
    }
    return tensor.at<const char>() +
           (outer * tensor.stride[0] + slot * tensor.stride[1] + head * tensor.stride[2]) * element_size();
  }
  template <class T>
  const T* row(int64_t slot) const {
    return reinterpret_cast<const T*>(address(slot));
  }

  // Of any tile, at least this many rows in a row are stride[1] apart.
  int run() const {
    if (!pieces.empty()) return 1;
    return block_table ? int(std::gcd(tensor.size[1], int64_t(kKeyTile))) : kKeyTile;
  }
};

// Copies a tile's rows of `heads` neighbouring heads to `to` [heads][kKeyTile][stride] as matrix elements, zero-padded.
template <class Stored, class Element>
void gather_stored(const RowSource& source, int heads, int64_t first, int count, int padded_count, int width,
                   int padded_width, Element* to, int64_t stride) {
  int64_t step = source.tensor.stride[3], next_head = source.tensor.stride[2];
  for (int i = 0; i < padded_count; i++) {
    const Stored* row = i < count ? source.row<Stored>(first + i) : nullptr;
    for (int h = 0; h < heads; h++) {
      Element* copy = to + (int64_t(h) * kKeyTile + i) * stride;
      int copied = row ? width : 0;
      if (row && step == 1) {
        convert(row + h * next_head, copy, width);
      } else if (row) {
        for (int c = 0; c < width; c++) convert(row + h * next_head + c * step, copy + c, 1);
      }
      if (padded_width > copied) std::fill(copy + copied, copy + padded_width, Element{});
    }
  }
}

template <class Element>
void gather(const RowSource& source, int heads, int64_t first, int count, int padded_count, int width, int padded_width,
            Element* to, int64_t stride) {
  for_each_cache_dtype(source.tensor.dtype, [&]<class Stored>(Stored) {
    gather_stored<Stored>(source, heads, first, count, padded_count, width, padded_width, to, stride);
  });
}

// Where the rows of a tile are, by key and head: in the cache itself, or copied.
struct Tile {
  const char* start[kKeyTile];  // of each run of `run` rows, a power of two, that are `stride` bytes apart
  int64_t stride, next_head;
  int run, log2_run, count = 0;

  const char* row(int key, int head) const {
    return start[key >> log2_run] + (key & (run - 1)) * stride + head * next_head;
  }

  void stay(const RowSource& source, int64_t first, int tile_count) {
    count = tile_count;
    run = source.run(), log2_run = std::countr_zero(unsigned(run));
    stride = source.tensor.stride[1] * source.element_size();
    next_head = source.tensor.stride[2] * source.element_size();
    for (int key = 0; key < count; key += run) start[key >> log2_run] = source.address(first + key);
  }
  void copied(const void* tiles, int64_t tile_stride, int tile_count) {
    count = tile_count;
    run = kKeyTile, log2_run = std::countr_zero(unsigned(run)), stride = tile_stride,
    next_head = kKeyTile * tile_stride;
    start[0] = static_cast<const char*>(tiles);
  }
};

// Brings the tile after this one into the cache while this one is computed: few lines at a time, because a core can
// wait for no more. With many rows the softmax calls step() often enough; few rows fetch with each pair of values they
// read.
struct Ahead {
  Tile keys, values;
  int key_bytes, value_bytes;  // key_bytes is 0 where keys are read in place: those loads need no help
  int heads, next, wait, steps_per_key;

  void start(int steps) { next = 0, wait = steps_per_key = std::max(1, steps / std::max(1, keys.count)); }
  void step() {
    if (--wait > 0) return;
    wait = steps_per_key;
    for (int h = 0; h < heads; h++) fetch(next, h);
    next++;
  }
  __attribute__((always_inline)) void fetch(int key, int head) const {
    if (key >= keys.count) return;
    for (int c = 0; c < key_bytes; c += 64) prefetch(keys.row(key, head) + c);
    for (int c = 0; c < value_bytes; c += 64) prefetch(values.row(key, head) + c);
  }
};

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
