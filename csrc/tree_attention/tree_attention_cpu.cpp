// SPDX-License-Identifier: Apache-2.0
// Tree attention on the CPU: split-KV flash attention in which all query rows of a key/value head (tree nodes times
// grouped heads) share each key tile. Prefix tiles need no mask; the tree's own keys are masked by ancestor bits built
// once per sequence.
#include "core/tree.h"
#include "cpu/attention.h"
#include "cpu/isa.h"
#include "tree_attention/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

constexpr int kMaxRows = 512;     // query rows of one task
constexpr int kSplitKeys = 2048;  // a sequence is cut into about this many keys per task...
constexpr int kMaxSplits = 32;    // ... up to this many tasks; the last also takes the tree

// The tree, and per node as a key the set of query rows that see it.
struct VisibleTree : Tree {
  std::vector<uint64_t> bits;  // [T][words]: bit t * group + g
  int64_t words;

  VisibleTree(const TreeAttentionParams& p, int64_t b, int group) : Tree(p.parents, b) {
    words = round_up(int64_t(nodes()) * group, kRowBlock) / 64;
    bits.assign(nodes() * words, 0);
    for (int t = 0; t < nodes(); t++)
      for (int a = depth[t] < 0 ? -1 : t; a >= 0; a = parent[a]) {
        if (p.window > 0 && depth[t] - depth[a] >= p.window) break;
        for (int g = 0; g < group; g++) {
          int64_t row = int64_t(t) * group + g;
          bits[a * words + row / 64] |= uint64_t(1) << (row % 64);
        }
      }
  }
};

// How one sequence's keys are cut: by its own prefix alone, so a row's bits depend neither on the batch nor on the rest
// of the tree.
struct Splits {
  int64_t prefix, total, length;
  int count;

  Splits(const TreeAttentionParams& p, int64_t b) {
    int64_t capacity = p.block_table ? p.block_table.size[1] * p.k_cache.size[1] : p.k_cache.size[1];
    prefix = std::clamp<int64_t>(p.prefix_lens.index(b), 0, capacity);
    total = prefix + p.q.size[1];
    length = round_up(std::max<int64_t>(kSplitKeys, (prefix + kMaxSplits - 1) / kMaxSplits), kKeyTile);
    count = int(std::max<int64_t>(1, (prefix + length - 1) / length));
  }
};

template <class Query>
class Forward {
  using Rows = SoftmaxRows<Query>;
  using Real = typename Rows::Real;
  using Unit = typename Rows::Unit;

 public:
  explicit Forward(const TreeAttentionParams& params)
      : p(params),
        batch(p.q.size[0]),
        nodes(int(p.q.size[1])),
        kv_heads(int(p.k_cache.size[2])),
        group(int(p.q.size[2]) / kv_heads) {
    chunk_rows = std::min(kMaxRows, nodes * group);
    chunks = (nodes * group + chunk_rows - 1) / chunk_rows;
    for (int64_t b = 0; b < batch; b++) {
      trees.emplace_back(p, b, group);
      splits.emplace_back(p, b);
      max_splits = std::max(max_splits, splits[b].count);
    }
    heads = heads_together();
  }

  void run() {
    Rows shape = rows_of(0);
    int64_t tasks = batch * chunks * (kv_heads / heads), queries_size = round_up(shape.queries_size(), 16),
            state_size = round_up(shape.state_size(), 16);
    static thread_local Scratch::Block shared;
    Scratch::plan(shared, [&](Scratch& scratch) {
      queries = scratch.take<Unit>(tasks * queries_size);
      states = scratch.take<Real>(tasks * max_splits * state_size);
    });
    auto queries_of = [&](int64_t task) { return queries + task * queries_size; };
    auto state_of = [&](int64_t task, int split) { return states + (task * max_splits + split) * state_size; };

    int64_t row_channels = int64_t(heads) * chunk_rows * (p.q.size[3] + p.v_cache.size[3]);
    parallel_for(tasks, row_channels, [&](int64_t task) { pack_queries(place(task), queries_of(task)); });
    int64_t groups = kv_heads / heads, keys = std::min<int64_t>(kSplitKeys, splits[0].total);
    parallel_for(tasks * max_splits, row_channels * keys, [&](int64_t i) {
      int split = int(i / groups % max_splits);  // neighbouring items share cache rows
      int64_t task = i / (groups * max_splits) * groups + i % groups;
      if (split < splits[place(task).b].count) attend(place(task), split, queries_of(task), state_of(task, split));
    });
    parallel_for(tasks, row_channels * max_splits,
                 [&](int64_t task) { finish(place(task), [&](int split) { return state_of(task, split); }); });
  }

