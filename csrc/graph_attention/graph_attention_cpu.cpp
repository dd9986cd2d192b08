// SPDX-License-Identifier: Apache-2.0
// Graph-KV attention on the CPU: flash attention of a chunk of a query segment's tokens, times grouped heads, over the
// key tiles of its sources, one after the other. Queries turn once for all sources that begin at the same position.
#include "cpu/attention.h"
#include "cpu/isa.h"
#include "graph_attention/segments.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

constexpr int kMaxRows = 640;     // query rows of one task
constexpr int kSplitKeys = 2048;  // the keys of few rows are cut into about this many per task...
constexpr int kMaxSplits = 32;    // ... up to this many tasks

template <class Query>
class Forward {
  using Rows = SoftmaxRows<Query>;
  using Real = typename Rows::Real;
  using Unit = typename Rows::Unit;
  using Element = typename Rows::Element;

  // A query segment's share of the work: `chunks` of its tokens, `splits` of its keys. Both follow from the segment
  // alone, so its bits do not depend on the others.
  struct Share {
    int64_t chunk_tokens, chunks, split_keys, splits;
    int heads;  // key/value heads of one task, which changes no bit
    int64_t state = 0;
  };
  struct Task {
    int64_t segment, chunk, split;
    int head;  // the first of its key/value heads
    int64_t cost;
  };

 public:
  explicit Forward(const GraphAttentionParams& params)
      : p(params),
        keys(as_cache(p.k)),
        values(as_cache(p.v)),
        kv_heads(int(keys.size[2])),
        group(int(p.q.size[1]) / kv_heads),
        segments(p.graph, p.rotation, bool(p.block_table)) {
    int64_t most = 0;
    for (const QuerySegment& query : segments.queries) {
      shares.push_back(share_of(query));
      most += shares.back().chunks * shares.back().splits * kv_heads;
    }
    for (Share& share : shares) share.heads = heads_together(share, most);
  }

  void run() {
    int64_t state_size = 0;
    for (size_t a = 0; a < shares.size(); a++) {
      Share& share = shares[a];
      share.state = state_size;
      if (share.splits > 1) state_size += share.chunks * share.splits * (kv_heads / share.heads) * state_size_of(share);
    }
    static thread_local Scratch::Block shared;
    Scratch::plan(shared, [&](Scratch& scratch) { states = scratch.take<Real>(state_size); });

    std::vector<Task> tasks = make_tasks([](const Share& share) { return share.splits; });
    // The longest first, so that no thread is left with one at the end.
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
    int64_t cost = 0;
    for (const Task& task : tasks) cost += task.cost / int64_t(tasks.size());
    parallel_for(int64_t(tasks.size()), cost, [&](int64_t i) { attend(tasks[i]); });

    std::vector<Task> merges = make_tasks([](const Share& share) { return int64_t(share.splits > 1); });
    parallel_for(int64_t(merges.size()), cost / 64,
                 [&](int64_t i) { finish(merges[i], [&](int split) { return state_of(merges[i], split); }); });
  }

 private:
  Share share_of(const QuerySegment& query) const {
    Share share{};
    int64_t rows = query.tokens * group;
    share.chunks = (rows + kMaxRows - 1) / kMaxRows;
    int64_t whole = std::max<int64_t>(1, kRowAlign / std::gcd(group, kRowAlign));  // tokens whose rows fill lanes
    share.chunk_tokens =
        share.chunks > 1 ? round_up((query.tokens + share.chunks - 1) / share.chunks, whole) : query.tokens;
    if (share.chunks > 1) share.chunks = (query.tokens + share.chunk_tokens - 1) / share.chunk_tokens;
    // Every split keeps a state for each row: many rows have few splits, and chunks enough without.
    int64_t most = std::clamp<int64_t>(2 * kMaxRows / std::max<int64_t>(1, rows), 1, kMaxSplits);
    share.split_keys = round_up(std::max<int64_t>(kSplitKeys, (query.keys + most - 1) / most), kKeyTile);
    share.splits = std::max<int64_t>(1, (query.keys + share.split_keys - 1) / share.split_keys);
    return share;
  }

  // A key row holds all heads side by side. One task takes several, so that memory is read in longer runs and few rows
  // fill a vector together.
  int heads_together(const Share& share, int64_t tasks) const {
    int64_t threads = omp_get_max_threads(), lanes = Rows::lanes_of(int(share.chunk_tokens) * group);
    int most = 1;
    for (int heads = 2; heads <= kv_heads && heads * lanes <= kRowBlock; heads++) {
      int64_t wanted = heads * lanes <= kRowAlign ? threads : 2 * threads;
      if (kv_heads % heads == 0 && tasks / heads >= wanted) most = heads;
    }
    return most;
  }

