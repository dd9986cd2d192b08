// SPDX-License-Identifier: Apache-2.0
// Graph-KV attention of single tokens: what a block works on, and how queries turn from one source to the next.
//
// Every token of a query segment is alone: its query heads, as the rows of each key/value head, against the keys of its
// segment's sources, then against those of its own segment that it sees. Tiles of keys never straddle sources. A first
// kernel notes where each source is and how many tiles lie before it, and how the tokens' keys are split, so that the
// next one can be a list of splits, whatever their lengths are.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/softmax.cuh"
#include "cuda/splits.h"
#include "graph_attention/params.h"
#include "graph_attention/rotation.cuh"

namespace torch_kernels {

struct GraphDecodePlan : KeySplits {
  int head_tile;        // D and Dv rounded up to 64, 128 or 256
  int row_tile;         // rows of a block
  int row_tiles;        // blocks that share one (token, key/value head, split)
  int64_t key_tokens;   // rows of k; of pages, slots that a segment can have
  int64_t first_token;  // of this launch
  int tokens;
};

// A source of a query segment. Those of segment a, and then its own segment, start at edge_offsets[a] + a.
struct alignas(16) GraphSource {
  int tiles_before, begin, length, segment;
};

struct GraphDecodeTables {
  GraphSource* sources;  // [E + Nq]
  int64_t* turns;        // [E + Nq]: by how many positions token 0 turns for it
  int* segments;         // [tokens]: -1: none
  int* splits_before;    // [tokens + 1]
};

// A range of offsets, inside 0 .. limit whatever they say.
struct OffsetRange {
  int64_t begin, length;

  DEVICE OffsetRange(const Tensor& offsets, int64_t i, int64_t limit) {
    begin = clamped(offsets.index(i), 0, limit);
    length = clamped(offsets.index(i + 1), begin, limit) - begin;
  }
  DEVICE static int64_t clamped(int64_t x, int64_t low, int64_t high) { return x < low ? low : x < high ? x : high; }
};

// The keys of a segment; those of pages are counted from 0.
DEVICE int2 key_range(const GraphAttentionParams& p, const GraphDecodePlan& plan, int64_t segment) {
  if (!p.block_table) {
    OffsetRange range(p.graph.kv_offsets, segment, plan.key_tokens);
    return make_int2(int(range.begin), int(range.length));
  }
  int64_t length = p.graph.kv_offsets.index(segment + 1) - p.graph.kv_offsets.index(segment);
  return make_int2(0, int(OffsetRange::clamped(length, 0, plan.key_tokens)));
}

// The last of `count` > 0 numbers in ascending order that is not above x, or the first. A whole warp looks.
template <class At>
DEVICE int last_not_above(int count, int x, const At& at) {
  int low = 0, lane = threadIdx.x % 32;
  while (count > 1) {
    int step = (count + 31) / 32, i = lane * step;
    unsigned found = __ballot_sync(0xffffffffu, i < count && at(low + i) <= x);
    int last = found ? 31 - __clz(int(found)) : 0;
    low += last * step, count = min(step, count - last * step);
  }
  return low;
}

// Walks along the sources of a segment as the tiles ascend. What comes next has been loaded ahead.
struct SourceWalk {
  int index = 0;  // of the source
  GraphSource here{}, next{};
  int64_t turn = 0, next_turn = 0;

  DEVICE void start(const GraphDecodeTables& tables, int64_t first, int last, int at, bool turning) {
    index = at;
    load(tables, first + at, turning, here, turn);
    load(tables, first + min(at + 1, last), turning, next, next_turn);
  }
  DEVICE void seek(const GraphDecodeTables& tables, int64_t first, int last, int tile, bool turning) {
    while (index < last && tile >= next.tiles_before) {
      here = next, turn = next_turn;
      index++;
      if (index < last) load(tables, first + index + 1, turning, next, next_turn);
    }
  }

 private:
  DEVICE static void load(const GraphDecodeTables& tables, int64_t i, bool turning, GraphSource& source,
                          int64_t& turn) {
    source = tables.sources[i];
    if (turning) turn = tables.turns[i];
  }
};

// One split of a token's keys, for one key/value head. In `p`, packed tensors have a leading dimension of size 1.
struct GraphDecodeWork {
  const GraphAttentionParams& p;
  const GraphDecodePlan& plan;
  const GraphDecodeTables& tables;
  int token, split, splits;  // token: of this launch
  int head, row0, rows;
  int tiles = 0, first_tile = 0, own_seen = 0;
  int64_t sources = 0;  // where the segment's are
  int own = 0;          // the last of them
  int64_t number = 0;   // of the token in its segment
  SourceWalk placing, turning;