 private:
  struct Place {
    int64_t b;
    int chunk, head;  // the first of the task's key/value heads
  };
  Place place(int64_t task) const {
    int64_t groups = kv_heads / heads;
    return {task / (chunks * groups), int(task / groups % chunks), int(task % groups) * heads};
  }

  Rows rows_of(int chunk) const {
    return Rows(heads, std::min(chunk_rows, nodes * group - chunk * chunk_rows), int(p.q.size[3]),
                int(p.v_cache.size[3]));
  }
  int node_of(int chunk, int row) const { return (chunk * chunk_rows + row) / group; }
  int query_head(Place at, int head, int row) const {
    return (at.head + head) * group + (at.chunk * chunk_rows + row) % group;
  }

  void pack_queries(Place at, Unit* packed) const {
    Rows rows = rows_of(at.chunk);
    rows.queries = packed;
    rows.pack_queries(
        [&](int h, int r) { return p.q.at<const Query>(at.b, node_of(at.chunk, r), query_head(at, h, r)); },
        p.q.stride[3]);
  }

  // A cache row holds all heads side by side. One task takes several, so that memory is read in longer runs and few
  // rows fill a vector together; which ones changes no bit of the result.
  int heads_together() const {
    int64_t threads = omp_get_max_threads(), lanes = Rows::lanes_of(chunk_rows);
    int most = 1;
    for (int heads = 2; heads <= kv_heads && heads * lanes <= kRowBlock; heads++) {
      int64_t wanted = heads * lanes <= kRowAlign ? threads : 2 * threads;
      if (kv_heads % heads == 0 && batch * chunks * max_splits * (kv_heads / heads) >= wanted) most = heads;
    }
    return most;
  }

  void attend(Place at, int split, Unit* packed, Real* state) const {
    MatmulSession session;
    Rows rows = rows_of(at.chunk);
    static thread_local Scratch::Block block;
    Scratch::plan(block, [&](Scratch& scratch) { rows.take(scratch); });
    const Splits& cut = splits[at.b];
    bool last = split + 1 == cut.count;
    int64_t begin = split * cut.length, end = last ? cut.prefix : begin + cut.length;

    rows.queries = packed;
    rows.use_state(state);
    rows.reset();
    for (int h = 0; h < heads; h++)
      rows.set_scale(h, p.k_scale ? Real(p.scale) * head_scale(p.k_scale, at.head + h) : Real(p.scale));
    RowSource keys{p.k_cache, p.block_table, at.b, at.head, end}, values{p.v_cache, p.block_table, at.b, at.head, end};
    attend_prefix(rows, at, keys, values, begin, end, session);
    auto apply_value_scale = [&] {
      for (int h = 0; h < heads && p.v_scale; h++) rows.scale_output(h, head_scale(p.v_scale, at.head + h));
    };
    if (last && p.k_tree) {  // the tree's own keys and values have no scale
      apply_value_scale();
      for (int h = 0; h < heads; h++) rows.set_scale(h, Real(p.scale));
      keys = {p.k_tree, {}, at.b, at.head, nodes};
      values = {p.v_tree, {}, at.b, at.head, nodes};
    }
    if (last) attend_tree(rows, at, keys, values, p.k_tree ? 0 : cut.prefix, session);
    if (!last || !p.k_tree) apply_value_scale();
  }

  Real head_scale(const Tensor& scales, int head) const {
    return *scales.at<const float>(scales.size[0] == 1 ? 0 : head);
  }

