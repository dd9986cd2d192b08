// SPDX-License-Identifier: Apache-2.0
// int8_mm and int8_linear: rows are quantised once, multiplied as integers, and finished strip by strip.
#include <vector>

#include "cpu/int8_quantize.h"
#include "cpu/isa.h"
#include "int8_linear/params.h"
#include "int8_linear/product.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

struct IntegerOutput {
  const Int8MmParams& p;

  auto strip(const Right&, int64_t first, int count, int64_t, int64_t) const {
    return [this, first, count](int64_t m, int i, Vector<int32_t> sums) {
      constexpr int lanes = kLanes<int32_t>;
      int32_t* to = p.out.at<int32_t>(m, first) + i * lanes;
      if (count == kStripRows) {
        store(to, sums);
      } else if (i * lanes < count) {
        std::memcpy(to, &sums, size_t(std::min(lanes, count - i * lanes)) * sizeof(int32_t));
      }
    };
  }
};

// Columns that hold outliers, and what x has there.
struct Outliers {
  std::vector<int32_t> columns;
  float* x = nullptr;  // [M][columns]
};

template <class T>
struct LinearOutput {
  const Int8LinearParams& p;
  const float* row_scale;
  const Outliers& outliers;

  // One thread's view of a strip.
  struct Strip {
    const LinearOutput& output;
    int64_t first, begin;
    int count;
    const float* outlier_sums;  // [rows][kStripRows]
    Vector<float> scale[kStripVectors], bias[kStripVectors];

    void operator()(int64_t m, int i, Vector<int32_t> sums) const {
      constexpr int lanes = kLanes<float>;
      T* to = output.p.out.template at<T>(m, first) + i * lanes;
      Vector<float> y = __builtin_convertvector(sums, Vector<float>) * output.row_scale[m];
      y = rounded(y * scale[i]);
      if (outlier_sums) y += load(outlier_sums + (m - begin) * kStripRows + i * lanes);
      y += bias[i];
      if (count == kStripRows) {
        store_float(to, y);
      } else if (i * lanes < count) {
        store_float(to, y, count - i * lanes);
      }
    }
  };

  Strip strip(const Right& right, int64_t first, int count, int64_t begin, int64_t end) const {
    constexpr int lanes = kLanes<float>;
    Strip strip{*this, first, begin, count, nullptr, {}, {}};
    float scale[kStripRows] = {}, bias[kStripRows] = {};
    std::copy_n(p.weight_scale.at<const float>(first), count, scale);
    for (int f = 0; p.bias && f < count; f++)
      bias[f] = p.bias.dtype == DType::float32 ? *p.bias.at<const float>(first + f)
                                               : to_float(*p.bias.at<const T>(first + f));
    for (int i = 0; i < kStripVectors; i++)
      strip.scale[i] = load(scale + i * lanes), strip.bias[i] = load(bias + i * lanes);
    if (!outliers.columns.empty()) strip.outlier_sums = outlier_sums(right, first, count, begin, end, scale);
    return strip;
  }

  // The outlier columns' share of a strip, for rows [begin, end).
  const float* outlier_sums(const Right& right, int64_t first, int count, int64_t begin, int64_t end,
                            const float* scale) const {
    static thread_local Scratch::Block block;
    int64_t columns = int64_t(outliers.columns.size());
    float *weight, *sums;
    Scratch::plan(block, [&](Scratch& scratch) {
      weight = scratch.take<float>(columns * kStripRows);
      sums = scratch.take<float>((end - begin) * kStripRows);
    });
    for (int f = 0; f < kStripRows; f++) {
      const int8_t* row = right.at(first + std::min(f, count - 1));
      for (int64_t j = 0; j < columns; j++)
        weight[j * kStripRows + f] = float(row[outliers.columns[size_t(j)]]) * scale[f];
    }
    matmul<false, true>(outliers.x + begin * columns, columns, weight, kStripRows, sums, kStripRows, int(end - begin),
                        kStripRows, int(columns));
    return sums;
  }
};

template <class T>
void linear(const Int8LinearParams& p) {
  static thread_local Scratch::Block block, outlier_block;
  int64_t rows = p.x.size[0], columns = p.x.size[1];
  const float* given = p.x_scale ? p.x_scale.at<const float>() : nullptr;
  Left left(rows, columns);
  char* memory;
  float* scale;
  uint8_t* is_outlier;
  Scratch::plan(block, [&](Scratch& scratch) {
    memory = scratch.take<char>(left.bytes());
    scale = scratch.take<float>(rows);
    is_outlier = scratch.take<uint8_t>(columns);
  });
  left.use(memory);
  Outliers outliers;
  if (p.threshold > 0) {
    std::fill(is_outlier, is_outlier + columns, uint8_t(0));
    parallel_for(rows, columns, [&](int64_t m) {
      scale[m] = absmax_below(p.x.at<const T>(m), columns, float(p.threshold), is_outlier) / 127;
    });
    for (int64_t k = 0; k < columns; k++)
      if (is_outlier[k]) outliers.columns.push_back(int32_t(k));
    int64_t count = int64_t(outliers.columns.size());
    outliers.x = reinterpret_cast<float*>(outlier_block.reserve(rows * count * int64_t(sizeof(float))));
  }
  left.fill(2, [&](int64_t m, int8_t* to) {
    const T* x = p.x.at<const T>(m);
    if (p.threshold == 0) scale[m] = row_scale(absmax(x, columns), given, 127);
    Rounding(scale[m], given, 127).row(x, columns, to);
    size_t count = outliers.columns.size();
    for (size_t j = 0; j < count; j++) {
      int32_t k = outliers.columns[j];
      to[k] = 0;
      outliers.x[size_t(m) * count + j] = to_float(x[k]);
    }
  });
  product(left, Right(p.weight), LinearOutput<T>{p, scale, outliers});
}

}  // namespace

void int8_mm(const Int8MmParams& p) {
  static thread_local Scratch::Block block;
  Left left(p.a.size[0], p.a.size[1]);
  left.use(block.reserve(left.bytes()));
  left.fill(1, [&](int64_t m, int8_t* to) { std::copy_n(p.a.at<const int8_t>(m), p.a.size[1], to); });
  product(left, Right(p.b), IntegerOutput{p});
}

void int8_linear(const Int8LinearParams& params) {
  switch (params.x.dtype) {
    case DType::float16: return linear<Half>(params);
    case DType::bfloat16: return linear<BFloat16>(params);
    default: return linear<float>(params);
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