  template <class Splits>
  std::vector<Task> make_tasks(const Splits& splits_of) const {
    std::vector<Task> tasks;
    for (int64_t a = 0; a < int64_t(shares.size()); a++)
      for (int64_t split = 0; split < splits_of(shares[a]); split++)
        for (int64_t chunk = 0; chunk < shares[a].chunks; chunk++)
          for (int head = 0; head < kv_heads; head += shares[a].heads) {
            int64_t rows = std::min(shares[a].chunk_tokens, segments.queries[a].tokens) * group * shares[a].heads;
            int64_t seen = std::min(segments.queries[a].keys, shares[a].split_keys) + 1;
            tasks.push_back({a, chunk, split, head, rows * seen * (p.q.size[2] + values.size[3])});
          }
    return tasks;
  }

  Rows rows_of(const Task& task) const {
    const Share& share = shares[task.segment];
    int64_t tokens =
        std::min(share.chunk_tokens, segments.queries[task.segment].tokens - task.chunk * share.chunk_tokens);
    return Rows(share.heads, int(tokens) * group, int(p.q.size[2]), int(values.size[3]));
  }
  int64_t state_size_of(const Share& share) const {
    Rows rows(share.heads, int(share.chunk_tokens) * group, int(p.q.size[2]), int(values.size[3]));
    return round_up(rows.state_size(), 16);
  }
  Real* state_of(const Task& task, int64_t split) const {
    const Share& share = shares[task.segment];
    int64_t number = (split * share.chunks + task.chunk) * (kv_heads / share.heads) + task.head / share.heads;
    return states + share.state + number * state_size_of(share);
  }

  int64_t place_of(const Task& task, int row) const {
    return task.chunk * shares[task.segment].chunk_tokens + row / group;
  }
  int query_head(const Task& task, int head, int row) const { return (task.head + head) * group + row % group; }

  void attend(const Task& task) const {
    const Share& share = shares[task.segment];
    const QuerySegment& query = segments.queries[task.segment];
    MatmulSession session;
    Rows rows = rows_of(task);
    static thread_local Scratch::Block block;
    Real *turned, *own_state;
    Element* strip;
    int32_t* border;
    Scratch::plan(block, [&](Scratch& scratch) {
      rows.take(scratch);
      rows.queries = scratch.take<Unit>(rows.queries_size());
      turned = scratch.take<Real>(int64_t(rows.heads) * rows.rows * rows.channels);
      strip = scratch.take<Element>(kRowAlign * rows.padded_channels);
      border = scratch.take<int32_t>(rows.padded_lanes);
      own_state = scratch.take<Real>(share.splits > 1 ? 0 : rows.state_size());
    });
    rows.use_state(share.splits > 1 ? state_of(task, task.split) : own_state);
    rows.reset();
    for (int h = 0; h < rows.heads; h++) rows.set_scale(h, Real(p.scale));
    std::fill_n(rows.queries, rows.queries_size(), Unit{});
    std::fill_n(strip, kRowAlign * rows.padded_channels, Element{});
    if (segments.turns) {
      turn_by_place(task, rows, turned);
    } else {
      pack_queries(task, rows, strip);
    }
    const Run* turned_for = nullptr;
    int64_t begin = task.split * share.split_keys, end = begin + share.split_keys;
    for (const Run& run : query.runs) {
      // Tiles begin at multiples of kKeyTile in their run, and belong to the split in which they begin.
      int64_t first = round_up(std::max<int64_t>(0, begin - run.before), kKeyTile);
      int64_t stop = std::min(run.length, end - run.before);
      stop = std::min(stop, run.seen_by(place_of(task, rows.rows - 1)));
      if (first >= stop) continue;
      if (segments.turns && (!turned_for || run.turn != turned_for->turn))
        pack_queries(rows, turned, segments.turns.shared(run.turn), strip);
      turned_for = &run;
      attend_run(task, rows, run, first, stop, border, session);
    }
    if (share.splits == 1) finish(task, [&](int) { return own_state; });
  }

  // Calls get(head, row, strip row) for up to 16 rows at a time and packs them.
  template <class Get>
  void pack_strips(Rows& rows, Element* strip, const Get& get) const {
    for (int h = 0; h < rows.heads; h++)
      for (int first = 0; first < rows.rows; first += kRowAlign) {
        int count = std::min(kRowAlign, rows.rows - first);
        for (int r = 0; r < count; r++) get(h, first + r, strip + r * rows.padded_channels);
        for (int r = count; r < kRowAlign; r++) std::fill_n(strip + r * rows.padded_channels, rows.channels, Element{});
        rows.pack_rows(h, first, count, strip, rows.padded_channels);
      }
  }

