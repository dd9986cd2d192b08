// SPDX-License-Identifier: Apache-2.0
// Greedy and typical acceptance: which edges of the tree the target agrees with, then the longest accepted path.
#include "tree_attention/kernels.h"
#include "tree_attention/verify.cuh"

namespace torch_kernels {
namespace {

__global__ void __launch_bounds__(kVerifyThreads) verify_greedy_kernel(TreeVerifyGreedyParams p) {
  int64_t batch = blockIdx.x;
  auto match = [&](int node, int parent) {
    int64_t token = p.draft_tokens.index(batch, node);
    return token >= 0 && token == p.target_tokens.index(batch, parent);
  };
  int last = deepest_node(p.parents, batch, match);
  emit(p.outputs, p.draft_tokens, p.parents, batch, last, last < 0 ? -1 : p.target_tokens.index(batch, last));
}

DEVICE double highest_logit(const Tensor& logits, int64_t batch, int64_t node) {
  double highest = -INFINITY;
  for (int64_t x = threadIdx.x; x < logits.size[2]; x += kVerifyThreads)
    highest = fmax(highest, load_real(logits, batch, node, x));
  return block_max(highest);
}

// The softmax of a node's logits over the temperature: p(x) = exp((logit - highest) / temperature) / total.
// Exponentials in float32, their sum in float64. Any NaN or +inf makes total NaN.
struct Softmax {
  const TreeVerifyTypicalParams& p;
  int64_t batch, node, vocabulary;
  double inverse_temperature, highest, total;

  DEVICE Softmax(const TreeVerifyTypicalParams& params, int64_t the_batch, int64_t the_node)
      : p(params), batch(the_batch), node(the_node), vocabulary(params.target_logits.size[2]) {
    inverse_temperature = 1 / double(p.temperature);
    highest = highest_logit(p.target_logits, batch, node);
    total = 0;
    for (int64_t x = threadIdx.x; x < vocabulary; x += kVerifyThreads) total += weight(x);
    total = block_sum(total);
  }
  DEVICE double exponent(int64_t token) const {
    return (load_real(p.target_logits, batch, node, token) - highest) * inverse_temperature;
  }
  DEVICE float weight(int64_t token) const { return expf(float(exponent(token))); }
};

// One block per node: for each of its children, whether p(token) > min(epsilon, delta exp(-H)), H = -sum p ln(p +
// 1e-5). The answers lie in `path` until the second kernel overwrites it.
__global__ void __launch_bounds__(kVerifyThreads) verify_typical_edges_kernel(TreeVerifyTypicalParams p) {
  int nodes = int(p.parents.size[1]), node = int(blockIdx.x % nodes);
  int64_t batch = blockIdx.x / nodes;
  bool is_parent = false;
  for (int i = node + 1 + threadIdx.x; i < nodes; i += kVerifyThreads) is_parent |= p.parents.index(batch, i) == node;
  if (!__syncthreads_or(is_parent)) return;

  Softmax softmax(p, batch, node);
  double entropy = 0, inverse_total = 1 / softmax.total;
  for (int64_t x = threadIdx.x; x < softmax.vocabulary; x += kVerifyThreads) {
    float q = float(softmax.weight(x) * inverse_total);
    entropy -= double(q * logf(q + 1e-5f));
  }
  entropy = block_sum(entropy);
  double threshold = fmin(double(p.epsilon), double(p.delta) * exp(-entropy));
  for (int i = node + 1 + threadIdx.x; i < nodes; i += kVerifyThreads) {
    if (p.parents.index(batch, i) != node) continue;
    int64_t token = p.draft_tokens.index(batch, i);
    bool known = token >= 0 && token < softmax.vocabulary;
    set_index(p.outputs.path, batch, i, known && exp(softmax.exponent(token)) / softmax.total > threshold);
  }
}

__global__ void __launch_bounds__(kVerifyThreads) verify_typical_kernel(TreeVerifyTypicalParams p) {
  int64_t batch = blockIdx.x, vocabulary = p.target_logits.size[2], next = -1;
  int last = deepest_node(p.parents, batch, [&](int node, int) { return p.outputs.path.index(batch, node) == 1; });
  if (last >= 0 && p.uniforms) {
    Softmax softmax(p, batch, last);
    double uniform = load_real(p.uniforms, batch, p.parents.size[1]);
    if (softmax.total > 0)
      next = inverse_cdf(vocabulary, uniform, [&](int64_t x) { return double(softmax.weight(x)); });
  } else if (last >= 0) {
    double highest = highest_logit(p.target_logits, batch, last);
    int64_t first = vocabulary;  // of those equal to the highest; NaN counts as -inf
    for (int64_t x = threadIdx.x; x < vocabulary && first == vocabulary; x += kVerifyThreads) {
      double logit = load_real(p.target_logits, batch, last, x);
      if (logit == highest || (isnan(logit) && highest == -INFINITY)) first = x;
    }
    next = -block_max(-first);
  }
  __syncthreads();
  emit(p.outputs, p.draft_tokens, p.parents, batch, last, next);
}

}  // namespace

namespace cuda {

void tree_verify_greedy(const TreeVerifyGreedyParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  launch(verify_greedy_kernel, dim3(unsigned(p.parents.size[0])), dim3(kVerifyThreads), kVerifyShared, context.stream,
         p);
}

void tree_verify_typical(const TreeVerifyTypicalParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  launch(verify_typical_edges_kernel, dim3(unsigned(p.parents.elements())), dim3(kVerifyThreads), kVerifyShared,
         context.stream, p);
  launch(verify_typical_kernel, dim3(unsigned(p.parents.size[0])), dim3(kVerifyThreads), kVerifyShared, context.stream,
         p);
}

}  // namespace cuda
}  // namespace torch_kernels
