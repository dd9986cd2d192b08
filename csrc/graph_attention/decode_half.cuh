// SPDX-License-Identifier: Apache-2.0
// Graph-KV attention of single tokens on tensor cores, for 16-bit queries.
#pragma once
#include "cuda/attention.cuh"
#include "graph_attention/decode.cuh"

namespace torch_kernels {

// All rows see the same keys. Q is turned anew where a source asks for another turn than the one before.
template <class T, int kHeadTile, int kRowTile>
struct GraphTiles : KeyTiles<GraphDecodeWork, kHeadTile, kRowTile> {
  using Base = KeyTiles<GraphDecodeWork, kHeadTile, kRowTile>;
  using Base::kTables, Base::kThreads, Base::kWords, Base::present, Base::shared, Base::thread, Base::work;

  bool is_turned = false;
  int64_t turned_by = 0;

  DEVICE explicit GraphTiles(GraphDecodeWork& w) : Base(w) {}

  template <class KV>
  DEVICE void load_q() {
    if (!work.turns()) return Base::template load_q<KV>();
    // Zeros where no queries come.
    for (int i = thread; i < kRowTile * kHeadTile / 8; i += kThreads)
      *reinterpret_cast<uint4*>(shared + i * 16) = make_uint4(0, 0, 0, 0);
  }
  DEVICE void prepare_rows(int tile) {
    if (!work.turns()) return;
    int64_t turn = work.turn_of(tile);
    if (is_turned && turn == turned_by) return;
    is_turned = true, turned_by = turn;
    work.template turn_queries<T>(turn, [&](int row, int channel, float first, float second) {
      char* to = shared + swizzled<kHeadTile * 2>(row, channel / 8) + channel % 8 * 2;
      *reinterpret_cast<unsigned*>(to) = pack<T>(first, second);
    });
  }
  DEVICE void visible_bits(int tile, int, unsigned (&bits)[kWords]) {
#pragma unroll
    for (int word = 0; word < kWords; word++) bits[word] = present[tile % kTables * kWords + word];
  }
  DEVICE bool needs_mask(int tile) { return !this->is_full(tile); }
  DEVICE bool is_padding(int) const { return false; }
};

template <class T, int kHeadTile, int kRowTile>
__global__ void __launch_bounds__(128, 2)
    graph_decode_kernel(GraphAttentionParams p, GraphDecodePlan plan, GraphDecodeTables tables, Partials partials) {
  ptx::wait_for_previous_kernel();
  int64_t items = int64_t(tables.splits_before[plan.tokens]) * p.k.size[2] * plan.row_tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    GraphDecodeWork work(p, plan, tables, item);
    AttentionBlock<T, GraphTiles<T, kHeadTile, kRowTile>, kHeadTile, kRowTile> block(work);
    block.template attend<T>(0, work.tiles, p.scale);
    block.write(partials);
    __syncthreads();
  }
  ptx::let_next_kernel_start();
}

template <class T>
void launch_graph_decode(const GraphAttentionParams& p, const GraphDecodePlan& plan, const GraphDecodeTables& tables,
                         Partials partials, unsigned blocks, void* stream) {
  auto start = [&]<int kHeadTile, int kRowTile>() {
    launch_early(graph_decode_kernel<T, kHeadTile, kRowTile>, dim3(blocks), dim3(128),
                 size_t(AttentionShape<kHeadTile, kRowTile>::kShared), stream, p, plan, tables, partials);
  };
  if (plan.head_tile == 64) return start.template operator()<64, 16>();
  if (plan.head_tile == 128) return start.template operator()<128, 16>();
  start.template operator()<256, 32>();
}

}  // namespace torch_kernels
