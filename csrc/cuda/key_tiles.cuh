// SPDX-License-Identifier: Apache-2.0
// The shared memory of a tensor core attention block, and what fills it: Q, the ring of K and V tiles, and where the
// keys of the next tiles are.
//
// `Work` says what one block works on: rows row0 .. row0 + row_tile - 1 of the `rows` that share key/value head `head`,
// as tensors [outer, slot, head, channel] of keys and values.
//   q(), q_at(row, column)         the queries, and one element of them
//   source(tile, is_v)             the tensor that holds a tile of keys or values
//   table_entry(tile, key), place(tile, key, entry)    see TreeAttentionWork
//   value_size(), softcap(), sink(row), lse_at(row), out_at<T>(row, column), splits, partial_row(row)
#pragma once
#include "core/tensor.h"
#include "cuda/launch.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tile.cuh"

namespace torch_kernels {

template <int kHeadTile, int kRowTile>
struct AttentionShape {
  static constexpr int kThreads = 128;
  static constexpr int kWarpsM = kRowTile / 16, kWarpsN = 4 / kWarpsM;
  static constexpr int kKeys = kHeadTile == 256 ? 32 : 64;  // of a tile
  static constexpr int kWarpKeys = kKeys / kWarpsN;
  static constexpr int kWords = kKeys / 32;  // of a mask row
  static constexpr int kTables = 8;          // tiles whose `present` words are kept; more than the ring holds

  // Byte offsets in shared memory.
  static constexpr int kRing = kRowTile * kHeadTile * 2;  // behind Q
  static constexpr int kRingBytes = kHeadTile == 256 && kRowTile == 64 ? 48 << 10 : 64 << 10;
  static constexpr int kPlaces = kRing + kRingBytes;               // int2 [2][kKeys]
  static constexpr int kPresent = kPlaces + 2 * kKeys * 8;         // unsigned [kTables][kWords]
  static constexpr int kShared = kPresent + kTables * kWords * 4;  // what a kind of attention adds comes behind

  template <class KV>
  static constexpr int kBufferBytes = kKeys * kHeadTile * int(sizeof(KV));
  template <class KV>
  static constexpr int kBuffers = kRingBytes / kBufferBytes<KV> < 8 ? kRingBytes / kBufferBytes<KV> : 8;

  static_assert(kWarpKeys >= 16);
  static_assert(kWarpsN * kRowTile * ((kHeadTile + 8) * 4 + 8) <= kPlaces, "the results reuse Q and the ring");
};

template <class Work, int kHeadTile, int kRowTile>
struct KeyTiles : AttentionShape<kHeadTile, kRowTile> {
  using Shape = AttentionShape<kHeadTile, kRowTile>;
  using Shape::kKeys, Shape::kTables, Shape::kThreads, Shape::kWarpsM, Shape::kWords;

  Work& work;
  const int thread = threadIdx.x, lane = thread % 32, warp_m = thread / 32 % kWarpsM, warp_n = thread / 32 / kWarpsM;
  const Shared<int2> places = shared_array<int2>(Shape::kPlaces, 2 * kKeys);
  const Shared<unsigned> present = shared_array<unsigned>(Shape::kPresent, kTables* kWords);
  char* const shared = dynamic_shared<char>();

  int64_t entry = -1;  // looked up ahead, for key `thread` of the next tile to place

  DEVICE explicit KeyTiles(Work& w) : work(w) {}