  // The tree's keys are those of the sources from slot `begin` on.
  void attend_tree(Rows& rows, Place at, const RowSource& keys, const RowSource& values, int64_t begin,
                   MatmulSession& session) const {
    const VisibleTree& tree = trees[at.b];
    typename Rows::Tiles tiles;
    for (int64_t first = 0; first < nodes; first += kKeyTile) {
      int count = int(std::min<int64_t>(kKeyTile, nodes - first));
      VisibleBits visible{tree.bits.data() + first * tree.words + at.chunk * chunk_rows / 64, tree.words};
      uint64_t of_all_heads[kKeyTile];
      if (heads > 1) {  // which have one word together
        for (int key = 0; key < count; key++) {
          uint64_t bits = visible.word(key, 0);
          of_all_heads[key] = 0;
          for (int h = 0; h < heads; h++) of_all_heads[key] |= bits << (h * rows.head_lanes);
        }
        visible = {of_all_heads, 1};
      }
      rows.load_tiles(tiles, keys, values, begin + first, count, true);
      rows.absorb(tiles, count, Real(p.softcap), visible, session);
    }
  }

  // A window hides prefix slots below position - window + 1; only tiles that such a border crosses need a mask.
  void attend_prefix(Rows& rows, Place at, const RowSource& keys, const RowSource& values, int64_t begin, int64_t end,
                     MatmulSession& session) const {
    const VisibleTree& tree = trees[at.b];
    std::vector<int64_t> lowest(rows.rows, 0);
    int64_t lowest_of_all = 0, lowest_for_all = 0;
    if (p.window > 0) {
      lowest_of_all = end;
      for (int r = 0; r < rows.rows; r++) {
        int depth = std::max(0, tree.depth[node_of(at.chunk, r)]);
        lowest[r] = std::max<int64_t>(0, splits[at.b].prefix + depth - p.window + 1);
        lowest_of_all = std::min(lowest_of_all, lowest[r]);
        lowest_for_all = std::max(lowest_for_all, lowest[r]);
      }
    }
    begin = std::max(begin, lowest_of_all / kKeyTile * kKeyTile);
    std::vector<int32_t> first_visible(rows.padded_lanes, kKeyTile);
    typename Rows::Tiles tiles;
    for (int64_t first = begin; first < end; first += kKeyTile) {
      int count = int(std::min<int64_t>(kKeyTile, end - first));
      bool masked = first < lowest_for_all;
      for (int h = 0; masked && h < heads; h++)
        for (int r = 0; r < rows.rows; r++)
          first_visible[h * rows.head_lanes + r] = int32_t(std::clamp<int64_t>(lowest[r] - first, 0, kKeyTile));
      rows.load_tiles(tiles, keys, values, first, count, masked);
      if (masked) {
        rows.absorb(tiles, count, Real(p.softcap), VisibleFrom{{first_visible.data()}}, session);
      } else {
        rows.absorb(tiles, count, Real(p.softcap), EverythingVisible{}, session);
      }
    }
  }

  // Merges the splits in ascending order, adds the sinks and writes the rows out.
  template <class State>
  void finish(Place at, const State& state_of) const {
    Rows rows = rows_of(at.chunk);
    auto sink = [&](int lane) {
      if (!p.sinks) return -Rows::kInfinity;
      return Real(*p.sinks.at<const float>(query_head(at, lane / rows.head_lanes, lane % rows.head_lanes)) * kLog2E);
    };
    rows.merge(splits[at.b].count, state_of, sink, [&](int h, int r, Real* result, double lse) {
      int node = node_of(at.chunk, r), head = query_head(at, h, r);
      bool sees_something = trees[at.b].depth[node] >= 0;
      if (!sees_something) std::fill_n(result, rows.value_channels, Real(0));
      convert(result, p.out.at<Query>(at.b, node, head), rows.value_channels);
      *p.lse.at<float>(at.b, head, node) = sees_something ? float(lse) : -std::numeric_limits<float>::infinity();
    });
  }

  const TreeAttentionParams& p;
  int64_t batch;
  int nodes, kv_heads, group, heads, chunk_rows, chunks, max_splits = 1;
  std::vector<VisibleTree> trees;
  std::vector<Splits> splits;
  Unit* queries;
  Real* states;
};

}  // namespace

void tree_attention(const TreeAttentionParams& params) {
  if (params.out.elements() == 0 && params.lse.elements() == 0) return;
  for_each_dtype(params.q.dtype, [&]<class Query>(Query) { Forward<Query>(params).run(); });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
