// SPDX-License-Identifier: Apache-2.0
// int8_linear: rows of x become int8 in a workspace, then one kernel multiplies, scales, adds the columns of x that
// were too large for int8 as the floats they are, adds the bias and rounds once. Nothing about the outliers reaches the
// host.
#include "cuda/floats.cuh"
#include "int8_linear/gemm.cuh"
#include "int8_linear/kernels.h"
#include "int8_linear/quantize.cuh"
#include "int8_linear/rows.cuh"

namespace torch_kernels {
namespace {

struct LinearWork {
  Int8Product product;
  Int8LinearParams call;
  const float* row_scale;   // [M]
  const uint8_t* outliers;  // [padded K], or null
  int outlier_bytes;        // padded K, a multiple of 128; 0 without outliers
};

// Outlier columns are found in sweeps of 16 flags per thread, then added a few at a time.
constexpr int kSweep = 16 * kInt8Threads, kOutliers = 32;

template <int kRowTile>
struct LinearTile : Int8Tile<kRowTile> {
  using Base = Int8Tile<kRowTile>;
  using Base::kRowSixteens, Base::kSixteens, Base::thread, Base::lane, Base::row0, Base::feature0;

  // Behind the stages: the factors of the tile's rows and features, fetched while the first stages are on their way.
  static constexpr int kShared = Base::kShared + (kRowTile + 2 * kInt8FeatureTile) * 4;

  const LinearWork& work;
  const Shared<float> row_scales = shared_array<float>(Base::kShared, kRowTile);
  const Shared<float> weight_scales = shared_array<float>(Base::kShared + kRowTile * 4, kInt8FeatureTile);
  const Shared<float> biases = shared_array<float>(kShared - kInt8FeatureTile * 4, kInt8FeatureTile);
  float values[kRowSixteens][kSixteens][2][4];

  DEVICE explicit LinearTile(const LinearWork& w) : Base(w.product), work(w) {}

  DEVICE void fetch_factors() const {
    const Tensor &scale = work.call.weight_scale, &bias = work.call.bias;
    int64_t feature = feature0 + thread, row = row0 + thread;
    if (thread < kInt8FeatureTile) {
      bool exists = feature < work.product.weight.rows;
      weight_scales[thread] = exists ? *scale.template at<const float>(feature) : 0.f;
      biases[thread] = exists && bias ? load_float(bias, feature) : 0.f;
    }
    if (thread < kRowTile) row_scales[thread] = row < work.product.x.rows ? work.row_scale[row] : 0.f;
  }

  DEVICE uint4 outlier_flags(int sweep) const {
    int at = sweep + thread * 16;
    if (at >= work.outlier_bytes) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(work.outliers + at);
  }

  DEVICE bool any_outliers() const {
    if (!work.outliers) return false;
    unsigned any = 0;
#pragma unroll 4
    for (int sweep = 0; sweep < work.outlier_bytes; sweep += kSweep) {
      uint4 flags = outlier_flags(sweep);
      any |= flags.x | flags.y | flags.z | flags.w;
    }
    return __syncthreads_or(any != 0);
  }

  DEVICE void scale_sums() {
    this->each_quadruple([&](int m, int n, int half, int row, int feature) {
      float row_scale = row_scales[row];
      float4 scale = weight_scales.template load<float4>(feature);
      float of_features[4] = {scale.x, scale.y, scale.z, scale.w};
#pragma unroll
      for (int i = 0; i < 4; i++)
        values[m][n][half][i] =
            __fmul_rn(__fmul_rn(__int2float_rn(this->sums[m][n][half][i]), row_scale), of_features[i]);
    });
  }

  // The columns with outliers of a sweep, ascending, in `list`; how many. `counts` has a word per warp.
  DEVICE int list_outliers(int sweep, Shared<int> list, Shared<int> counts) const {
    uint4 flags = outlier_flags(sweep);
    unsigned words[4] = {flags.x, flags.y, flags.z, flags.w};
    int count = __popc(flags.x) + __popc(flags.y) + __popc(flags.z) + __popc(flags.w), before = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      int other = __shfl_up_sync(0xffffffffu, before, step);
      if (lane >= step) before += other;
    }
    if (lane == 31) counts[thread / 32] = before;
    __syncthreads();
    before -= count;
    int total = 0;
    for (int w = 0; w < kInt8Threads / 32; w++) {
      int of_warp = counts[w];
      before += w < thread / 32 ? of_warp : 0;
      total += of_warp;
    }
    for (int i = 0; i < 16; i++)
      if (words[i / 4] >> (i % 4 * 8) & 1) list[before++] = sweep + thread * 16 + i;
    __syncthreads();
    return total;
  }

