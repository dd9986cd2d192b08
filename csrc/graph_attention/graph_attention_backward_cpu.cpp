// SPDX-License-Identifier: Apache-2.0
// The backward pass on the CPU, twice over the graph and without atomics: once by query segment for the gradients of
// queries, once by key segment, whose targets are listed in ascending order, for those of keys and values.
//
// Scores are transposed as in the forward pass: [key, row], rows being tokens times grouped heads in blocks of 64. With
// weights P, dV = P^T dO and, for dS = P (dO V^T - rowsum(dO out)), dQ = dS K, dK = dS^T Q.
#include "cpu/attention.h"
#include "cpu/isa.h"
#include "graph_attention/segments.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {

void graph_attention(const GraphAttentionParams&);

namespace {

constexpr int kBlockRows = kRowBlock;
constexpr int kTaskBlocks = 8;  // of query rows in a task of the first pass
constexpr int kTaskKeys = 512;  // in a task of the second

template <class Query>
class Backward {
  using Rows = SoftmaxRows<Query>;
  using Element = typename Rows::Element;
  using Unit = typename Rows::Unit;
  using Real = typename Rows::Real;
  static constexpr int kPack = Rows::kPack, kLane = Rows::kLane, kPairStride = kKeyTile / kPack + Rows::kSpare;

 public:
  explicit Backward(const GraphAttentionBackwardParams& params)
      : p(params),
        keys(as_cache(p.k)),
        values(as_cache(p.v)),
        tokens(p.q.size[0]),
        kv_heads(int(p.k.size[1])),
        group(int(p.q.size[1]) / kv_heads),
        channels(int(p.q.size[2])),
        value_channels(int(p.v.size[2])),
        width(int(round_up(channels, kPack > 1 ? 32 : 16))),
        value_width(int(round_up(value_channels, kPack > 1 ? 32 : 16))),
        segments(p.graph, p.rotation, false) {}

  void run() {
    std::vector<Real> row_sums(p.q.size[1] * tokens), row_lse;
    delta = row_sums.data();
    parallel_for(tokens, p.q.size[1] * value_channels, [&](int64_t t) { sum_row(t, row_sums.data()); });
    if constexpr (std::is_same_v<Query, double>) {
      row_lse.resize(row_sums.size());
      exact_lse(row_lse.data());
    }
    struct Task {
      int64_t segment, first;
      int head;
    };
    std::vector<Task> by_query, by_key;
    for (int64_t a = 0; a < int64_t(segments.queries.size()); a++)
      for (int64_t row = 0; row < segments.queries[a].tokens * group; row += kTaskBlocks * kBlockRows)
        for (int h = 0; h < kv_heads; h++) by_query.push_back({a, row, h});
    for (int64_t s = 0; s < p.graph.key_segments(); s++)
      for (int64_t key = 0; key < length_of(s); key += kTaskKeys)
        for (int h = 0; h < kv_heads; h++) by_key.push_back({s, key, h});
    list_targets();
    clear_outside();
    int64_t cost = int64_t(kBlockRows) * kKeyTile * (channels + value_channels);
    parallel_for(int64_t(by_query.size()), cost,
                 [&](int64_t i) { query_gradients(by_query[i].segment, by_query[i].first, by_query[i].head); });
    parallel_for(int64_t(by_key.size()), cost,
                 [&](int64_t i) { key_gradients(by_key[i].segment, by_key[i].first, by_key[i].head); });
  }

 private:
  // A block of query rows as the products want them; rows past the last are zero, with weights of zero.
  struct Block {
    Element *q, *grad;               // [64][width], [64][value_width]
    Unit *q_columns, *grad_columns;  // [width / kPack][64], [value_width / kPack][64]
    Unit *q_pairs, *grad_pairs;      // [64 / kPack][width], [64 / kPack][value_width]
    Real *lse, *delta;               // [64], lse in powers of two
    int32_t* border;                 // [64]: keys that a row sees, counted within the tile
  };
  struct Target {
    int64_t query, border;  // token t of this query segment sees the keys before border + t
    int turn;
  };

