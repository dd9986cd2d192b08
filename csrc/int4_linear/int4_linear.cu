// SPDX-License-Identifier: Apache-2.0
// int4 linear: plans the call, prepares x where needed, runs the product and adds the splits of K.
#include "int4_linear/kernels.h"
#include "int4_linear/prepare.cuh"
#include "int4_linear/stages.cuh"

namespace torch_kernels {

template <class X>
void launch_int4_linear(const Int4LinearWork& work, void* stream);

namespace {

// The splits of each element in ascending order. `blocks` of them make a row.
__global__ void __launch_bounds__(256)
    int4_linear_add_splits_kernel(const __grid_constant__ Int4LinearWork work, unsigned blocks) {
  int row = int(blockIdx.x / blocks), feature = int(blockIdx.x % blocks * 256 + threadIdx.x);
  if (feature >= work.features) return;
  ptx::wait_for_previous_kernel();
  const float* partial = work.partials + int64_t(row) * work.features + feature;
  int64_t stride = int64_t(work.rows) * work.features;
  float value = 0;
#pragma unroll 4
  for (int split = 0; split < work.plan.splits; split++) value += partial[split * stride];
  finish_element(work.out, work.bias, row, feature, value);
}

}  // namespace

namespace cuda {

void int4_linear(const Int4LinearParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  if (p.out.elements() == 0) return;
  Tensor weight = aligned_weight(p.weight, context);
  int64_t x_size = size_of(p.x.dtype), columns = p.perm ? p.perm.size[0] : p.x.size[1];
  bool int8 = p.mode == Int4Mode::a8;
  bool direct =
      !int8 && !p.perm && copy_width(reinterpret_cast<uint64_t>(p.x.data) | uint64_t(p.x.stride[0] * x_size)) == 16;
  Int4LinearPlan plan = plan_int4_linear(p.x.size[0], p.out_features, columns, p.group_size, int8 ? 1 : x_size,
                                         size_of(p.scales.dtype), size_of(p.zeros.dtype), !direct);

  auto allocate = [&](int64_t bytes) { return bytes ? context.allocate(bytes) : nullptr; };
  int64_t slab = plan.slab_rows, scale_stride = (slab + 3) / 4 * 4;
  int64_t width = weight.size[1] * kInt4TileColumns, row_bytes = width * (int8 ? 1 : x_size);
  void* copy = direct ? nullptr : allocate(slab * row_bytes);
  auto* x_scales = static_cast<float*>(allocate(int8 ? plan.x_scale_rows * scale_stride * 4 : 0));
  auto* partials = static_cast<float*>(allocate(plan.splits > 1 ? plan.splits * slab * p.out_features * 4 : 0));

  Int4LinearWork work{.plan = plan,
                      .x_prepared = !direct,
                      .x = static_cast<const char*>(copy),
                      .x_row_bytes = direct ? p.x.stride[0] * x_size : row_bytes,
                      .columns = int(direct ? columns : width),
                      .rows = 0,
                      .features = int(p.out_features),
                      .x_scales = x_scales,
                      .x_scale_stride = scale_stride,
                      .weight = weight,
                      .scales = Int4Parameters(p.scales),
                      .zeros = p.zeros ? Int4Parameters(p.zeros) : Int4Parameters(),
                      .bias = p.bias,
                      .out = p.out,
                      .partials = partials};
  for (int64_t row0 = 0; row0 < p.x.size[0]; row0 += slab) {
    work.rows = int(std::min(slab, p.x.size[0] - row0));
    work.out.data = static_cast<char*>(p.out.data) + row0 * p.out.stride[0] * size_of(p.out.dtype);
    if (direct)
      work.x = static_cast<const char*>(p.x.data) + row0 * work.x_row_bytes;
    else if (int8)
      quantise_columns(static_cast<int8_t*>(copy), x_scales, p.x, p.perm, row0, work.rows, width, plan.sum_shift,
                       scale_stride, context.stream);
    else
      gather_columns(copy, p.x, p.perm, row0, work.rows, width, context.stream);
    if (int8)
      launch_int4_linear<int8_t>(work, context.stream);
    else if (p.x.dtype == DType::float16)
      launch_int4_linear<__half>(work, context.stream);
    else if (p.x.dtype == DType::bfloat16)
      launch_int4_linear<__nv_bfloat16>(work, context.stream);
    else
      launch_int4_linear<float>(work, context.stream);
    unsigned blocks = unsigned((p.out_features + 255) / 256);
    if (plan.splits > 1)
      launch_early(int4_linear_add_splits_kernel, int64_t(work.rows) * blocks, dim3(256), 0, context.stream, work,
                   blocks);
  }
}

}  // namespace cuda
}  // namespace torch_kernels
