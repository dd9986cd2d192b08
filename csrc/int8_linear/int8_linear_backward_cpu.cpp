// SPDX-License-Identifier: Apache-2.0
// The gradient of x: grad · (weight * weight_scale). The weight becomes floats in small tiles that stay in cache.
#include "cpu/floats.h"
#include "cpu/isa.h"
#include "cpu/matmul.h"
#include "cpu/parallel.h"
#include "int8_linear/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

constexpr int kColumns = 128, kFeatures = 64;  // of a weight tile
constexpr int64_t kRows = 256;                 // rows that share it

template <class T>
void backward(const Int8LinearBackwardParams& p) {
  static thread_local Scratch::Block gradients;
  int64_t rows = p.grad.size[0], features = p.grad.size[1], columns = p.out.size[1];
  float* scaled = reinterpret_cast<float*>(gradients.reserve(rows * features * int64_t(sizeof(float))));
  parallel_for(rows, features, [&](int64_t m) {
    for (int64_t n = 0; n < features; n++)
      scaled[m * features + n] = to_float(*p.grad.at<const T>(m, n)) * *p.weight_scale.at<const float>(n);
  });
  int64_t strips = (columns + kColumns - 1) / kColumns, parts = (rows + kRows - 1) / kRows;
  parallel_for(strips * parts, kRows * kColumns * features, [&](int64_t task) {
    static thread_local Scratch::Block block;
    float *tile, *sums;
    Scratch::plan(block, [&](Scratch& scratch) {
      tile = scratch.take<float>(kFeatures * kColumns);
      sums = scratch.take<float>(kRows * kColumns);
    });
    int64_t first = task % strips * kColumns, row = task / strips * kRows;
    int width = int(std::min<int64_t>(kColumns, columns - first)), count = int(std::min(kRows, rows - row));
    std::fill(sums, sums + count * kColumns, 0.f);
    std::fill(tile, tile + kFeatures * kColumns, 0.f);
    for (int64_t n = 0; n < features; n += kFeatures) {
      int depth = int(std::min<int64_t>(kFeatures, features - n));
      for (int i = 0; i < depth; i++) {
        const int8_t* from = p.weight.at<const int8_t>(n + i, first);
        for (int c = 0; c < width; c++) tile[i * kColumns + c] = from[c];
      }
      matmul<true, true>(scaled + row * features + n, features, tile, kColumns, sums, kColumns, count, kColumns, depth);
    }
    constexpr int lanes = kLanes<float>;
    for (int m = 0; m < count; m++)
      for (int c = 0; c < width; c += lanes)
        store_float(p.out.at<T>(row + m, first + c), load(sums + m * kColumns + c), width - c);
  });
}

}  // namespace

void int8_linear_backward(const Int8LinearBackwardParams& params) {
  switch (params.grad.dtype) {
    case DType::float16: return backward<Half>(params);
    case DType::bfloat16: return backward<BFloat16>(params);
    default: return backward<float>(params);
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
