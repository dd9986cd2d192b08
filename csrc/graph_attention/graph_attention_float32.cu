// SPDX-License-Identifier: Apache-2.0
// Graph-KV attention of single tokens, float32.
#include "cuda/attention_float32.cuh"
#include "graph_attention/decode.cuh"

namespace torch_kernels {
namespace {

struct GraphRow {
  GraphDecodeWork& work;
  bool is_turned = false;
  int64_t turned_by = 0;

  DEVICE void start(int) {}
  DEVICE void turn_queries(int tile, const Shared<float>& q, int stride) {
    if (!work.turns()) return;
    int64_t turn = work.turn_of(tile);
    if (is_turned && turn == turned_by) return;
    is_turned = true, turned_by = turn;
    work.turn_queries<float>(turn, [&](int row, int channel, float first, float second) {
      q[row * stride + channel] = first, q[row * stride + channel + 1] = second;
    });
  }
  DEVICE unsigned visible(int, unsigned present) const { return present; }
  DEVICE bool is_padding() const { return false; }
};

__global__ void __launch_bounds__(Float32Attention::kThreads, 3)
    graph_decode_float32_kernel(GraphAttentionParams p, GraphDecodePlan plan, GraphDecodeTables tables,
                                Partials partials) {
  ptx::wait_for_previous_kernel();
  int64_t items = int64_t(tables.splits_before[plan.tokens]) * p.k.size[2] * plan.row_tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    GraphDecodeWork work(p, plan, tables, item);
    GraphRow row{work};
    Float32Attention::run(work, row, Float32Attention::stride_of(plan.head_tile), p.scale, partials);
    __syncthreads();
  }
  ptx::let_next_kernel_start();
}

}  // namespace

void launch_graph_decode_float32(const GraphAttentionParams& p, const GraphDecodePlan& plan,
                                 const GraphDecodeTables& tables, Partials partials, unsigned blocks, void* stream) {
  size_t shared = size_t(Float32Attention::shared_bytes(Float32Attention::stride_of(plan.head_tile)));
  launch_early(graph_decode_float32_kernel, dim3(blocks), dim3(Float32Attention::kThreads), shared, stream, p, plan,
               tables, partials);
}

}  // namespace torch_kernels
