// SPDX-License-Identifier: Apache-2.0
// The arguments of the Graph-KV attention kernels. Tq query tokens in Nq segments, Tk key tokens in Nk segments, E
// edges, P pages, Hq query heads, Hk key/value heads. The Python side has checked shapes, dtypes and devices; values
// inside index tensors are still garbage until proven otherwise.
#pragma once
#include "core/tensor.h"

namespace torch_kernels {

// Who sees whom: query segment a sees every key of segments edge_sources[edge_offsets[a] .. edge_offsets[a + 1]), and
// causally, bottom-right aligned, those of own_segment[a].
struct SegmentGraph {
  Tensor q_offsets;     // [Nq + 1]
  Tensor kv_offsets;    // [Nk + 1]; of pages only the differences matter
  Tensor edge_offsets;  // [Nq + 1]
  Tensor edge_sources;  // [E]
  Tensor own_segment;   // [Nq]; -1: none

  TORCH_KERNELS_HOST_DEVICE int64_t query_segments() const { return own_segment.size[0]; }
  TORCH_KERNELS_HOST_DEVICE int64_t key_segments() const { return kv_offsets.size[0] - 1; }
};

// Keys are stored rotated by their place in their segment. Token t of query segment a stands at q_start[a] + t, the
// first key of edge e at edge_start[e], that of the own segment at own_start[a]; queries are rotated by the difference.
struct Rotation {
  Tensor inv_freq;    // [D / 2], float32 or float64; absent: nothing is rotated, nor is what follows there
  Tensor q_start;     // [Nq]
  Tensor edge_start;  // [E]
  Tensor own_start;   // [Nq]; may be absent: q_start[a] + Lq - Lk
  bool interleaved;   // pairs are channels (2i, 2i + 1), else (i, i + D / 2)
};

struct GraphAttentionParams {
  Tensor out;  // [Tq, Hq, Dv], q's dtype
  Tensor lse;  // [Hq, Tq], float32, natural logarithm
  Tensor q;    // [Tq, Hq, D]
  Tensor k;    // [Tk, Hk, D], or pages [P, page, Hk, D]
  Tensor v;    // [Tk, Hk, Dv], or pages [P, page, Hk, Dv]
  SegmentGraph graph;
  Tensor block_table;  // [Nk, pages]; absent: keys and values are packed
  Rotation rotation;
  double scale;  // multiplies q·k
};

struct GraphAttentionBackwardParams {
  Tensor grad_q;    // [Tq, Hq, D]
  Tensor grad_k;    // [Tk, Hk, D]
  Tensor grad_v;    // [Tk, Hk, Dv]
  Tensor grad_out;  // [Tq, Hq, Dv]
  Tensor q, k, v;   // packed
  Tensor out, lse;  // what the forward pass gave
  SegmentGraph graph;
  Rotation rotation;
  double scale;
};

struct RopeShiftParams {
  Tensor out;       // [Tk, Hk, D]
  Tensor k;         // [Tk, Hk, D]
  Tensor offsets;   // [N + 1]
  Tensor delta;     // [N]: positions to move the keys of a segment by
  Tensor inv_freq;  // [D / 2], float32 or float64
  bool interleaved;
};

}  // namespace torch_kernels
