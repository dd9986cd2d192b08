// SPDX-License-Identifier: Apache-2.0
// Graph-KV attention of single tokens: notes sources and splits, picks the kernel for the dtype, then joins the splits
// of those tokens that have several.
#include "core/error.h"
#include "cuda/dtypes.cuh"
#include "graph_attention/decode.cuh"
#include "graph_attention/kernels.h"

namespace torch_kernels {

template <class T>
void launch_graph_decode(const GraphAttentionParams& p, const GraphDecodePlan& plan, const GraphDecodeTables& tables,
                         Partials partials, unsigned blocks, void* stream);
void launch_graph_decode_float32(const GraphAttentionParams& p, const GraphDecodePlan& plan,
                                 const GraphDecodeTables& tables, Partials partials, unsigned blocks, void* stream);

namespace {

DEVICE int warp_prefix_sum(int x) {
  int lane = threadIdx.x % 32;
  for (int step = 1; step < 32; step *= 2) {
    int below = __shfl_up_sync(0xffffffffu, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

// A warp per query segment: its sources, then how its tokens' keys are split.
DEVICE void note_segment(const GraphAttentionParams& p, const GraphDecodePlan& plan, const GraphDecodeTables& tables,
                         int64_t segment) {
  const SegmentGraph& graph = p.graph;
  const Rotation& rotation = p.rotation;
  int lane = threadIdx.x % 32;
  OffsetRange queries(graph.q_offsets, segment, p.q.size[1]);
  int64_t begin = queries.begin - plan.first_token, end = begin + queries.length;
  begin = begin < 0 ? 0 : begin, end = end < plan.tokens ? end : plan.tokens;
  if (begin >= end) return;
  OffsetRange edges(graph.edge_offsets, segment, graph.edge_sources.size[0]);
  int64_t start = rotation.inv_freq ? rotation.q_start.index(segment) : 0;
  auto note = [&](int64_t i, int tiles_before, int2 keys, int64_t from, int64_t turn) {
    tables.sources[edges.begin + segment + i] = {tiles_before, keys.x, keys.y, int(from)};
    if (rotation.inv_freq) tables.turns[edges.begin + segment + i] = turn;
  };

  constexpr int kMostTiles = (1 << 30) - 1;
  int tiles = 0;
  for (int64_t first = 0; first < edges.length; first += 32) {
    int64_t edge = edges.begin + first + lane;
    bool present = first + lane < edges.length;
    int64_t from = present ? graph.edge_sources.index(edge) : -1;
    bool exists = from >= 0 && from < graph.key_segments();
    int2 keys = exists ? key_range(p, plan, from) : make_int2(0, 0);
    int count = (keys.y + plan.key_tile - 1) / plan.key_tile, until = warp_prefix_sum(count);
    if (present)
      note(first + lane, min(tiles + until - count, kMostTiles), keys, exists ? from : 0,
           rotation.inv_freq ? start - rotation.edge_start.index(edge) : 0);
    tiles = min(tiles + __shfl_sync(0xffffffffu, until, 31), kMostTiles);
  }
  int64_t own = graph.own_segment.index(segment);
  bool exists = own >= 0 && own < graph.key_segments();
  int2 keys = exists ? key_range(p, plan, own) : make_int2(0, 0);
  int64_t ahead = keys.y - queries.length;
  if (lane == 0)
    note(edges.length, tiles, keys, exists ? own : 0,
         rotation.own_start ? start - rotation.own_start.index(segment) : ahead);

  for (int64_t token = begin + lane; token < end; token += 32) {
    int64_t place = plan.first_token + token - queries.begin, seen = OffsetRange::clamped(ahead + place + 1, 0, keys.y);
    tables.segments[token] = int(segment);
    tables.splits_before[token] = plan.splits_of(tiles + int((seen + plan.key_tile - 1) / plan.key_tile));
  }
}

// One block.
__global__ void __launch_bounds__(1024)
    graph_decode_plan_kernel(GraphAttentionParams p, GraphDecodePlan plan, GraphDecodeTables tables) {
  ptx::let_next_kernel_start();
  int thread = threadIdx.x, threads = blockDim.x, warp = thread / 32, warps = threads / 32;
  for (int token = thread; token < plan.tokens; token += threads)
    tables.segments[token] = -1, tables.splits_before[token] = 1;
  __syncthreads();
  for (int64_t segment = warp; segment < p.graph.query_segments(); segment += warps)
    note_segment(p, plan, tables, segment);
  __syncthreads();

  const Shared<int> sums = shared_array<int>(0, 32);
  int before = 0;
  for (int first = 0; first < plan.tokens; first += threads) {
    int token = first + thread, count = token < plan.tokens ? tables.splits_before[token] : 0;
    int until = warp_prefix_sum(count), total = before;
    if (thread % 32 == 31) sums[warp] = until;
    __syncthreads();
    for (int w = 0; w < warps; w++) {
      if (w < warp) before += sums[w];
      total += sums[w];
    }
    if (token < plan.tokens) tables.splits_before[token] = before + until - count;
    before = total;
    __syncthreads();
  }
  if (thread == 0) tables.splits_before[plan.tokens] = before;
}

// One warp per row of the output.
template <class T>
__global__ void __launch_bounds__(128, 8) graph_decode_combine_kernel(GraphAttentionParams p, GraphDecodePlan plan,
                                                                      GraphDecodeTables tables, Partials partials) {
  ptx::wait_for_previous_kernel();
  int64_t item = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32, heads = p.q.size[2];
  if (item >= plan.tokens * heads) return;
  int token = int(item / heads), head = int(item % heads), first = tables.splits_before[token];
  int splits = tables.splits_before[token + 1] - first;
  if (splits == 1) return;  // written already
  int64_t row = plan.first_token + token;
  partials.combine<T>(first * heads + head, heads, splits, -INFINITY, int(p.v.size[3]), p.lse.at<float>(head, row),
                      p.out.at<T>(row, head));
}

// [T, H, D] as [1, T, H, D]; pages stay.
Tensor with_outer(const Tensor& rows) {
  if (rows.rank == 4) return rows;
  Tensor pages = rows;
  pages.rank = 4, pages.size[0] = 1, pages.stride[0] = 0;
  for (int i = 0; i < 3; i++) pages.size[i + 1] = rows.size[i], pages.stride[i + 1] = rows.stride[i];
  return pages;
}

GraphDecodePlan make_plan(const GraphAttentionParams& p) {
  GraphDecodePlan plan;
  int64_t kv_heads = p.k.size[2], rows = p.q.size[2] / kv_heads, head = std::max(p.q.size[3], p.v.size[3]);
  plan.head_tile = head <= 64 ? 64 : head <= 128 ? 128 : 256;
  plan.row_tile = plan.head_tile == 256 && p.q.dtype != DType::float32 ? 32 : 16;
  plan.key_tile = p.q.dtype == DType::float32 || head > 128 ? 32 : 64;
  plan.row_tiles = int((rows + plan.row_tile - 1) / plan.row_tile);
  plan.divide(rows, kv_heads * plan.row_tiles);

  constexpr int64_t kMostKeys = (int64_t(1) << 31) - 1;
  require(p.block_table || p.k.size[1] <= kMostKeys, "graph_attention: k has more than 2^31 - 1 tokens");
  plan.key_tokens = p.block_table ? std::min(p.block_table.size[1] * p.k.size[1], kMostKeys) : p.k.size[1];
  // No token sees more tiles than there are in all segments together, so this changes no result.
  int64_t segments = p.graph.key_segments(), keys = p.block_table ? segments * plan.key_tokens : plan.key_tokens;
  int64_t tiles = keys / plan.key_tile + segments;
  plan.max_splits = plan.splits_of(int(std::min<int64_t>(tiles, 1 << 30)));
  return plan;
}

template <class T>
void decode(const GraphAttentionParams& p, const GraphDecodePlan& plan, const GraphDecodeTables& tables,
            Partials partials, void* stream) {
  unsigned threads = unsigned(32 * std::clamp<int64_t>(p.graph.query_segments(), 1, 32));
  launch(graph_decode_plan_kernel, dim3(1), dim3(threads), 32 * sizeof(int), stream, p, plan, tables);
  constexpr int64_t kMostBlocks = 1024;
  int64_t items = int64_t(plan.tokens) * plan.max_splits * p.k.size[2] * plan.row_tiles;
  unsigned blocks = unsigned(std::min(items, kMostBlocks));
  if constexpr (sizeof(T) == 4)
    launch_graph_decode_float32(p, plan, tables, partials, blocks, stream);
  else
    launch_graph_decode<T>(p, plan, tables, partials, blocks, stream);
  if (plan.max_splits == 1) return;
  launch_early(graph_decode_combine_kernel<T>, dim3(unsigned((plan.tokens * p.q.size[2] + 3) / 4)), dim3(128), 0,
               stream, p, plan, tables, partials);
}

}  // namespace

void cuda::graph_attention(const GraphAttentionParams& params, const Context& context) {
  DeviceGuard guard(context.device);
  if (params.out.elements() == 0 && params.lse.elements() == 0) return;
  GraphAttentionParams p = params;
  p.q = with_outer(p.q), p.k = with_outer(p.k), p.v = with_outer(p.v);
  GraphDecodePlan plan = make_plan(p);

  // Partial results of many tokens would need much memory: so many at a time.
  constexpr int64_t kPartialBytes = 256 << 20;
  int64_t tokens = p.q.size[1], token_rows = plan.max_splits == 1 ? 0 : plan.max_splits * p.q.size[2];
  int64_t token_bytes = token_rows * (p.v.size[3] + 2) * int64_t(sizeof(float));
  int64_t most = std::clamp<int64_t>(kPartialBytes / std::max<int64_t>(1, token_bytes), 1, 1 << 16);
  most = std::min(most, tokens);
  Partials partials(context, most * token_rows, p.v.size[3]);
  int64_t entries = p.graph.edge_sources.size[0] + p.graph.query_segments();
  int64_t bytes = entries * int64_t(sizeof(GraphSource) + sizeof(int64_t)) + (2 * most + 1) * int64_t(sizeof(int));
  GraphDecodeTables tables;
  tables.sources = static_cast<GraphSource*>(context.allocate(bytes));
  tables.turns = reinterpret_cast<int64_t*>(tables.sources + entries);
  tables.segments = reinterpret_cast<int*>(tables.turns + entries);
  tables.splits_before = tables.segments + most;
  for (plan.first_token = 0; plan.first_token < tokens; plan.first_token += plan.tokens) {
    plan.tokens = int(std::min(most, tokens - plan.first_token));
    for_each_dtype(p.q.dtype, [&]<class T>(T) { decode<T>(p, plan, tables, partials, context.stream); });
  }
}

}  // namespace torch_kernels
