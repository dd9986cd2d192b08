// SPDX-License-Identifier: Apache-2.0
// Rows as int8 with a scale each; columns that hold outliers are left out.
#include "cpu/int8_quantize.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "int8_linear/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

template <class T>
void quantize(const Int8QuantizeParams& p) {
  int64_t rows = p.x.size[0], columns = p.x.size[1];
  auto* outliers = p.outliers.at<uint8_t>();
  std::fill(outliers, outliers + columns, uint8_t(0));
  auto round = [&](int64_t m, float absmax) {
    float scale = absmax / 127;
    *p.scale.at<float>(m) = scale;
    int8_t* q = p.q.at<int8_t>(m);
    Rounding(scale, false, 127).row(p.x.at<const T>(m), columns, q);
    for (int64_t k = 0; p.threshold > 0 && k < columns; k++) q[k] = outliers[k] ? 0 : q[k];
  };
  if (p.threshold > 0) {
    auto* highest = p.scale.at<float>();
    parallel_for(rows, columns, [&](int64_t m) {
      highest[m] = absmax_below(p.x.at<const T>(m), columns, float(p.threshold), outliers);
    });
    parallel_for(rows, columns, [&](int64_t m) { round(m, highest[m]); });
  } else {
    parallel_for(rows, 2 * columns, [&](int64_t m) { round(m, absmax(p.x.at<const T>(m), columns)); });
  }
}

}  // namespace

void int8_quantize(const Int8QuantizeParams& params) {
  switch (params.x.dtype) {
    case DType::float16: return quantize<Half>(params);
    case DType::bfloat16: return quantize<BFloat16>(params);
    default: return quantize<float>(params);
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