  int64_t length_of(int64_t s) const { return p.graph.kv_offsets.index(s + 1) - p.graph.kv_offsets.index(s); }

  void sum_row(int64_t t, Real* sums) const {
    for (int64_t h = 0; h < p.q.size[1]; h++) {
      const Query *grad = p.grad_out.at<const Query>(t, h), *out = p.out.at<const Query>(t, h);
      Real sum = 0;
      for (int c = 0; c < value_channels; c++)
        sum += Real(to_float(grad[c * p.grad_out.stride[2]])) * Real(to_float(out[c * p.out.stride[2]]));
      sums[h * tokens + t] = sum;
    }
  }

  // lse is float32, which float64 gradients cannot stand on: the forward pass gives it once more, in float64.
  void exact_lse(Real* lse) {
    std::vector<Real> out(tokens * p.q.size[1] * value_channels);
    Tensor out_view = p.grad_out, lse_view = p.lse;
    out_view.data = out.data(), lse_view.data = lse, lse_view.dtype = DType::float64;
    out_view.stride[0] = p.q.size[1] * value_channels, out_view.stride[1] = value_channels, out_view.stride[2] = 1;
    lse_view.stride[0] = tokens, lse_view.stride[1] = 1;
    graph_attention({out_view, lse_view, p.q, p.k, p.v, p.graph, {}, p.rotation, p.scale});
    exact = lse;
  }

  void list_targets() {
    targets.resize(p.graph.key_segments());
    for (int64_t a = 0; a < p.graph.query_segments(); a++)
      segments.for_each_edge(p.graph, p.rotation, a, [&](int64_t segment, int64_t positions, bool own) {
        int64_t border = own ? length_of(segment) - segments.queries[a].tokens + 1 : Run::kNone;
        targets[segment].push_back({a, border, segments.turns ? segments.turns.add(positions) : 0});
      });
  }

  // Keys before the first segment and after the last have no gradient.
  void clear_outside() const {
    int64_t first = p.graph.kv_offsets.index(0), last = p.graph.kv_offsets.index(p.graph.key_segments());
    for (const Tensor* grad : {&p.grad_k, &p.grad_v}) {
      std::fill_n(grad->at<Query>(0), first * grad->stride[0], Query{});
      std::fill_n(grad->at<Query>(last), (grad->size[0] - last) * grad->stride[0], Query{});
    }
  }

  void take(Scratch& scratch, Block& block) const {
    block.q = scratch.take<Element>(kBlockRows * width);
    block.grad = scratch.take<Element>(kBlockRows * value_width);
    block.q_columns = scratch.take<Unit>(kBlockRows * width / kPack);
    block.grad_columns = scratch.take<Unit>(kBlockRows * value_width / kPack);
    block.q_pairs = scratch.take<Unit>(kBlockRows * width / kPack);
    block.grad_pairs = scratch.take<Unit>(kBlockRows * value_width / kPack);
    block.lse = scratch.take<Real>(kBlockRows);
    block.delta = scratch.take<Real>(kBlockRows);
    block.border = scratch.take<int32_t>(kBlockRows);
  }

  template <class To>
  static void copy_row(const Tensor& from, int64_t t, int64_t h, To* to, int count) {
    const Query* row = from.at<const Query>(t, h);
    if (from.stride[2] == 1) return convert(row, to, count);
    for (int c = 0; c < count; c++) convert(row + c * from.stride[2], to + c, 1);
  }

