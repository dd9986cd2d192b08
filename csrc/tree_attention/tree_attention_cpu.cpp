// SPDX-License-Identifier: Apache-2.0
// Tree attention on the CPU: split-KV flash attention in which all query rows of a key/value head (tree nodes times
// grouped heads) share each key tile. Prefix tiles need no mask; the tree's own keys are masked by ancestor bits built
// once per sequence.
#include "cpu/attention.h"
#include "cpu/isa.h"
#include "tree_attention/params.h"
#include "tree_attention/tree.h"

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
  }

  void run() {
    Rows shape = rows_of(0);
    int64_t tasks = batch * chunks * kv_heads, queries_size = round_up(shape.queries_size(), 16),
            state_size = round_up(shape.state_size(), 16);
    static thread_local Scratch::Block shared;
    Scratch::plan(shared, [&](Scratch& scratch) {
      queries = scratch.take<Unit>(tasks * queries_size);
      states = scratch.take<Real>(tasks * max_splits * state_size);
    });
    auto queries_of = [&](int64_t task) { return queries + task * queries_size; };
    auto state_of = [&](int64_t task, int split) { return states + (task * max_splits + split) * state_size; };

    int64_t row_channels = int64_t(chunk_rows) * (p.q.size[3] + p.v_cache.size[3]);
    parallel_for(tasks, row_channels, [&](int64_t task) { pack_queries(place(task), queries_of(task)); });
    int heads = heads_together();
    int64_t items = tasks / heads * max_splits, keys = std::min<int64_t>(kSplitKeys, splits[0].total);
    parallel_for(items, heads * row_channels * keys, [&](int64_t i) {
      int64_t head_groups = kv_heads / heads, outer = i / (max_splits * head_groups);
      int split = int(i / head_groups % max_splits);
      int64_t task = outer * kv_heads + i % head_groups * heads;
      if (split >= splits[place(task).b].count) return;
      attend(
          place(task), heads, split, [&](int h) { return queries_of(task + h); },
          [&](int h) { return state_of(task + h, split); });
    });
    parallel_for(tasks, row_channels * max_splits,
                 [&](int64_t task) { finish(place(task), [&](int split) { return state_of(task, split); }); });
  }

 private:
  struct Place {
    int64_t b;
    int chunk, head;
  };
  Place place(int64_t task) const {
    return {task / (chunks * kv_heads), int(task / kv_heads % chunks), int(task % kv_heads)};
  }

  Rows rows_of(int chunk) const {
    return Rows(std::min(chunk_rows, nodes * group - chunk * chunk_rows), int(p.q.size[3]), int(p.v_cache.size[3]));
  }
  int node_of(int chunk, int row) const { return (chunk * chunk_rows + row) / group; }
  int query_head(Place at, int row) const { return at.head * group + (at.chunk * chunk_rows + row) % group; }

  void pack_queries(Place at, Unit* packed) const {
    Rows rows = rows_of(at.chunk);
    rows.queries = packed;
    rows.pack_queries([&](int r) { return p.q.at<const Query>(at.b, node_of(at.chunk, r), query_head(at, r)); },
                      p.q.stride[3]);
  }

  // A cache row holds all heads side by side. One task takes several, tile by tile, so that memory is read in longer
  // runs; which ones changes no bit of the result.
  int heads_together() const {
    constexpr int kMostRows = 64;  // of all heads together: more gained nothing
    int64_t wanted = 4 * omp_get_max_threads(), most = 1;
    for (int heads = 2; heads <= kv_heads && heads * chunk_rows <= kMostRows; heads++)
      if (kv_heads % heads == 0 && batch * chunks * max_splits * (kv_heads / heads) >= wanted) most = heads;
    return int(most);
  }

  struct Head {
    Rows rows;
    Real scale;
  };

  template <class Queries, class States>
  void attend(Place at, int head_count, int split, const Queries& queries_of, const States& state_of) const {
    [[maybe_unused]] MatmulSession session;
    Rows shape = rows_of(at.chunk);
    static thread_local Scratch::Block block;
    Scratch::plan(block, [&](Scratch& scratch) { shape.take(scratch, head_count); });
    const VisibleTree& tree = trees[at.b];
    const Splits& cut = splits[at.b];
    bool last = split + 1 == cut.count;
    int64_t begin = split * cut.length, end = last ? cut.prefix : begin + cut.length;

    std::vector<Head> heads;
    for (int h = 0; h < head_count; h++) {
      Real scale = p.k_scale ? Real(p.scale) * head_scale(p.k_scale, at.head + h) : Real(p.scale);
      heads.push_back({shape, scale});
      heads[h].rows.queries = queries_of(h);
      heads[h].rows.use_state(state_of(h));
      heads[h].rows.reset();
    }
    RowSource keys{p.k_cache, p.block_table, at.b, at.head, end}, values{p.v_cache, p.block_table, at.b, at.head, end};
    attend_prefix(heads, at, keys, values, begin, end);
    auto apply_value_scale = [&] {
      for (int h = 0; h < head_count && p.v_scale; h++) heads[h].rows.scale_output(head_scale(p.v_scale, at.head + h));
    };
    if (last && p.k_tree) {  // the tree's own keys and values have no scale
      apply_value_scale();
      for (Head& head : heads) head.scale = Real(p.scale);
      keys = {p.k_tree, {}, at.b, at.head, nodes};
      values = {p.v_tree, {}, at.b, at.head, nodes};
    }
    typename Rows::Tiles tiles;
    for (int64_t first = 0; last && first < nodes; first += kKeyTile) {
      int count = int(std::min<int64_t>(kKeyTile, nodes - first));
      VisibleBits visible{tree.bits.data() + first * tree.words + at.chunk * chunk_rows / 64, tree.words};
      shape.load_tiles(tiles, keys, values, head_count, p.k_tree ? first : cut.prefix + first, count, true);
      for (int h = 0; h < head_count; h++)
        heads[h].rows.absorb(tiles, h, count, heads[h].scale, Real(p.softcap), visible);
    }
    if (!last || !p.k_tree) apply_value_scale();
  }

  Real head_scale(const Tensor& scales, int head) const {
    return *scales.at<const float>(scales.size[0] == 1 ? 0 : head);
  }

  // A window hides prefix slots below position - window + 1; only tiles that such a border crosses need a mask.
  void attend_prefix(std::vector<Head>& heads, Place at, const RowSource& keys, const RowSource& values, int64_t begin,
                     int64_t end) const {
    const VisibleTree& tree = trees[at.b];
    int rows = heads[0].rows.rows;
    std::vector<int64_t> lowest(rows, 0);
    int64_t lowest_of_all = 0, lowest_for_all = 0;
    if (p.window > 0) {
      lowest_of_all = end;
      for (int r = 0; r < rows; r++) {
        int depth = std::max(0, tree.depth[node_of(at.chunk, r)]);
        lowest[r] = std::max<int64_t>(0, splits[at.b].prefix + depth - p.window + 1);
        lowest_of_all = std::min(lowest_of_all, lowest[r]);
        lowest_for_all = std::max(lowest_for_all, lowest[r]);
      }
    }
    begin = std::max(begin, lowest_of_all / kKeyTile * kKeyTile);
    std::vector<int32_t> first_visible(heads[0].rows.padded_rows, kKeyTile);
    typename Rows::Tiles tiles;
    for (int64_t first = begin; first < end; first += kKeyTile) {
      int count = int(std::min<int64_t>(kKeyTile, end - first));
      bool masked = first < lowest_for_all;
      for (int r = 0; masked && r < rows; r++)
        first_visible[r] = int32_t(std::clamp<int64_t>(lowest[r] - first, 0, kKeyTile));
      heads[0].rows.load_tiles(tiles, keys, values, int(heads.size()), first, count, masked);
      for (int h = 0; h < int(heads.size()); h++) {
        auto absorb = [&](const auto& visible) {
          heads[h].rows.absorb(tiles, h, count, heads[h].scale, Real(p.softcap), visible);
        };
        if (masked) {
          absorb(VisibleFrom{first_visible.data()});
        } else {
          absorb(EverythingVisible{});
        }
      }
    }
  }

  // Merges the splits in ascending order, adds the sinks and writes the rows out.
  template <class State>
  void finish(Place at, const State& state_of) const {
    Rows rows = rows_of(at.chunk);
    int count = splits[at.b].count;
    constexpr int lanes = Rows::kLane;
    static thread_local Scratch::Block block;
    Real *weight, *transposed;
    Scratch::plan(block, [&](Scratch& scratch) {
      weight = scratch.take<Real>(count * lanes);
      transposed = scratch.take<Real>(int64_t(lanes) * rows.padded_value_channels);
    });
    for (int row = 0; row < rows.padded_rows; row += lanes) {
      int width = rows.block_rows(row / kRowBlock * kRowBlock);
      Vector<Real> sink;
      for (int i = 0; i < lanes; i++)
        sink[i] = p.sinks && row + i < rows.rows ? Real(*p.sinks.at<const float>(query_head(at, row + i)) * kLog2E)
                                                 : -Rows::kInfinity;
      Vector<Real> highest = sink;
      for (int s = 0; s < count; s++) {
        rows.use_state(state_of(s));
        highest = maximum(highest, load(rows.maximum + row));
      }
      Vector<Real> base = highest == -Rows::kInfinity ? Vector<Real>{} : highest, total = exp2_vector(sink - base);
      for (int s = 0; s < count; s++) {
        rows.use_state(state_of(s));
        Vector<Real> w = exp2_vector(load(rows.maximum + row) - base);
        store(weight + s * lanes, w);
        total += w * load(rows.sum + row);
      }
      Vector<Real> inverse = 1 / total;
      for (int c = 0; c < rows.value_channels; c++) {
        Vector<Real> sum{};
        for (int s = 0; s < count; s++) {
          rows.use_state(state_of(s));
          int64_t offset =
              int64_t(row / kRowBlock * kRowBlock) * rows.padded_value_channels + int64_t(c) * width + row % kRowBlock;
          sum += load(rows.out + offset) * load(weight + s * lanes);
        }
        sum *= inverse;
        for (int i = 0; i < lanes; i++) transposed[i * rows.value_channels + c] = sum[i];
      }
      for (int i = 0; i < lanes && row + i < rows.rows; i++) {
        int node = node_of(at.chunk, row + i), head = query_head(at, row + i);
        bool sees_something = trees[at.b].depth[node] >= 0;
        if (!sees_something) std::fill_n(transposed + i * rows.value_channels, rows.value_channels, Real(0));
        convert(transposed + i * rows.value_channels, p.out.at<Query>(at.b, node, head), rows.value_channels);
        *p.lse.at<float>(at.b, head, node) =
            sees_something ? float(double(base[i]) * 0.69314718055994531 + std::log(double(total[i])))
                           : -std::numeric_limits<float>::infinity();
      }
    }
  }

  const TreeAttentionParams& p;
  int64_t batch;
  int nodes, kv_heads, group, chunk_rows, chunks, max_splits = 1;
  std::vector<VisibleTree> trees;
  std::vector<Splits> splits;
  Unit* queries;
  Real* states;
};

}  // namespace

void tree_attention(const TreeAttentionParams& params) {
  if (params.out.elements() == 0 && params.lse.elements() == 0) return;
  switch (params.q.dtype) {
    case DType::float64: return Forward<double>(params).run();
    case DType::float16: return Forward<Half>(params).run();
    case DType::bfloat16: return Forward<BFloat16>(params).run();
    default: return Forward<float>(params).run();
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
