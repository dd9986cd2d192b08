// SPDX-License-Identifier: Apache-2.0
// Lossless verification by sampling, one block per sequence: a walk from the root that tries the children of the
// current node in ascending order. r is the target's distribution after the node, q the draft's. A child with token x
// and uniform u is accepted if u < r(x), or with draft_probs if u q(x) < r(x). A rejection removes x from r, or q from
// r; r is renormalised. When no child is left, the next token is drawn from r by the inverse CDF.
//
// r and q are never stored: each element is recomputed from the inputs by replaying the node's rejections, a few at
// most.
#include "tree_attention/kernels.h"
#include "tree_attention/verify.cuh"

namespace torch_kernels {
namespace {

DEVICE double positive(double x) { return x > 0 ? x : 0; }
DEVICE double reciprocal(double sum) { return sum > 0 ? 1 / sum : 1; }

struct Remainder {
  double r, q;
};

class Residual {
 public:
  const TreeVerifySamplingParams& p;
  const int64_t batch, vocabulary;
  int node = 0, rejections = 0;

  DEVICE Residual(const TreeVerifySamplingParams& params, int64_t the_batch)
      : p(params),
        batch(the_batch),
        vocabulary(params.target_probs.size[2]),
        tokens_(shared_array<int64_t>(kVerifyShared, params.parents.size[1])),
        r_scales_(shared_array<double>(kVerifyShared + params.parents.size[1] * 8, params.parents.size[1])),
        q_scales_(shared_array<double>(kVerifyShared + params.parents.size[1] * 16, params.parents.size[1])) {
    start(0);
  }

  // The distributions after a node, before any child was tried.
  DEVICE void start(int at) {
    node = at, rejections = 0;
    double r = 0, q = 0;
    for (int64_t x = threadIdx.x; x < vocabulary; x += kVerifyThreads) {
      r += positive(load_real(p.target_probs, batch, node, x));
      if (p.draft_probs) q += positive(load_real(p.draft_probs, batch, node, x));
    }
    r_scale_ = reciprocal(block_sum(r));
    q_scale_ = p.draft_probs ? reciprocal(block_sum(q)) : 0;
  }

  DEVICE Remainder at(int64_t token) const {
    Remainder now{positive(load_real(p.target_probs, batch, node, token)) * r_scale_, 0};
    if (p.draft_probs) now.q = positive(load_real(p.draft_probs, batch, node, token)) * q_scale_;
    for (int i = 0; i < rejections; i++) {
      Remainder next = without(now, token, tokens_[i]);
      double r_scale = r_scales_[i], q_scale = q_scales_[i];
      if (r_scale > 0) now.r = next.r * r_scale;
      now.q = next.q * q_scale;
    }
    return now;
  }

  DEVICE void reject(int64_t token) {
    Remainder sum{0, 0};
    for (int64_t x = threadIdx.x; x < vocabulary; x += kVerifyThreads) {
      Remainder left = without(at(x), x, token);
      sum.r += left.r, sum.q += left.q;
    }
    sum.r = block_sum(sum.r);
    if (p.draft_probs && !p.replacement) sum.q = block_sum(sum.q);
    __syncthreads();
    if (threadIdx.x == 0) {
      tokens_[rejections] = token;
      r_scales_[rejections] = sum.r > 0 ? 1 / sum.r : 0;  // a rejection that would leave no mass leaves r as it is
      q_scales_[rejections] = p.replacement ? 1 : reciprocal(sum.q);
    }
    rejections++;
    __syncthreads();
  }

 private:
  // What the rejection of a token leaves of the element of `token`, not renormalised.
  DEVICE Remainder without(Remainder now, int64_t token, int64_t rejected) const {
    if (!p.draft_probs) return {token == rejected ? 0 : now.r, 0};
    return {positive(now.r - now.q), !p.replacement && token == rejected ? 0 : now.q};
  }

  double r_scale_, q_scale_;
  const Shared<int64_t> tokens_;
  const Shared<double> r_scales_, q_scales_;
};

__global__ void __launch_bounds__(kVerifyThreads) verify_sampling_kernel(TreeVerifySamplingParams p) {
  int64_t batch = blockIdx.x;
  int nodes = int(p.parents.size[1]);
  if (nodes == 0 || checked_parent(p.parents, batch, 0) != -1) {
    emit(p.outputs, p.draft_tokens, p.parents, batch, -1, -1);
    return;
  }
  Residual residual(p, batch);
  for (int child = 1; child < nodes; child++) {
    if (p.parents.index(batch, child) != residual.node) continue;
    int64_t token = p.draft_tokens.index(batch, child);
    if (token < 0 || token >= residual.vocabulary) continue;
    double u = load_real(p.uniforms, batch, child);
    Remainder now = residual.at(token);
    if ((p.draft_probs ? u * now.q : u) < now.r)
      residual.start(child);
    else
      residual.reject(token);
  }
  double u = load_real(p.uniforms, batch, nodes);
  int64_t next = inverse_cdf(residual.vocabulary, u, [&](int64_t x) { return residual.at(x).r; });
  emit(p.outputs, p.draft_tokens, p.parents, batch, residual.node, next);
}

}  // namespace

void cuda::tree_verify_sampling(const TreeVerifySamplingParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  size_t shared = kVerifyShared + size_t(p.parents.size[1]) * 24;
  launch(verify_sampling_kernel, dim3(unsigned(p.parents.size[0])), dim3(kVerifyThreads), shared, context.stream, p);
}

}  // namespace torch_kernels