  // Rows from `first` on, of the heads that share key head `head`, turned for some edge.
  void load(Block& block, int64_t a, int64_t first, int head, int turn) const {
    const QuerySegment& query = segments.queries[a];
    std::fill_n(block.q, kBlockRows * width, Element{});
    std::fill_n(block.grad, kBlockRows * value_width, Element{});
    Real row[256];
    for (int r = 0; r < kBlockRows; r++) {
      int64_t place = (first + r) / group, t = query.first + place, h = int64_t(head) * group + (first + r) % group;
      block.lse[r] = Rows::kInfinity, block.delta[r] = 0;
      if (place >= query.tokens) continue;
      if (segments.turns) {
        copy_row(p.q, t, h, row, channels);
        turn_row(row, row, channels, segments.turns.of_place(place), p.rotation.interleaved);
        turn_row(row, row, channels, segments.turns.shared(turn), p.rotation.interleaved);
        convert(row, block.q + r * width, channels);
      } else {
        copy_row(p.q, t, h, block.q + r * width, channels);
      }
      copy_row(p.grad_out, t, h, block.grad + r * value_width, value_channels);
      Real lse = exact ? exact[h * tokens + t] : Real(*p.lse.at<const float>(h, t));
      block.lse[r] = lse * Real(kLog2E), block.delta[r] = delta[h * tokens + t];
    }
    columns_of(block.q, width, block.q_columns);
    columns_of(block.grad, value_width, block.grad_columns);
  }

  static void columns_of(const Element* rows, int width, Unit* columns) {
    transpose_units(reinterpret_cast<const Unit*>(rows), width / kPack, columns, kBlockRows, kBlockRows, width / kPack);
  }

  // Rows as the right operand of a product along them: pairs of rows, or the rows as they are.
  static void pairs_of(const Element* rows, int64_t stride, int count, int width, Unit* pairs) {
    if constexpr (kPack > 1) {
      for (int r = 0; r < count; r += 2)
        interleave(rows + r * stride, rows + (r + 1) * stride, width, pairs + r / 2 * int64_t(width));
    } else {
      for (int r = 0; r < count; r++) std::copy_n(rows + r * stride, width, pairs + r * int64_t(width));
    }
  }

  // Numbers that are not finite leave an operand whose other factor may be a masked zero. Says if there were any.
  static bool clear_nonfinite(Element* rows, int64_t count) {
    if (all_finite(rows, count)) return false;
    for (int64_t i = 0; i < count; i++)
      if (!is_finite(rows[i])) rows[i] = Element{};
    return true;
  }

  struct Tile {
    Element *keys, *values;  // [128][width], [128][value_width]
    Real *scores, *grads;    // [128][64]: scores, then weights; gradients of weights, then of scores
  };
  void take(Scratch& scratch, Tile& tile) const {
    tile.keys = scratch.take<Element>(kKeyTile * width);
    tile.values = scratch.take<Element>(kKeyTile * value_width);
    tile.scores = scratch.take<Real>(kKeyTile * kBlockRows);
    tile.grads = scratch.take<Real>(kKeyTile * kBlockRows);
  }

  static int padded(int count) { return int(round_up(count, kPack > 1 ? 32 : 1)); }

  // Weights and gradients of scores of `count` keys, zero from there to the padded count.
  void weigh(const Tile& tile, const Element* key_rows, const Element* value_rows, int count, const Block& block,
             bool masked) const {
    matmul<false, true>(reinterpret_cast<const Unit*>(key_rows), width / kPack, block.q_columns, kBlockRows,
                        tile.scores, kBlockRows, padded(count), kBlockRows, width / kPack);
    matmul<false, true>(reinterpret_cast<const Unit*>(value_rows), value_width / kPack, block.grad_columns, kBlockRows,
                        tile.grads, kBlockRows, padded(count), kBlockRows, value_width / kPack);
    VisibleBefore visible{{block.border}};
    Real to_log2 = Real(p.scale * kLog2E);
    for (int c = 0; c < kBlockRows; c += kLane) {
      Vector<Real> lse = load_vector(block.lse + c), sum = load_vector(block.delta + c);
      for (int key = 0; key < count; key++) {
        Real *score = tile.scores + key * kBlockRows + c, *grad = tile.grads + key * kBlockRows + c;
        Vector<Real> w = exp2_vector(load_vector(score) * to_log2 - lse), g = w * (load_vector(grad) - sum);
        if (masked) {
          auto seen = visible.template lanes<Real>(key, c);
          w = seen ? w : Vector<Real>{}, g = seen ? g : Vector<Real>{};
        }
        store(score, w), store(grad, g);
      }
    }
    int rest = (padded(count) - count) * kBlockRows;
    std::fill_n(tile.scores + count * kBlockRows, rest, Real(0));
    std::fill_n(tile.grads + count * kBlockRows, rest, Real(0));
  }
  static Vector<Real> load_vector(const Real* from) { return cpu::TORCH_KERNELS_ISA::load(from); }

