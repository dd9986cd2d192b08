// SPDX-License-Identifier: Apache-2.0
// The accepted path's keys and values: from a tree's own buffer into the cache (commit), or to the front within the
// cache (compact).
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/dtypes.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "tree_attention/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

// The address of a slot's row for one head, or null for a slot that does not exist.
template <class T>
T* slot_row(const Tensor& cache, const Tensor& block_table, int64_t b, int64_t slot, int64_t head) {
  if (slot < 0) return nullptr;
  if (!block_table) return slot < cache.size[1] ? cache.at<T>(b, slot, head) : nullptr;
  if (slot / cache.size[1] >= block_table.size[1]) return nullptr;
  int64_t page = block_table.index(b, slot / cache.size[1]);
  return page >= 0 && page < cache.size[0] ? cache.at<T>(page, slot % cache.size[1], head) : nullptr;
}

// The nodes of sequence b's accepted path, root included; none where the path is empty.
std::vector<int64_t> accepted_nodes(const Tensor& path, const Tensor& num_accepted, int64_t b) {
  std::vector<int64_t> nodes;
  for (int64_t j = 0; j < path.size[1] && j <= num_accepted.index(b); j++) {
    int64_t node = path.index(b, j);
    if (node < 0) break;
    nodes.push_back(node);
  }
  return nodes;
}

void commit(const Tensor& cache, const Tensor& tree, const Tensor& scale, const TreeCommitParams& p, int64_t b,
            int64_t head, const std::vector<int64_t>& nodes) {
  for_each_cache_dtype(cache.dtype, [&]<class Stored>(Stored) {
    for_each_cache_dtype(tree.dtype, [&]<class Source>(Source) {
      using Real = std::conditional_t<std::is_same_v<Source, double>, double, float>;
      for (size_t j = 0; j < nodes.size(); j++) {
        Stored* to = slot_row<Stored>(cache, p.block_table, b, p.prefix_lens.index(b) + int64_t(j), head);
        if (!to || nodes[j] >= tree.size[1]) continue;
        const Source* from = tree.at<const Source>(b, nodes[j], head);
        for (int64_t c = 0; c < tree.size[3]; c++) {
          Stored& stored = to[c * cache.stride[3]];
          Source value = from[c * tree.stride[3]];
          if (scale) {
            stored = from_float<Stored>(Real(to_float(value)) / *scale.at<const float>(scale.size[0] == 1 ? 0 : head));
          } else if constexpr (std::is_same_v<Stored, Source>) {
            stored = value;
          } else {
            stored = from_float<Stored>(to_float(value));
          }
        }
      }
    });
  });
}

// Everything is read before anything is written: the moves may overlap.
void compact(const Tensor& cache, const TreeCompactParams& p, int64_t b, int64_t head,
             const std::vector<int64_t>& nodes) {
  for_each_cache_dtype(cache.dtype, [&]<class Stored>(Stored) {
    int64_t prefix = p.prefix_lens.index(b), width = cache.size[3];
    std::vector<Stored> rows(nodes.size() * width);
    std::vector<char> found(nodes.size());
    for (size_t j = 0; j < nodes.size(); j++) {
      const Stored* from = slot_row<Stored>(cache, p.block_table, b, prefix + nodes[j], head);
      found[j] = from != nullptr;
      for (int64_t c = 0; from && c < width; c++) rows[j * width + c] = from[c * cache.stride[3]];
    }
    for (size_t j = 0; j < nodes.size(); j++) {
      Stored* to = slot_row<Stored>(cache, p.block_table, b, prefix + int64_t(j), head);
      for (int64_t c = 0; to && found[j] && c < width; c++) to[c * cache.stride[3]] = rows[j * width + c];
    }
  });
}

}  // namespace

void tree_commit_kv(const TreeCommitParams& p) {
  int64_t heads = p.k_cache.size[2];
  parallel_for(p.path.size[0], heads * p.k_cache.size[3] * p.path.size[1], [&](int64_t b) {
    std::vector<int64_t> nodes = accepted_nodes(p.path, p.num_accepted, b);
    for (int64_t head = 0; head < heads; head++) {
      commit(p.k_cache, p.k_tree, p.k_scale, p, b, head, nodes);
      commit(p.v_cache, p.v_tree, p.v_scale, p, b, head, nodes);
    }
  });
}

void tree_compact_kv(const TreeCompactParams& p) {
  int64_t heads = p.k_cache.size[2];
  parallel_for(p.path.size[0], heads * p.k_cache.size[3] * p.path.size[1], [&](int64_t b) {
    std::vector<int64_t> nodes = accepted_nodes(p.path, p.num_accepted, b);
    for (int64_t head = 0; head < heads; head++) {
      compact(p.k_cache, p, b, head, nodes);
      compact(p.v_cache, p, b, head, nodes);
    }
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
