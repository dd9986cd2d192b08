// SPDX-License-Identifier: Apache-2.0
// int8_mm: the product alone.
#include "int8_linear/gemm.cuh"
#include "int8_linear/kernels.h"

namespace torch_kernels {
namespace {

template <int kRowTile>
__global__ void __launch_bounds__(kInt8Threads, int8_blocks(kRowTile)) int8_mm_kernel(Int8Product p, int* out) {
  Int8Tile<kRowTile> tile(p);
  tile.run([] {});
  if (!tile.join_splits()) return;
  int64_t features = p.weight.rows;
  bool aligned = (reinterpret_cast<uint64_t>(out) & 15) == 0 && features % 4 == 0;
  tile.each_quadruple([&](int m, int n, int half, int row, int feature) {
    int64_t row_at = tile.row0 + row, feature_at = tile.feature0 + feature;
    if (row_at < p.x.rows)
      store_four(out + row_at * features + feature_at, tile.sums[m][n][half], features - feature_at, aligned);
  });
}

__global__ void __launch_bounds__(256) clear_counters_kernel(int* counters, int count) {
  ptx::let_next_kernel_start();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) counters[i] = 0;
}

}  // namespace

namespace cuda {

void int8_mm(const Int8MmParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  if (p.out.elements() == 0) return;
  Int8Plan plan = plan_int8(p.a.size[0], p.b.size[0], p.a.size[1]);
  Int8Product product{Int8Rows::of(p.a), Int8Rows::of(p.b), int(p.a.size[1]), plan, nullptr, nullptr};
  if (plan.splits > 1) {
    char* workspace = static_cast<char*>(context.allocate(plan.partial_bytes() + plan.counter_count() * 4));
    product.partials = reinterpret_cast<int4*>(workspace);
    product.counters = reinterpret_cast<int*>(workspace + plan.partial_bytes());
    launch(clear_counters_kernel, dim3(unsigned(plan.counter_count() + 255) / 256), dim3(256), 0, context.stream,
           product.counters, int(plan.counter_count()));
  }
  // The product reads b before it waits: only our own kernel, which does not write b, may still be running then.
  with_row_tile(plan, [&]<int kRowTile>() {
    launch_kernel(plan.splits > 1, int8_mm_kernel<kRowTile>, dim3(unsigned(plan.blocks())), dim3(kInt8Threads),
                  Int8Tile<kRowTile>::kShared, context.stream, product, p.out.at<int>());
  });
}

}  // namespace cuda
}  // namespace torch_kernels