  // Fills in what rows see of the tile from key `first` on; whether some do not see all of it.
  bool set_border(Block& block, int64_t first_row, int64_t whole, int64_t border, int64_t first, int count) const {
    if (border == Run::kNone) return false;
    for (int r = 0; r < kBlockRows; r++)
      block.border[r] =
          int32_t(std::clamp<int64_t>(std::max(whole, border + (first_row + r) / group) - first, 0, count));
    return block.border[0] < count;
  }

  // ---- by query segment ----

  void query_gradients(int64_t a, int64_t first_row, int head) const {
    const QuerySegment& query = segments.queries[a];
    int rows = int(std::min<int64_t>(kTaskBlocks * kBlockRows, query.tokens * group - first_row));
    int blocks = (rows + kBlockRows - 1) / kBlockRows;
    MatmulSession session;
    static thread_local Scratch::Block memory;
    Block block[kTaskBlocks];
    Tile tile;
    Unit *key_pairs, *by_key, *by_row;
    Real *sum, *total;
    Scratch::plan(memory, [&](Scratch& scratch) {
      for (int b = 0; b < blocks; b++) take(scratch, block[b]);
      take(scratch, tile);
      key_pairs = scratch.take<Unit>(kKeyTile / kPack * width);
      by_key = scratch.take<Unit>(kKeyTile / kPack * kBlockRows);
      by_row = scratch.take<Unit>(kBlockRows * kPairStride);
      sum = scratch.take<Real>(int64_t(blocks) * kBlockRows * width);
      total = scratch.take<Real>(int64_t(rows) * channels);
    });
    std::fill_n(sum, int64_t(blocks) * kBlockRows * width, Real(0));
    std::fill_n(total, int64_t(rows) * channels, Real(0));
    const Run* loaded = nullptr;
    for (const Run& run : query.runs) {
      if (!loaded || loaded->turn != run.turn) {
        if (loaded) turn_back(sum, total, rows, loaded->turn);
        for (int b = 0; b < blocks; b++) load(block[b], a, first_row + b * kBlockRows, head, run.turn);
      }
      loaded = &run;
      RowSource key_source{keys, {}, 0, head, run.length, run.pieces}, value_source = key_source;
      value_source.tensor = values;
      int64_t stop = run.length;
      stop = std::min(stop, run.seen_by((first_row + rows - 1) / group));
      for (int64_t first = 0; first < stop; first += kKeyTile) {
        int count = int(std::min<int64_t>(kKeyTile, run.length - first));
        gather(key_source, 1, first, count, padded(count), channels, width, tile.keys, width);
        gather(value_source, 1, first, count, padded(count), value_channels, value_width, tile.values, value_width);
        bool masks = first + count > run.seen_by(first_row / group);
        pairs_of(tile.keys, width, padded(count), width, key_pairs);
        if (masks) clear_nonfinite(reinterpret_cast<Element*>(key_pairs), int64_t(padded(count)) * width);
        for (int b = 0; b < blocks; b++) {
          bool masked = set_border(block[b], first_row + b * kBlockRows, run.whole, run.border, first, count);
          weigh(tile, tile.keys, tile.values, count, block[b], masked);
          add_query_gradients(tile, key_pairs, padded(count), by_key, by_row, sum + int64_t(b) * kBlockRows * width);
        }
      }
    }
    if (loaded) turn_back(sum, total, rows, loaded->turn);
    for (int r = 0; r < rows; r++) {
      Real* row = total + int64_t(r) * channels;
      int64_t place = (first_row + r) / group;
      if (segments.turns) turn_row<true>(row, row, channels, segments.turns.of_place(place), p.rotation.interleaved);
      for (int c = 0; c < channels; c++) row[c] *= Real(p.scale);
      convert(row, p.grad_q.at<Query>(query.first + place, int64_t(head) * group + (first_row + r) % group), channels);
    }
  }