  // values += x[:, j] * (weight[:, j] * weight_scale) for every outlier column j, in ascending order.
  DEVICE void add_outliers() {
    const Shared<int> list = shared_array<int>(0, kSweep), counts = shared_array<int>(kSweep * 4, kInt8Threads / 32);
    constexpr int kX = kSweep * 4 + kInt8Threads / 8, kWeight = kX + kOutliers * kRowTile * 4;
    static_assert(kWeight + kOutliers * kInt8FeatureTile * 4 <= Base::kShared);
    const Shared<float> x = shared_array<float>(kX, kOutliers * kRowTile);
    const Shared<float> weight = shared_array<float>(kWeight, kOutliers * kInt8FeatureTile);
    const Int8LinearParams& call = work.call;

    for (int sweep = 0; sweep < work.outlier_bytes; sweep += kSweep) {
      int total = list_outliers(sweep, list, counts);
      for (int first = 0; first < total; first += kOutliers) {
        int count = min(total - first, kOutliers);
        for (int i = thread; i < count * kRowTile; i += kInt8Threads) {
          int64_t row = row0 + i % kRowTile;
          int column = list[first + i / kRowTile];
          x[i] = row < call.x.size[0] ? load_float(call.x, row, column) : 0.f;
        }
        for (int i = thread; i < count * kInt8FeatureTile; i += kInt8Threads) {
          int64_t feature = feature0 + i % kInt8FeatureTile;
          int column = list[first + i / kInt8FeatureTile];
          float stored =
              feature < call.weight.size[0] ? float(*call.weight.template at<const int8_t>(feature, column)) : 0.f;
          weight[i] = __fmul_rn(stored, weight_scales[i % kInt8FeatureTile]);
        }
        __syncthreads();
#pragma unroll 1
        for (int c = 0; c < count; c++)
          this->each_quadruple([&](int m, int n, int half, int row, int feature) {
            float of_row = x[c * kRowTile + row];
            float4 of_features = weight.template load<float4>(c * kInt8FeatureTile + feature);
            float (&quad)[4] = values[m][n][half];
            quad[0] = fmaf(of_row, of_features.x, quad[0]), quad[1] = fmaf(of_row, of_features.y, quad[1]);
            quad[2] = fmaf(of_row, of_features.z, quad[2]), quad[3] = fmaf(of_row, of_features.w, quad[3]);
          });
        __syncthreads();
      }
    }
  }

  template <class T>
  DEVICE void write() const {
    int64_t rows = work.product.x.rows, features = work.product.weight.rows;
    T* out = work.call.out.template at<T>();
    bool aligned = reinterpret_cast<uint64_t>(out) % (4 * sizeof(T)) == 0 && features % 4 == 0;
    this->each_quadruple([&](int m, int n, int half, int row, int feature) {
      if (row0 + row >= rows) return;
      float4 bias = biases.template load<float4>(feature);
      const float (&value)[4] = values[m][n][half];
      T rounded[4] = {from_float<T>(value[0] + bias.x), from_float<T>(value[1] + bias.y),
                      from_float<T>(value[2] + bias.z), from_float<T>(value[3] + bias.w)};
      store_four(out + (row0 + row) * features + feature0 + feature, rounded, features - feature0 - feature, aligned);
    });
  }

  DEVICE void run() {
    bool outliers = false;
    Base::run([&] {
      fetch_factors();
      outliers = any_outliers();
    });
    if (!this->join_splits()) return;
    scale_sums();
    if (outliers) add_outliers();
    if (work.call.out.dtype == DType::float16)
      write<__half>();
    else if (work.call.out.dtype == DType::bfloat16)
      write<__nv_bfloat16>();
    else
      write<float>();
  }
};

template <int kRowTile>
__global__ void __launch_bounds__(kInt8Threads, int8_blocks(kRowTile)) int8_linear_kernel(LinearWork work) {
  LinearTile<kRowTile>(work).run();
}

}  // namespace

namespace cuda {

void int8_linear(const Int8LinearParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  int64_t rows = p.x.size[0], columns = p.x.size[1];
  if (p.out.elements() == 0) return;
  Int8Plan plan = plan_int8(rows, p.weight.size[0], columns);
  int64_t padded = int64_t(plan.depth_tiles) * kInt8Depth;

  int64_t flag_bytes = p.threshold > 0 ? padded : 0, scale_bytes = (rows + 3) / 4 * 16;
  int64_t counter_bytes = plan.counter_count() * 4;
  char* workspace = static_cast<char*>(
      context.allocate(plan.partial_bytes() + rows * padded + flag_bytes + scale_bytes + counter_bytes));
  int4* partials = reinterpret_cast<int4*>(workspace);
  int8_t* q = reinterpret_cast<int8_t*>(workspace + plan.partial_bytes());
  uint8_t* outliers = reinterpret_cast<uint8_t*>(q + rows * padded);
  float* row_scale = reinterpret_cast<float*>(outliers + flag_bytes);
  int* counters = reinterpret_cast<int*>(reinterpret_cast<char*>(row_scale) + scale_bytes);

  quantize_rows({.x = p.x,
                 .q = q,
                 .q_stride = padded,
                 .q_columns = int(padded),
                 .scale = row_scale,
                 .x_scale = p.x_scale ? p.x_scale.at<const float>() : nullptr,
                 .outliers = flag_bytes ? outliers : nullptr,
                 .threshold = float(p.threshold),
                 .counters = counters,
                 .counter_count = int(plan.counter_count())},
                context);
  Int8Product product{{q, padded, rows, 16}, Int8Rows::of(p.weight), int(columns), plan, partials, counters};
  LinearWork work{product, p, row_scale, flag_bytes ? outliers : nullptr, int(flag_bytes)};
  with_row_tile(plan, [&]<int kRowTile>() {
    launch_early(int8_linear_kernel<kRowTile>, dim3(unsigned(plan.blocks())), dim3(kInt8Threads),
                 LinearTile<kRowTile>::kShared, context.stream, work);
  });
}

}  // namespace cuda
}  // namespace torch_kernels
