// SPDX-License-Identifier: Apache-2.0
// After verification: the accepted path's keys and values go to the slots right behind the prefix, from a side buffer
// (commit) or from elsewhere in the cache (compact). Slots, pages and nodes that do not exist are skipped.
#include <math.h>

#include <type_traits>

#include "cuda/dtypes.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"
#include "tree_attention/kernels.h"

namespace torch_kernels {
namespace {

constexpr int kThreads = 128;

// The element at column 0 of head 0 of a slot, as an offset from the cache's start; -1 if there is no such slot.
DEVICE int64_t slot_offset(const Tensor& cache, const Tensor& block_table, int64_t batch, int64_t slot) {
  int64_t page_size = cache.size[1], page = batch;
  if (slot < 0 || page_size == 0) return -1;
  if (block_table) {
    if (slot / page_size >= block_table.size[1]) return -1;
    page = block_table.index(batch, slot / page_size);
    if (page < 0 || page >= cache.size[0]) return -1;
    slot %= page_size;
  } else if (slot >= page_size) {
    return -1;
  }
  return page * cache.stride[0] + slot * cache.stride[1];
}

// To nearest, ties to even, saturating.
template <class Cache, class T>
DEVICE Cache to_cache(T x, float scale) {
  if constexpr (std::is_same_v<Cache, T>) {
    return x;
  } else {
    float y = to_float(x) / scale, limit = std::is_same_v<Cache, int8_t> ? 127.f : 448.f;
    if (!isnan(y)) y = fminf(fmaxf(y, -limit), limit);
    if constexpr (std::is_same_v<Cache, int8_t>)
      return isnan(y) ? int8_t(0) : int8_t(rintf(y));
    else
      return Cache(y);
  }
}

template <class Cache, class T>
DEVICE void commit_row(const Tensor& cache, const Tensor& tree, const Tensor& scale, int64_t batch, int64_t node,
                       int64_t offset) {
  int size = int(cache.size[3]), count = int(cache.size[2]) * size;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    int head = i / size, column = i % size;
    float s = scale ? *scale.at<const float>(scale.size[0] == 1 ? 0 : head) : 1.f;
    *(cache.at<Cache>() + offset + head * cache.stride[2] + column) =
        to_cache<Cache>(*tree.at<const T>(batch, node, head, column), s);
  }
}

// One block per place on the path.
template <class T, class Cache>
__global__ void __launch_bounds__(kThreads) tree_commit_kernel(TreeCommitParams p) {
  int64_t places = p.path.size[1], batch = blockIdx.x / places, place = blockIdx.x % places;
  if (place > p.num_accepted.index(batch) || p.path.index(batch, 0) < 0) return;
  int64_t node = p.path.index(batch, place), slot = p.prefix_lens.index(batch) + place;
  if (node < 0 || node >= p.k_tree.size[1]) return;
  int64_t to_k = slot_offset(p.k_cache, p.block_table, batch, slot),
          to_v = slot_offset(p.v_cache, p.block_table, batch, slot);
  if (to_k >= 0) commit_row<Cache, T>(p.k_cache, p.k_tree, p.k_scale, batch, node, to_k);
  if (to_v >= 0) commit_row<Cache, T>(p.v_cache, p.v_tree, p.v_scale, batch, node, to_v);
}

// Each thread owns one column of one head, of K or of V, and moves it place by place. A path ascends and path[j] >= j,
// so a place is only ever read before it is written, as long as each group of places is read before it is written.
template <class Element>
__global__ void __launch_bounds__(kThreads) tree_compact_kernel(TreeCompactParams p) {
  constexpr int kGroup = 8;
  int heads = int(p.k_cache.size[2]), k_columns = heads * int(p.k_cache.size[3]),
      v_columns = heads * int(p.v_cache.size[3]);
  int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x, batch = item / (k_columns + v_columns);
  if (batch >= p.path.size[0] || p.path.index(batch, 0) < 0) return;
  int column = int(item % (k_columns + v_columns));
  bool is_v = column >= k_columns;
  if (is_v) column -= k_columns;
  const Tensor& cache = is_v ? p.v_cache : p.k_cache;
  int size = int(cache.size[3]);
  Element* base = cache.at<Element>() + column / size * cache.stride[2] + column % size;

  int64_t prefix = p.prefix_lens.index(batch), last = p.num_accepted.index(batch);
  int places = int(last < p.path.size[1] ? last + 1 : p.path.size[1]);
  for (int first = 0; first < places; first += kGroup) {
    Element moved[kGroup];
    int64_t to[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      int64_t node = first + i < places ? p.path.index(batch, first + i) : -1, from = -1;
      to[i] = -1;
      if (node >= 0) from = slot_offset(cache, p.block_table, batch, prefix + node);
      if (from >= 0) to[i] = slot_offset(cache, p.block_table, batch, prefix + first + i);
      if (to[i] >= 0) moved[i] = base[from];
    }
#pragma unroll
    for (int i = 0; i < kGroup; i++)
      if (to[i] >= 0) base[to[i]] = moved[i];
  }
}

template <class T>
void commit(const TreeCommitParams& p, void* stream) {
  dim3 blocks(unsigned(p.path.elements()));
  if (p.k_cache.dtype == DType::int8)
    launch(tree_commit_kernel<T, int8_t>, blocks, dim3(kThreads), 0, stream, p);
  else if (p.k_cache.dtype == DType::float8_e4m3)
    launch(tree_commit_kernel<T, __nv_fp8_e4m3>, blocks, dim3(kThreads), 0, stream, p);
  else
    launch(tree_commit_kernel<T, T>, blocks, dim3(kThreads), 0, stream, p);
}

}  // namespace

namespace cuda {

void tree_commit_kv(const TreeCommitParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  for_each_dtype(p.k_tree.dtype, [&]<class T>(T) { commit<T>(p, context.stream); });
}

void tree_compact_kv(const TreeCompactParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  if (p.path.size[1] == 0) return;
  int64_t columns = p.path.size[0] * p.k_cache.size[2] * (p.k_cache.size[3] + p.v_cache.size[3]);
  auto start = [&](auto kernel) {
    launch(kernel, dim3(unsigned((columns + kThreads - 1) / kThreads)), dim3(kThreads), 0, context.stream, p);
  };
  bool wide = p.k_cache.dtype == DType::float32,
       narrow = p.k_cache.dtype == DType::int8 || p.k_cache.dtype == DType::float8_e4m3;
  if (wide)
    start(tree_compact_kernel<uint32_t>);
  else if (narrow)
    start(tree_compact_kernel<uint8_t>);
  else
    start(tree_compact_kernel<uint16_t>);
}

}  // namespace cuda
}  // namespace torch_kernels
