// SPDX-License-Identifier: Apache-2.0
// The gradient of the int4 linear layer with respect to its input: dx[m, k] = sum over n of grad[m, n] · W[n, k].
// Computed transposed, dx^T = W^T · grad^T: a tile of W, 128 columns by 64 features, is dequantised in the L1 cache and
// multiplied with the rows of grad side by side.
#include "cpu/activations.h"
#include "cpu/isa.h"
#include "cpu/nibbles.h"
#include "int4_linear/features_cpu.h"
#include "int4_linear/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

constexpr int kRowsTogether = 64;

template <class X>
class Backward {
 public:
  explicit Backward(const Int4LinearBackwardParams& params)
      : p(params),
        columns(p.perm ? p.perm.size[0] : p.in_features),
        features(p.grad.size[1]),
        group(p.group_size < 0 ? std::max<int64_t>(columns, 1) : p.group_size),
        span(int(std::min<int64_t>(group, kSpan))) {
    if (p.group_size < 0) span = kSpan;
  }

  void run() {
    static thread_local Scratch::Block shared;
    int64_t blocks = (features + kFeatures - 1) / kFeatures;
    for (int64_t first = 0; first < p.out.size[0]; first += kRowsTogether) {
      first_row = first, rows = int(std::min<int64_t>(kRowsTogether, p.out.size[0] - first));
      padded_rows = (rows + 15) / 16 * 16;
      Scratch::plan(shared, [&](Scratch& scratch) { grad = scratch.take<float>(blocks * kFeatures * padded_rows); });
      parallel_for(blocks, kFeatures * rows, [&](int64_t b) { transpose_grad(b); });
      if (p.perm)  // columns that no packed column comes from
        for (int row = 0; row < rows; row++) std::fill_n(p.out.at<X>(first + row), p.in_features, X{});
      parallel_for((columns + kSpan - 1) / kSpan, features * rows * kSpan,
                   [&](int64_t i) { multiply(i * kSpan, blocks); });
    }
  }

 private:
  // grad[feature][row] of a block of features as floats, zero-padded.
  void transpose_grad(int64_t b) const {
    float* to = grad + b * kFeatures * padded_rows;
    int64_t first = b * kFeatures, count = std::min<int64_t>(kFeatures, features - first);
    std::fill_n(to, kFeatures * padded_rows, 0.f);
    for (int row = 0; row < rows; row++) {
      float values[kFeatures];
      convert(p.grad.at<const X>(first_row + row, first), values, count);
      for (int64_t n = 0; n < count; n++) to[n * padded_rows + row] = values[n];
    }
  }

  void multiply(int64_t first_column, int64_t blocks) const {
    static thread_local Scratch::Block block;
    float *panel, *sums;
    Scratch::plan(block, [&](Scratch& scratch) {
      panel = scratch.take<float>(kSpan * kFeatures);
      sums = scratch.take<float>(kSpan * padded_rows);
    });
    std::fill_n(sums, kSpan * padded_rows, 0.f);
    for (int64_t b = 0; b < blocks; b++) {
      dequantize(b, first_column, panel);
      matmul<true, true>(panel, kFeatures, grad + b * kFeatures * padded_rows, padded_rows, sums, padded_rows, kSpan,
                         padded_rows, kFeatures);
    }
    for (int row = 0; row < rows; row++) write(first_column, row, sums);
  }

  // panel[column][feature] = W.
  void dequantize(int64_t b, int64_t first_column, float* panel) const {
    constexpr int lanes = kLanes<float>;
    const uint8_t* bytes = static_cast<const uint8_t*>(p.weight.data) + b * p.weight.stride[0];
    int count = int(std::min<int64_t>(kFeatures, features - b * kFeatures));
    unpack_panel<true>(Nibbles<float>{bytes + first_column / kOctet * kOctetBytes}, kSpan / kOctet, panel);
    for (int k = 0; k < kSpan && first_column + k < columns; k += span) {
      FeatureScales scales;
      load_scales(p.scales, p.zeros, (first_column + k) / group * features + b * kFeatures, count, scales);
      for (int v = 0; v < kFeatures; v += lanes) {
        Vector<float> scale = load(scales.scale + v), zero = load(scales.zero + v);
        for (int i = k; i < k + span; i++) {
          float* at = panel + i * kFeatures + v;
          store(at, load(at) * scale - zero);
        }
      }
    }
  }

  void write(int64_t first_column, int row, const float* sums) const {
    X* out = p.out.at<X>(first_row + row);
    float values[kSpan];
    X converted[kSpan];
    int64_t count = std::min<int64_t>(kSpan, columns - first_column);
    for (int64_t k = 0; k < count; k++) values[k] = sums[k * padded_rows + row];
    if (!p.perm) return convert(values, out + first_column, count);
    convert(values, converted, count);
    for (int64_t k = 0; k < count; k++) {
      int64_t source = p.perm.index(first_column + k);
      if (source >= 0 && source < p.in_features) out[source] = converted[k];
    }
  }

  const Int4LinearBackwardParams& p;
  int64_t columns, features, group;
  int span;
  int64_t first_row = 0;
  int rows = 0, padded_rows = 0;
  float* grad = nullptr;
};

}  // namespace

void int4_linear_backward(const Int4LinearBackwardParams& params) {
  if (params.out.elements() == 0) return;
  switch (params.grad.dtype) {
    case DType::float16: return Backward<Half>(params).run();
    case DType::bfloat16: return Backward<BFloat16>(params).run();
    default: return Backward<float>(params).run();
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
