// SPDX-License-Identifier: Apache-2.0
// Which drafted tokens the target model accepts. Decisions are made in double precision.
#include <algorithm>
#include <cmath>

#include "core/tree.h"
#include "cpu/dtypes.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "tree_attention/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

// The last node of the longest path of accepted nodes, the lowest index if several; -1 without a root.
template <class Matches>
int deepest_accepted(const Tree& tree, const Matches& matches) {
  if (!tree.has_root()) return -1;
  std::vector<char> accepted(tree.nodes(), false);
  accepted[0] = true;
  int last = 0;
  for (int t = 1; t < tree.nodes(); t++) {
    accepted[t] = tree.parent[t] >= 0 && accepted[tree.parent[t]] && matches(t, tree.parent[t]);
    if (accepted[t] && tree.depth[t] > tree.depth[last]) last = t;
  }
  return last;
}

void set_token(const Tensor& tokens, int64_t b, int64_t i, int64_t token) {
  if (tokens.dtype == DType::int64) {
    *tokens.at<int64_t>(b, i) = token;
  } else {
    *tokens.at<int32_t>(b, i) = int32_t(token);
  }
}

void write_result(const TreeVerifyOutputs& to, const Tensor& draft_tokens, const Tree& tree, int64_t b, int last,
                  int64_t next_token) {
  for (int t = 0; t < tree.nodes(); t++) {
    *to.path.at<int32_t>(b, t) = -1;
    set_token(to.tokens, b, t, -1);
  }
  int accepted = last < 0 ? 0 : tree.depth[last];
  *to.num_accepted.at<int32_t>(b) = accepted;
  if (last < 0) return;
  set_token(to.tokens, b, accepted, next_token);
  for (int node = last, place = accepted; place >= 0; node = tree.parent[node], place--) {
    *to.path.at<int32_t>(b, place) = node;
    if (place > 0) set_token(to.tokens, b, place - 1, draft_tokens.index(b, node));
  }
}

using Distribution = std::vector<double>;

double total(const Distribution& p) {
  double sum = 0;
  for (double x : p) sum += x;
  return sum;
}

void normalise(Distribution& p) {
  double sum = total(p);
  if (sum > 0)
    for (double& x : p) x /= sum;
}

// Row (b, t) of probabilities, negative and NaN ones as zero, normalised.
void read_distribution(const Tensor& probs, int64_t b, int64_t t, Distribution& p) {
  p.resize(probs.size[2]);
  for (size_t v = 0; v < p.size(); v++) {
    double x = number_at(probs, b, t, v);
    p[v] = x > 0 ? x : 0;
  }
  normalise(p);
}

// The smallest token with p(0) + .. + p(token) > u · sum; else the last one with mass; else -1.
int64_t inverse_cdf(const Distribution& p, double u) {
  double threshold = u * total(p), sum = 0;
  int64_t last = -1;
  for (size_t v = 0; v < p.size(); v++) {
    sum += p[v];
    if (p[v] > 0) last = int64_t(v);
    if (p[v] > 0 && sum > threshold) return last;
  }
  return last;
}

}  // namespace

void tree_verify_greedy(const TreeVerifyGreedyParams& p) {
  parallel_for(p.parents.size[0], p.parents.size[1], [&](int64_t b) {
    Tree tree(p.parents, b);
    int last = deepest_accepted(tree, [&](int node, int parent) {
      int64_t token = p.draft_tokens.index(b, node);
      return token >= 0 && token == p.target_tokens.index(b, parent);
    });
    write_result(p.outputs, p.draft_tokens, tree, b, last, last < 0 ? -1 : p.target_tokens.index(b, last));
  });
}