  void add_query_gradients(const Tile& tile, const Unit* key_pairs, int count, Unit* by_key, Unit* by_row,
                           Real* sum) const {
    const Unit* left;
    int64_t left_stride = kBlockRows;
    if constexpr (kPack == 1) {
      left = tile.grads;
    } else {
      for (int key = 0; key < count; key += 2)
        for (int c = 0; c < kBlockRows; c += kLane)
          Rows::store_pairs(by_key + key / 2 * kBlockRows + c, load_vector(tile.grads + key * kBlockRows + c),
                            load_vector(tile.grads + (key + 1) * kBlockRows + c));
      left = by_key;
      if constexpr (kMultipliesTiles<Unit>) {
        transpose_units(by_key, kBlockRows, by_row, kPairStride, count / 2, kBlockRows);
        left = by_row, left_stride = kPairStride;
      }
    }
    matmul<true, kMultipliesTiles<Unit>>(left, left_stride, key_pairs, width, sum, width, kBlockRows, width,
                                         count / kPack);
  }

  // total += sum in the frame of unturned edges; sum = 0.
  void turn_back(Real* sum, Real* total, int rows, int turn) const {
    for (int r = 0; r < rows; r++, sum += width, total += channels) {
      in_order(sum, width);
      if (segments.turns) turn_row<true>(sum, sum, channels, segments.turns.shared(turn), p.rotation.interleaved);
      for (int c = 0; c < channels; c++) total[c] += sum[c];
      std::fill_n(sum, width, Real(0));
    }
  }

  static void in_order(Real* row, int width) {
    if constexpr (kPack > 1) restore_order(row, width);
  }

  // ---- by key segment ----

