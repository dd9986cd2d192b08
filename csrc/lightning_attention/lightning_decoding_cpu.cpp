// SPDX-License-Identifier: Apache-2.0
// Decoding: a step of every sequence, outputs over a draft tree, and the update by its accepted path. All of it reads a
// state once; a step and a commit write it once.
#include <vector>

#include "core/tree.h"
#include "lightning_attention/block_cpu.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

// The numbers of a row, zero-padded to whole vectors.
template <class Real, class Stored>
inline void load_row(const Stored* from, int64_t count, Real* to) {
  convert(from, to, count);
  std::fill(to + count, to + padded(count), Real(0));
}

template <class Real>
struct Rate {
  Real minus_one;  // e^-slope - 1
  bool forgets;

  Rate(const Tensor& slopes, int64_t h) {
    double slope = rate_of(slopes, h);
    minus_one = Real(std::expm1(-slope));
    forgets = slope == std::numeric_limits<double>::infinity();
  }
  // A row of the state after a token. The small change is added to the large state once.
  Vector<Real> advance(Vector<Real> state, Real k, Vector<Real> v) const {
    return forgets ? k * v : state + (state * minus_one + k * v);
  }
};

template <class Real>
inline Vector<Real> load_lanes(const Real* from, int64_t count) {
  if (count >= kLanes<Real>) return load(from);
  Vector<Real> v{};
  std::memcpy(&v, from, size_t(count) * sizeof(Real));
  return v;
}
template <class Real>
inline void store_lanes(Real* to, Vector<Real> v, int64_t count) {
  std::memcpy(to, &v, size_t(std::min<int64_t>(count, kLanes<Real>)) * sizeof(Real));
}

inline constexpr int kStrip = 8;  // vectors of a row of the state that are handled together

// Calls body(first column, vectors) over the columns of a state, with the number of vectors as a constant.
template <class Real, class Body>
inline void for_strips(int64_t columns, const Body& body) {
  constexpr int lanes = kLanes<Real>;
  int64_t c = 0;
  for (; c + kStrip * lanes <= columns; c += kStrip * lanes) body(c, std::integral_constant<int, kStrip>{});
  for (; c < columns; c += lanes) body(c, std::integral_constant<int, 1>{});
}

template <class Stored, class Real = CarefulUnit<Stored>>
void step(const LightningStepParams& p, int64_t n, int64_t h) {
  constexpr int lanes = kLanes<Real>;
  int64_t keys = p.k.size[2], values = p.v.size[2], group = p.q.size[1] / p.k.size[1];
  int64_t row = state_of_row(p.state, p.state_indices, n);
  if (row < 0) {
    for (int64_t g = h * group; g < (h + 1) * group; g++) std::fill_n(p.out.at<Stored>(n, g), values, Stored{});
    return;
  }
  Real q[256], k[256], v[256], out[256];
  load_row(p.k.at<const Stored>(n, h), keys, k);
  load_row(p.v.at<const Stored>(n, h), values, v);
  Rate<Real> rate(p.slopes, h);
  for (int64_t g = 0; g < group; g++) {
    load_row(p.q.at<const Stored>(n, h * group + g), keys, q);
    for (int64_t c = 0; c < keys; c++) q[c] *= Real(p.scale);
    auto strips = [&](bool first) {
      for_strips<Real>(values, [&](int64_t column, auto vectors) {
        constexpr int count = decltype(vectors)::value;
        Vector<Real> sum[count] = {}, value[count];
        for (int i = 0; i < count; i++) value[i] = load(v + column + i * lanes);
        for (int64_t c = 0; c < keys; c++) {
          Real* state = p.state.at<Real>(row, h, c, column);
#pragma GCC unroll 8
          for (int i = 0; i < count; i++) {
            int64_t present = values - column - i * lanes;
            Vector<Real> s = count > 1 ? load(state + i * lanes) : load_lanes(state, present);
            if (first) {
              s = rate.advance(s, k[c], value[i]);
              count > 1 ? store(state + i * lanes, s) : store_lanes(state, s, present);
            }
            sum[i] += q[c] * s;
          }
        }
        for (int i = 0; i < count; i++) store(out + column + i * lanes, sum[i]);
      });
    };
    g == 0 ? strips(true) : strips(false);
    store_row<Stored>(out, p.out.at<Stored>(n, h * group + g), int(values));
  }
}

template <class Stored, class Real = CarefulUnit<Stored>>
void commit(const LightningCommitParams& p, int64_t n, int64_t h) {
  constexpr int lanes = kLanes<Real>;
  int64_t row = state_of_row(p.state, p.state_indices, n), nodes = p.k.size[1];
  if (row < 0) return;
  int64_t keys = p.k.size[3], values = p.v.size[3], last = std::min(p.num_accepted.index(n), nodes - 1);
  static thread_local Scratch::Block memory;
  int64_t length = std::max<int64_t>(last + 1, 0);
  Real *k = nullptr, *v = nullptr;
  Scratch::plan(memory, [&](Scratch& scratch) {
    k = scratch.take<Real>(length * padded(keys));
    v = scratch.take<Real>(length * padded(values));
  });
  int64_t count = 0;
  for (int64_t j = 0; j <= last; j++, count++) {
    int64_t node = p.path.index(n, j);
    if (node < 0 || node >= nodes) break;
    load_row(p.k.at<const Stored>(n, node, h), keys, k + j * padded(keys));
    load_row(p.v.at<const Stored>(n, node, h), values, v + j * padded(values));
  }
  if (count == 0) return;
  Rate<Real> rate(p.slopes, h);
  for_strips<Real>(values, [&](int64_t column, auto vectors) {
    constexpr int width = decltype(vectors)::value;
    for (int64_t c = 0; c < keys; c++) {
      Real* state = p.state.at<Real>(row, h, c, column);
      for (int i = 0; i < width; i++) {
        int64_t present = values - column - i * lanes;
        Vector<Real> s = width > 1 ? load(state + i * lanes) : load_lanes(state, present);
        for (int64_t j = 0; j < count; j++)
          s = rate.advance(s, k[j * padded(keys) + c], load(v + j * padded(values) + column + i * lanes));
        width > 1 ? store(state + i * lanes, s) : store_lanes(state, s, present);
      }
    }
  });
}