  void pack_queries(const Task& task, Rows& rows, Element* strip) const {
    pack_strips(rows, strip, [&](int h, int r, Element* to) { get_query(task, h, r, to, rows.channels); });
  }

  // Queries that are turned by their place already, with a further turn.
  void pack_queries(Rows& rows, const Real* turned, const Real* turn, Element* strip) const {
    pack_strips(rows, strip, [&](int h, int r, Element* to) {
      Real row[256];
      const Real* from = turned + (int64_t(h) * rows.rows + r) * rows.channels;
      turn_row(from, row, rows.channels, turn, p.rotation.interleaved);
      convert(row, to, rows.channels);
    });
  }

  void turn_by_place(const Task& task, const Rows& rows, Real* turned) const {
    for (int h = 0; h < rows.heads; h++)
      for (int r = 0; r < rows.rows; r++, turned += rows.channels) {
        get_query(task, h, r, turned, rows.channels);
        int64_t place = place_of(task, r);
        if (place > 0) turn_row(turned, turned, rows.channels, segments.turns.of_place(place), p.rotation.interleaved);
      }
  }

  template <class To>
  void get_query(const Task& task, int head, int row, To* to, int channels) const {
    const Query* from =
        p.q.at<const Query>(segments.queries[task.segment].first + place_of(task, row), query_head(task, head, row));
    if (p.q.stride[2] == 1) return convert(from, to, channels);
    for (int c = 0; c < channels; c++) convert(from + c * p.q.stride[2], to + c, 1);
  }

  void attend_run(const Task& task, Rows& rows, const Run& run, int64_t first, int64_t stop, int32_t* border,
                  MatmulSession& session) const {
    typename Rows::Tiles tiles;
    for (; first < stop; first += kKeyTile) {
      int count = int(std::min<int64_t>(kKeyTile, run.length - first));
      bool masked = first + count > run.seen_by(place_of(task, 0));
      RowSource key_rows{keys, p.block_table, 0, task.head, run.length, run.pieces};
      int64_t slot = first;
      if (const Piece* piece = run.holding(first, count)) {
        int64_t slot_in_piece = first + piece->first - piece->begin;
        RowSource rows_of_piece{keys, p.block_table, piece->batch, task.head, piece->first + piece->length};
        // Tiles that begin within a page are read row by row.
        if (!p.block_table || slot_in_piece % rows_of_piece.run() == 0) key_rows = rows_of_piece, slot = slot_in_piece;
      }
      RowSource value_rows = key_rows;
      value_rows.tensor = values;
      rows.load_tiles(tiles, key_rows, value_rows, slot, count, masked);
      if (masked) {
        std::fill_n(border, rows.padded_lanes, 0);
        for (int h = 0; h < rows.heads; h++)
          for (int r = 0; r < rows.rows; r++)
            border[h * rows.head_lanes + r] =
                int32_t(std::clamp<int64_t>(run.seen_by(place_of(task, r)) - first, 0, kKeyTile));
        rows.absorb(tiles, count, Real(0), VisibleBefore{{border}}, session);
      } else {
        rows.absorb(tiles, count, Real(0), EverythingVisible{}, session);
      }
    }
  }

  template <class StateOf>
  void finish(const Task& task, const StateOf& state_of) const {
    Rows rows = rows_of(task);
    int64_t first = segments.queries[task.segment].first;
    rows.merge(
        int(shares[task.segment].splits), state_of, [](int) { return -Rows::kInfinity; },
        [&](int h, int r, Real* result, double lse) {
          int64_t token = first + place_of(task, r);
          int head = query_head(task, h, r);
          if (lse == -Rows::kInfinity) std::fill_n(result, rows.value_channels, Real(0));
          convert(result, p.out.at<Query>(token, head), rows.value_channels);
          if (p.lse.dtype == DType::float64) {  // for the backward pass
            *p.lse.at<double>(head, token) = lse;
          } else {
            *p.lse.at<float>(head, token) = float(lse);
          }
        });
  }

  const GraphAttentionParams& p;
  Tensor keys, values;
  int kv_heads, group;
  Segments<Real> segments;
  std::vector<Share> shares;
  Real* states;
};

}  // namespace

void graph_attention(const GraphAttentionParams& params) {
  if (params.out.elements() == 0 && params.lse.elements() == 0) return;
  for_each_dtype(params.q.dtype, [&]<class Query>(Query) { Forward<Query>(params).run(); });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
