// SPDX-License-Identifier: Apache-2.0
// A call's segments, read once from its index tensors: what each query segment sees, and how its queries turn for it.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/attention.h"
#include "graph_attention/rotation.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

// Key segments that a query segment sees, one after the other in the order of its edges, for which its queries turn
// alike.
struct Run {
  int64_t before = 0, length = 0;     // keys of the runs before it, and its own
  int turn = 0;                       // a number of Turns
  int64_t whole = 0, border = kNone;  // token t sees the keys before the larger of `whole` and border + t
  std::vector<Piece> pieces{};

  static constexpr int64_t kNone = int64_t(1) << 62;

  int64_t seen_by(int64_t token) const { return std::max(whole, border + token); }

  // The piece that holds all of keys [first, first + count), if one does.
  const Piece* holding(int64_t first, int64_t count) const {
    auto begins_after = [](int64_t key, const Piece& piece) { return key < piece.begin; };
    const Piece* piece = &*--std::upper_bound(pieces.begin() + 1, pieces.end(), first, begins_after);
    return first + count <= piece->begin + piece->length ? piece : nullptr;
  }
};

struct QuerySegment {
  int64_t first, tokens, keys = 0;  // `keys`: of all runs together
  std::vector<Run> runs;
};

template <class Real>
struct Segments {
  std::vector<QuerySegment> queries;
  Turns<Real> turns;

  Segments(const SegmentGraph& graph, const Rotation& rotation, bool paged) {
    int64_t longest = 0;
    for (int64_t a = 0; a < graph.query_segments(); a++) {
      int64_t first = graph.q_offsets.index(a), tokens = graph.q_offsets.index(a + 1) - first;
      queries.push_back({first, tokens, 0, {}});
      longest = std::max(longest, tokens);
    }
    if (rotation.inv_freq) turns = Turns<Real>(rotation, longest);
    for (int64_t a = 0; a < graph.query_segments(); a++)
      for_each_edge(graph, rotation, a, [&](int64_t segment, int64_t positions, bool own) {
        Run& run = add(queries[a], graph, segment, paged, positions);
        if (!own) return;
        run.whole = run.length - (graph.kv_offsets.index(segment + 1) - graph.kv_offsets.index(segment));
        run.border = run.length - queries[a].tokens + 1;
      });
  }

  // Calls see(segment, turn in positions, is its own) for what query segment a sees, its own last, without empty ones.
  template <class See>
  void for_each_edge(const SegmentGraph& graph, const Rotation& rotation, int64_t a, const See& see) const {
    auto length = [&](int64_t s) { return graph.kv_offsets.index(s + 1) - graph.kv_offsets.index(s); };
    if (queries[a].tokens == 0) return;
    for (int64_t e = graph.edge_offsets.index(a); e < graph.edge_offsets.index(a + 1); e++)
      if (int64_t source = graph.edge_sources.index(e); length(source) > 0)
        see(source, turns ? rotation.q_start.index(a) - rotation.edge_start.index(e) : 0, false);
    int64_t own = graph.own_segment.index(a);
    if (own < 0 || length(own) == 0) return;
    int64_t ahead = length(own) - queries[a].tokens;
    see(own, !turns ? 0 : rotation.own_start ? rotation.q_start.index(a) - rotation.own_start.index(a) : ahead, true);
  }

 private:
  // Returns the run that the segment has joined.
  Run& add(QuerySegment& query, const SegmentGraph& graph, int64_t segment, bool paged, int64_t positions) {
    int64_t begin = graph.kv_offsets.index(segment), length = graph.kv_offsets.index(segment + 1) - begin;
    int turn = turns ? turns.add(positions) : 0;
    if (query.runs.empty() || query.runs.back().turn != turn)
      query.runs.push_back({.before = query.keys, .turn = turn});
    Run& run = query.runs.back();
    // Packed segments that are neighbours in memory are one piece.
    Piece* last = run.pieces.empty() ? nullptr : &run.pieces.back();
    if (last && !paged && last->first + last->length == begin) {
      last->length += length;
    } else {
      run.pieces.push_back({run.length, length, paged ? segment : 0, paged ? 0 : begin});
    }
    run.length += length, query.keys += length;
    return run;
  }
};

// [Tk, Hk, D] as the cache [1, Tk, Hk, D]; pages stay.
inline Tensor as_cache(const Tensor& rows) {
  if (rows.rank == 4) return rows;
  Tensor cache = rows;
  cache.rank = 4, cache.size[0] = 1, cache.stride[0] = 0;
  for (int i = 0; i < 3; i++) cache.size[i + 1] = rows.size[i], cache.stride[i + 1] = rows.stride[i];
  return cache;
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