  void key_gradients(int64_t s, int64_t first_key, int head) const {
    int64_t begin = p.graph.kv_offsets.index(s);
    int count = int(std::min<int64_t>(kTaskKeys, length_of(s) - first_key));
    MatmulSession session;
    static thread_local Scratch::Block memory;
    Block block;
    Tile tile;
    Element *key_rows, *value_rows, *left;
    Real *grad_k, *grad_v;
    constexpr int kRoom = kTaskKeys + kKeyTile;
    Scratch::plan(memory, [&](Scratch& scratch) {
      take(scratch, block);
      take(scratch, tile);
      key_rows = scratch.take<Element>(kRoom * width);
      value_rows = scratch.take<Element>(kRoom * value_width);
      left = scratch.take<Element>(kKeyTile * kBlockRows);
      grad_k = scratch.take<Real>(int64_t(kRoom) * width);
      grad_v = scratch.take<Real>(int64_t(kRoom) * value_width);
    });
    std::fill_n(grad_k, int64_t(kRoom) * width, Real(0));
    std::fill_n(grad_v, int64_t(kRoom) * value_width, Real(0));
    RowSource key_source{keys, {}, 0, head, begin + length_of(s)}, value_source = key_source;
    value_source.tensor = values;
    for (int first = 0; first < count; first += kKeyTile) {
      int some = std::min(kKeyTile, count - first);
      gather(key_source, 1, begin + first_key + first, some, padded(some), channels, width, key_rows + first * width,
             width);
      gather(value_source, 1, begin + first_key + first, some, padded(some), value_channels, value_width,
             value_rows + first * value_width, value_width);
    }
    for (const Target& target : targets[s]) {
      int64_t rows = segments.queries[target.query].tokens * group, first_row = 0;
      if (target.border != Run::kNone)  // rows that see nothing of this task's keys come first
        first_row = std::max<int64_t>(0, first_key - target.border + 1) * group / kBlockRows * kBlockRows;
      for (; first_row < rows; first_row += kBlockRows) {
        load(block, target.query, first_row, head, target.turn);
        bool masks = target.border != Run::kNone && first_key + count > target.border + first_row / group;
        std::vector<Nonfinite> lost;
        if (masks) take_nonfinite(block, lost);
        pairs_of(block.q, width, kBlockRows, width, block.q_pairs);
        pairs_of(block.grad, value_width, kBlockRows, value_width, block.grad_pairs);
        for (int first = 0; first < count; first += kKeyTile) {
          int some = std::min(kKeyTile, count - first);
          bool masked = set_border(block, first_row, 0, target.border, first_key + first, some);
          if (masked && *std::max_element(block.border, block.border + kBlockRows) == 0) break;
          weigh(tile, key_rows + first * width, value_rows + first * value_width, some, block, masked);
          add(tile.scores, left, block.grad_pairs, value_width, padded(some), grad_v + int64_t(first) * value_width);
          add(tile.grads, left, block.q_pairs, width, padded(some), grad_k + int64_t(first) * width);
          for (auto [row, channel, value] : lost)
            for (int key = 0; key < (masked ? block.border[row] : some); key++)
              grad_v[int64_t(first + key) * value_width + channel] += tile.scores[key * kBlockRows + row] * value;
        }
      }
    }
    for (int n = 0; n < count; n++) {
      Real *row_k = grad_k + int64_t(n) * width, *row_v = grad_v + int64_t(n) * value_width;
      in_order(row_k, width), in_order(row_v, value_width);
      for (int c = 0; c < channels; c++) row_k[c] *= Real(p.scale);
      convert(row_k, p.grad_k.at<Query>(begin + first_key + n, head), channels);
      convert(row_v, p.grad_v.at<Query>(begin + first_key + n, head), value_channels);
    }
  }

  // Entries of dO that are not finite leave their product, and are added to the keys which their row sees.
  struct Nonfinite {
    int row, column;
    Real value;
  };
  void take_nonfinite(Block& block, std::vector<Nonfinite>& lost) const {
    clear_nonfinite(block.q, int64_t(kBlockRows) * width);
    for (int i = 0; i < kBlockRows * value_width; i++)
      if (!is_finite(block.grad[i])) {
        lost.push_back({i / value_width, Rows::out_column(i % value_width), Real(to_float(block.grad[i]))});
        block.grad[i] = Element{};
      }
  }

  // sum[key, c] += of_rows[key, :] · right[:, c]
  void add(const Real* of_rows, Element* left, const Unit* right, int right_width, int count, Real* sum) const {
    const Unit* units;
    if constexpr (kPack == 1) {
      units = of_rows;
    } else {
      convert(of_rows, left, int64_t(count) * kBlockRows);
      units = reinterpret_cast<const Unit*>(left);
    }
    matmul<true, true>(units, kBlockRows / kPack, right, right_width, sum, right_width, count, right_width,
                       kBlockRows / kPack);
  }

  const GraphAttentionBackwardParams& p;
  Tensor keys, values;
  int64_t tokens;
  int kv_heads, group, channels, value_channels, width, value_width;
  Segments<Real> segments;
  std::vector<std::vector<Target>> targets;  // of each key segment
  const Real *delta = nullptr, *exact = nullptr;
};

}  // namespace

void graph_attention_backward(const GraphAttentionBackwardParams& params) {
  for_each_dtype(params.q.dtype, [&]<class Query>(Query) { Backward<Query>(params).run(); });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