  // Q to shared memory. 8-bit K fragments hold columns 4t .. 4t+3 of 16 in lane t, where 16-bit ones hold 2t, 2t+1,
  // 2t+8, 2t+9: for them Q's columns are permuted alike.
  template <class KV>
  DEVICE void load_q() {
    const Tensor& q = work.q();
    int head_size = int(q.size[3]),
        width = copy_width(uint64_t(q.data) | uint64_t(q.stride[0] | q.stride[1] | q.stride[2]) * 2);
    constexpr int kChunks = kHeadTile / 8;
    for (int i = thread; i < kRowTile * kChunks; i += kThreads) {
      int row = work.row0 + i / kChunks, column = i % kChunks * 8;
      bool valid = row < work.rows && column < head_size;
      const char* from =
          reinterpret_cast<const char*>(valid ? work.template q_at<uint16_t>(row, column) : q.at<const uint16_t>());
      if constexpr (sizeof(KV) == 2) {
        copy_chunk(shared + swizzled<kHeadTile * 2>(i / kChunks, i % kChunks), from, valid ? 16 : 0, width);
      } else {
        // Pair u of 16 columns goes to pair u % 2 * 4 + u / 2; this chunk has pairs 0 .. 3 or 4 .. 7.
        for (int u = 0; u < 4; u++) {
          char* to = shared + swizzled<kHeadTile * 2>(i / kChunks, (i % kChunks & ~1) + u % 2) +
                     (i % kChunks % 2 * 2 + u / 2) * 4;
          if (width >= 4)
            ptx::cp_async_4(to, valid ? from + u * 4 : from, valid ? 4 : 0);
          else
            for (int byte = 0; byte < 4; byte++) to[byte] = valid ? from[u * 4 + byte] : char(0);
        }
      }
    }
  }

  // Tells where the keys of a tile are, so that it can be copied from the next barrier on; begins to look up the tile
  // after it.
  DEVICE void place_keys(int tile, int last) {
    if (thread < kKeys) {
      int2 place = tile < last ? work.place(tile, thread, entry) : make_int2(-1, 0);
      places[tile % 2 * kKeys + thread] = place;
      unsigned word = __ballot_sync(0xffffffffu, place.x >= 0);
      if (lane == 0) present[tile % kTables * kWords + thread / 32] = word;
      entry = tile + 1 < last ? work.table_entry(tile + 1, thread) : -1;
    }
  }

  // Starts the copies of one tile of K or V into a ring buffer.
  template <class KV>
  DEVICE void copy_tile(int tile, bool is_v, char* buffer) {
    constexpr int kRowBytes = kHeadTile * int(sizeof(KV)), kChunks = kRowBytes / 16;
    const Tensor& from = work.source(tile, is_v);
    const char* base = static_cast<const char*>(from.data);
    int width = copy_width(uint64_t(base) | uint64_t(from.stride[0] | from.stride[1] | from.stride[2]) * sizeof(KV));
    int64_t stride0 = from.stride[0] * int64_t(sizeof(KV)), stride1 = from.stride[1] * int64_t(sizeof(KV));
    int chunk = thread % kChunks, row_bytes = int(from.size[3]) * int(sizeof(KV)),
        valid = min(row_bytes - chunk * 16, 16);
    if (chunk * 16 >= (row_bytes + 31) / 32 * 32) return;  // not even zeros are read there
    base += work.head * from.stride[2] * int64_t(sizeof(KV)) + (valid > 0 ? chunk * 16 : 0);
    auto copy_row = [&](int row) {
      int2 place = places[tile % 2 * kKeys + row];
      bool exists = place.x >= 0 && valid > 0;
      const char* source = exists ? base + place.x * stride0 + place.y * stride1 : base;
      copy_chunk(buffer + swizzled<kRowBytes>(row, chunk), source, exists ? valid : 0, width);
    };
#pragma unroll(kHeadTile < 256 ? 4 : int(sizeof(KV)))  // registers are short at 256 columns
    for (int row = thread / kChunks; row < kKeys; row += kThreads / kChunks) copy_row(row);
  }

  // Whether all keys of a tile exist.
  DEVICE bool is_full(int tile) {
    unsigned all = 0xffffffffu;
    for (int word = 0; word < kWords; word++) all &= unsigned(present[tile % kTables * kWords + word]);
    return all == 0xffffffffu;
  }
};

}  // namespace torch_kernels