template <class Real>
inline Real dot(const Real* a, const Real* b, int64_t count) {
  Vector<Real> sum{};
  for (int64_t c = 0; c < count; c += kLanes<Real>) sum += load(a + c) * load(b + c);
  Real total = 0;
  for (int i = 0; i < kLanes<Real>; i++) total += sum[i];
  return total;
}

// Rows of queries that share a pass over the state.
inline constexpr int64_t kQueryRows = 64;

template <class Stored, class Real = CarefulUnit<Stored>>
void verify(const LightningVerifyParams& p, const Tree& tree, int64_t n, int64_t h) {
  int64_t nodes = p.q.size[1], keys = p.k.size[3], values = p.v.size[3], group = p.q.size[2] / p.k.size[2];
  int64_t row = state_of_row(p.state, p.state_indices, n), stride = row_stride(values);
  double slope = rate_of(p.slopes, h);
  bool forgets = slope == std::numeric_limits<double>::infinity();
  static thread_local Scratch::Block memory;
  Real *state, *k, *v, *q, *out, *power;
  Scratch::plan(memory, [&](Scratch& scratch) {
    state = scratch.take<Real>(padded(keys) * stride);
    k = scratch.take<Real>(nodes * padded(keys));
    v = scratch.take<Real>(nodes * padded(values));
    q = scratch.take<Real>(kQueryRows * padded(keys));
    out = scratch.take<Real>(kQueryRows * stride);
    power = scratch.take<Real>(nodes + 1);
  });
  if (row >= 0) load_state(p.state, row, h, 0, values, keys, state);
  for (int64_t i = 0; i < nodes; i++) {
    load_row(p.k.at<const Stored>(n, i, h), keys, k + i * padded(keys));
    load_row(p.v.at<const Stored>(n, i, h), values, v + i * padded(values));
  }
  for (int64_t d = 0; d <= nodes; d++) power[d] = d == 0 ? Real(1) : Real(std::exp(-slope * double(d)));
  for (int64_t first = 0; first < nodes * group; first += kQueryRows) {
    int64_t rows = std::min(kQueryRows, nodes * group - first);
    auto node_of = [&](int64_t r) { return (first + r) / group; };
    auto head_of = [&](int64_t r) { return h * group + (first + r) % group; };
    for (int64_t r = 0; r < rows; r++)
      load_row(p.q.at<const Stored>(n, node_of(r), head_of(r)), keys, q + r * padded(keys));
    if (row >= 0 && !forgets)
      matmul<false, true>(q, padded(keys), state, stride, out, stride, int(rows), int(padded(values)), int(keys));
    for (int64_t r = 0; r < rows; r++) {
      int64_t i = node_of(r);
      Stored* to = p.out.at<Stored>(n, i, head_of(r));
      if (row < 0 || tree.depth[i] < 0) {
        std::fill_n(to, values, Stored{});
        continue;
      }
      Real* sum = out + r * stride;
      Real decay = power[tree.depth[i] + 1] * Real(p.scale);
      for (int64_t c = 0; c < padded(values); c += kLanes<Real>)
        store(sum + c, forgets ? Vector<Real>{} : load(sum + c) * decay);
      for (int64_t j = i; j >= 0 && !(forgets && j < i); j = tree.parent[j]) {
        Real weight = dot(q + r * padded(keys), k + j * padded(keys), padded(keys)) *
                      (power[tree.depth[i] - tree.depth[j]] * Real(p.scale));
        for (int64_t c = 0; c < padded(values); c += kLanes<Real>)
          store(sum + c, load(sum + c) + weight * load(v + j * padded(values) + c));
      }
      store_row<Stored>(sum, to, int(values));
    }
  }
}

}  // namespace

void lightning_step(const LightningStepParams& params) {
  int64_t heads = params.k.size[1], cost = 4 * params.k.size[2] * params.v.size[2];
  for_each_dtype(params.q.dtype, [&]<class Stored>(Stored) {
    for_each_item(params.q.size[0] * heads, cost, [&](int64_t i) { step<Stored>(params, i / heads, i % heads); });
  });
}

void lightning_commit(const LightningCommitParams& params) {
  int64_t heads = params.k.size[2], cost = 4 * params.k.size[3] * params.v.size[3];
  for_each_dtype(params.k.dtype, [&]<class Stored>(Stored) {
    for_each_item(params.k.size[0] * heads, cost, [&](int64_t i) { commit<Stored>(params, i / heads, i % heads); });
  });
}

void lightning_verify(const LightningVerifyParams& params) {
  int64_t heads = params.k.size[2], nodes = params.q.size[1];
  int64_t cost = 2 * nodes * params.k.size[3] * params.v.size[3];
  std::vector<Tree> trees;
  for (int64_t n = 0; n < params.q.size[0]; n++)
    trees.push_back(params.parents ? Tree(params.parents, n) : Tree::chain(int(nodes)));
  for_each_dtype(params.q.dtype, [&]<class Stored>(Stored) {
    for_each_item(params.q.size[0] * heads, cost,
                  [&](int64_t i) { verify<Stored>(params, trees[i / heads], i / heads, i % heads); });
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