  DEVICE GraphDecodeWork(const GraphAttentionParams& params, const GraphDecodePlan& the_plan,
                         const GraphDecodeTables& the_tables, int64_t item)
      : p(params), plan(the_plan), tables(the_tables) {
    int kv_heads = int(p.k.size[2]);
    row0 = int(item % plan.row_tiles) * plan.row_tile, item /= plan.row_tiles;
    head = int(item % kv_heads), item /= kv_heads;
    rows = int(p.q.size[2]) / kv_heads;
    token = last_not_above(plan.tokens, int(item), [&](int t) { return tables.splits_before[t]; });
    split = int(item) - tables.splits_before[token], splits = 1;
    int64_t segment = tables.segments[token];
    if (segment < 0) return;

    OffsetRange queries(p.graph.q_offsets, segment, p.q.size[1]),
        edges(p.graph.edge_offsets, segment, p.graph.edge_sources.size[0]);
    number = plan.first_token + token - queries.begin;
    sources = edges.begin + segment, own = int(edges.length);
    GraphSource last = tables.sources[sources + own];
    own_seen = int(OffsetRange::clamped(last.length - queries.length + number + 1, 0, last.length));
    int all = last.tiles_before + (own_seen + plan.key_tile - 1) / plan.key_tile;
    splits = plan.splits_of(all);
    first_tile = plan.first_of(split, all);
    tiles = plan.first_of(split + 1, all) - first_tile;
    if (tiles <= 0) return;
    int first_source =
        last_not_above(own + 1, first_tile, [&](int i) { return tables.sources[sources + i].tiles_before; });
    placing.start(tables, sources, own, first_source, false);
    if (turns()) turning.start(tables, sources, own, first_source, true);
  }

  DEVICE bool turns() const { return bool(p.rotation.inv_freq); }
  // By how many positions queries turn for a tile.
  DEVICE int64_t turn_of(int tile) {
    turning.seek(tables, sources, own, first_tile + tile, true);
    return turning.turn + number;
  }

  // The number of a key in its source, if there is one.
  DEVICE int slot(int tile, int key) {
    placing.seek(tables, sources, own, first_tile + tile, false);
    int64_t slot = int64_t(first_tile + tile - placing.here.tiles_before) * plan.key_tile + key;
    return slot >= 0 && slot < (placing.index == own ? own_seen : placing.here.length) ? int(slot) : -1;
  }
  DEVICE int64_t table_entry(int tile, int key) {
    int at = slot(tile, key);
    if (!p.block_table) return 0;
    int64_t page = at / p.k.size[1];
    return at >= 0 && page < p.block_table.size[1] ? p.block_table.index(placing.here.segment, page) : -1;
  }
  // (page or 0, row in it) of a key, or (-1, 0) when there is none.
  DEVICE int2 place(int tile, int key, int64_t entry) {
    int at = slot(tile, key);
    if (at < 0 || entry < 0 || entry >= p.k.size[0]) return make_int2(-1, 0);
    if (p.block_table) return make_int2(int(entry), at % int(p.k.size[1]));
    int64_t row = int64_t(placing.here.begin) + at;
    return row < plan.key_tokens ? make_int2(0, int(row)) : make_int2(-1, 0);
  }

  DEVICE const Tensor& source(int, bool is_v) const { return is_v ? p.v : p.k; }
  DEVICE float factor(int, bool) const { return 1; }
  DEVICE const Tensor& q() const { return p.q; }
  template <class T>
  DEVICE const T* q_at(int row, int column) const {
    return p.q.at<const T>(0, plan.first_token + token, head * rows + row, column);
  }
  template <class T>
  DEVICE T* out_at(int row, int column) const {
    return p.out.at<T>(plan.first_token + token, head * rows + row, column);
  }
  DEVICE float* lse_at(int row) const { return p.lse.at<float>(head * rows + row, plan.first_token + token); }
  DEVICE float sink(int) const { return -INFINITY; }
  DEVICE int value_size() const { return int(p.v.size[3]); }
  DEVICE double softcap() const { return 0; }
  DEVICE int64_t partial_row(int row) const {
    return int64_t(tables.splits_before[token] + split) * p.q.size[2] + head * rows + row;
  }

  // The block's queries, turned, in pairs of neighbouring channels: write(row, channel, first, second), with row
  // counted from row0.
  template <class T, class Write>
  DEVICE void turn_queries(int64_t positions, const Write& write) const {
    int lanes = plan.head_tile / 4, lane = int(threadIdx.x) % lanes;
    if (lane >= int(p.q.size[3]) / 4) return;
    TwoPairs pairs(p.rotation.inv_freq, p.rotation.interleaved, lane * 2, positions);
    for (int row = int(threadIdx.x) / lanes; row < min(rows - row0, plan.row_tile); row += int(blockDim.x) / lanes) {
      const T* from = q_at<T>(row0 + row, 0);
      float x[4];
      load_two(from + pairs.low, false, x[0], x[1]);
      load_two(from + pairs.high, false, x[2], x[3]);
      pairs.turn(x);
      write(row, pairs.low, x[0], x[1]);
      write(row, pairs.high, x[2], x[3]);
    }
  }
};

}  // namespace torch_kernels
