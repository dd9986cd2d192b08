// SPDX-License-Identifier: Apache-2.0
// What the verification kernels share: block-wide reductions in a fixed order, the inverse CDF, the deepest accepted
// node, the outputs. One block of kVerifyThreads threads per sequence; every function here is called by all of its
// threads.
#pragma once
#include <math.h>

#include "tree_attention/tree.cuh"

namespace torch_kernels {

constexpr int kVerifyThreads = 512;

// Combines one value per thread; every thread gets the result. Lanes first, then warps in order, so the order never
// changes.
template <class T, class Combine>
DEVICE T block_reduce(T x, Combine combine) {
  const Shared<T> warps = shared_array<T>(0, kVerifyThreads / 32);
  for (int lane = 16; lane > 0; lane /= 2) x = combine(x, T(__shfl_xor_sync(0xffffffffu, x, lane)));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
  for (int i = 1; i < kVerifyThreads / 32; i++) x = combine(x, T(warps[i]));
  return x;
}
template <class T>
DEVICE T block_sum(T x) {
  return block_reduce(x, [](T a, T b) { return a + b; });
}
template <class T>
DEVICE T block_max(T x) {
  return block_reduce(x, [](T a, T b) { return a > b ? a : b; });
}
// Bytes of dynamic shared memory that the functions of this file use.
constexpr int kVerifyShared = 512;

// One number of a [B, T, V] or [B, T] tensor of any float dtype.
DEVICE double load_real(const Tensor& tensor, int64_t batch, int64_t node, int64_t token = 0) {
  if (tensor.dtype == DType::float32) return *tensor.at<const float>(batch, node, token);
  if (tensor.dtype == DType::float16) return __half2float(*tensor.at<const __half>(batch, node, token));
  if (tensor.dtype == DType::bfloat16) return __bfloat162float(*tensor.at<const __nv_bfloat16>(batch, node, token));
  return *tensor.at<const double>(batch, node, token);
}

// The smallest token x with mass(0) + .. + mass(x) > uniform * total and mass(x) > 0; if rounding leaves none, the
// largest with mass; -1 if there is no mass at all. Each thread sums one contiguous stretch of the vocabulary.
template <class Mass>
DEVICE int64_t inverse_cdf(int64_t vocabulary, double uniform, Mass mass) {
  const int thread = threadIdx.x, lane = thread % 32;
  int64_t stretch = (vocabulary + kVerifyThreads - 1) / kVerifyThreads, first = thread * stretch;
  int64_t last = first + stretch < vocabulary ? first + stretch : vocabulary;
  double own = 0;
  int64_t largest = -1;
  for (int64_t x = first; x < last; x++) {
    double m = mass(x);
    if (m > 0) own += m, largest = x;
  }
  double before = own;  // inclusive, then exclusive prefix sums
  for (int step = 1; step < 32; step *= 2) {
    double left = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += left;
  }
  const Shared<double> warps = shared_array<double>(0, kVerifyThreads / 32);
  __syncthreads();
  if (lane == 31) warps[thread / 32] = before;
  __syncthreads();
  double total = 0, warp_before = 0;
  for (int i = 0; i < kVerifyThreads / 32; i++) {
    if (i == thread / 32) warp_before = total;
    total += warps[i];
  }
  before += warp_before - own;

  double target = uniform * total;
  bool reaches = own > 0 && before + own > target;
  int chosen = -block_max(reaches ? -thread : -kVerifyThreads);
  if (chosen == kVerifyThreads) return block_max(largest);
  int64_t token = -1;
  if (thread == chosen) {
    token = largest;
    double sum = before;
    for (int64_t x = first; x < last; x++) {
      double m = mass(x);
      if (!(m > 0)) continue;
      sum += m;
      if (sum > target) {
        token = x;
        break;
      }
    }
  }
  return block_max(token);
}

// The last node of the longest path from node 0 along nodes that match (node, parent); the lowest index among equals;
// -1 without a root.
template <class Match>
DEVICE int deepest_node(const Tensor& parents, int64_t batch, Match match) {
  int nodes = int(parents.size[1]);
  int64_t best = -1;
  for (int i = threadIdx.x; i < nodes; i += kVerifyThreads) {
    int node = i, depth = 0;
    for (; node > 0; depth++) {
      int parent = checked_parent(parents, batch, node);
      node = parent >= 0 && match(node, parent) ? parent : -1;
    }
    int64_t key = int64_t(depth) << 32 | unsigned(nodes - i);
    if (node == 0 && checked_parent(parents, batch, 0) == -1 && key > best) best = key;
  }
  best = block_max(best);
  return best < 0 ? -1 : nodes - int(best & 0xffffffff);
}

DEVICE void set_index(const Tensor& tensor, int64_t i0, int64_t i1, int64_t value) {
  if (tensor.dtype == DType::int64)
    *tensor.at<int64_t>(i0, i1) = value;
  else
    *tensor.at<int32_t>(i0, i1) = int32_t(value);
}

DEVICE void emit(const TreeVerifyOutputs& outputs, const Tensor& draft_tokens, const Tensor& parents, int64_t batch,
                 int last, int64_t next_token) {
  for (int i = threadIdx.x; i < int(parents.size[1]); i += kVerifyThreads) {
    set_index(outputs.path, batch, i, -1);
    set_index(outputs.tokens, batch, i, -1);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int depth = last < 0 ? 0 : node_depth(parents, batch, last);
  *outputs.num_accepted.at<int32_t>(batch) = depth;
  if (last < 0) return;
  set_index(outputs.tokens, batch, depth, next_token);
  for (int node = last; node >= 0; node = checked_parent(parents, batch, node), depth--) {
    set_index(outputs.path, batch, depth, node);
    if (depth > 0) set_index(outputs.tokens, batch, depth - 1, draft_tokens.index(batch, node));
  }
}

}  // namespace torch_kernels