void tree_verify_typical(const TreeVerifyTypicalParams& p) {
  int64_t nodes = p.parents.size[1], vocabulary = p.target_logits.size[2];
  auto softmax = [&](int64_t b, int node, Distribution& probs) {
    probs.resize(vocabulary);
    double highest = -std::numeric_limits<double>::infinity();
    for (int64_t v = 0; v < vocabulary; v++) {
      probs[v] = number_at(p.target_logits, b, node, v) / p.temperature;
      highest = std::max(highest, probs[v]);
    }
    for (double& x : probs) x = std::exp(x - highest);
    double sum = total(probs);
    for (double& x : probs) x /= sum;
  };
  // Only nodes with children need their distribution: at most one pass over the vocabulary per such node.
  std::vector<Tree> trees;
  for (int64_t b = 0; b < p.parents.size[0]; b++) trees.emplace_back(p.parents, b);
  std::vector<char> matches(p.parents.size[0] * nodes, false);
  parallel_for(p.parents.size[0] * nodes, 16 * vocabulary, [&](int64_t i) {
    int64_t b = i / nodes;
    int parent = int(i % nodes);
    const Tree& tree = trees[b];
    auto is_child = [&](int t) { return tree.parent[t] == parent && tree.depth[t] > 0; };
    bool any = false;
    for (int t = parent + 1; t < nodes; t++) any |= is_child(t);
    if (!any) return;
    Distribution probs;
    softmax(b, parent, probs);
    double entropy = 0;
    for (double x : probs) entropy -= x * std::log(x + 1e-5);  // the constant is Medusa's
    double threshold = std::min(p.epsilon, p.delta * std::exp(-entropy));
    for (int t = parent + 1; t < nodes; t++) {
      int64_t token = p.draft_tokens.index(b, t);
      if (is_child(t) && token >= 0 && token < vocabulary) matches[b * nodes + t] = probs[token] > threshold;
    }
  });
  parallel_for(p.parents.size[0], 16 * vocabulary, [&](int64_t b) {
    int last = deepest_accepted(trees[b], [&](int node, int) { return bool(matches[b * nodes + node]); });
    int64_t next = -1;
    if (last >= 0 && p.uniforms) {
      Distribution probs;
      softmax(b, last, probs);
      for (double& x : probs) x = x > 0 ? x : 0;
      next = inverse_cdf(probs, number_at(p.uniforms, b, nodes));
    } else if (last >= 0 && vocabulary > 0) {
      next = 0;
      double highest = -std::numeric_limits<double>::infinity();
      for (int64_t v = 0; v < vocabulary; v++) {
        double x = number_at(p.target_logits, b, last, v);
        if (x > highest) highest = x, next = v;
      }
    }
    write_result(p.outputs, p.draft_tokens, trees[b], b, last, next);
  });
}

void tree_verify_sampling(const TreeVerifySamplingParams& p) {
  int64_t vocabulary = p.target_probs.size[2];
  parallel_for(p.parents.size[0], p.parents.size[1] * vocabulary, [&](int64_t b) {
    Tree tree(p.parents, b);
    int last = tree.has_root() ? 0 : -1;
    Distribution r, q, remainder;
    auto arrive = [&](int node) {
      read_distribution(p.target_probs, b, node, r);
      if (p.draft_probs) read_distribution(p.draft_probs, b, node, q);
    };
    if (last >= 0) arrive(last);
    for (int c = 1; c < tree.nodes() && last >= 0; c++) {
      int64_t x = p.draft_tokens.index(b, c);
      if (tree.depth[c] <= 0 || tree.parent[c] != last || x < 0 || x >= vocabulary) continue;
      double u = number_at(p.uniforms, b, c);
      if ((p.draft_probs ? u * q[x] : u) < r[x]) {
        arrive(last = c);
        continue;
      }
      remainder = r;
      if (p.draft_probs) {
        for (int64_t v = 0; v < vocabulary; v++) remainder[v] = std::max(r[v] - q[v], 0.0);
      } else {
        remainder[x] = 0;
      }
      if (total(remainder) > 0) {
        r = remainder;
        normalise(r);
      }
      if (p.draft_probs && !p.replacement) {
        q[x] = 0;
        normalise(q);
      }
    }
    write_result(p.outputs, p.draft_tokens, tree, b, last,
                 last < 0 ? -1 : inverse_cdf(r, number_at(p.uniforms, b, tree.nodes())));
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
