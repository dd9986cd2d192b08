// SPDX-License-Identifier: Apache-2.0
// The int4 linear layer on the CPU. Rows of x are packed once; then each thread walks along its output features, a
// block of 64 at a time, and along k in spans, so that weights stream from memory in order. Few rows unpack the weights
// in registers, many share a panel unpacked in the L1 cache. Every row is summed in the same order either way.
#include "cpu/activations.h"
#include "cpu/isa.h"
#include "cpu/nibbles.h"
#include "int4_linear/features_cpu.h"
#include "int4_linear/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

template <class X, bool a8>
class Forward {
  using Rows = Activations<X, a8>;
  using Unit = typename Rows::Unit;

 public:
  explicit Forward(const Int4LinearParams& params)
      : p(params),
        columns(p.perm ? p.perm.size[0] : p.x.size[1]),
        group(p.group_size < 0 ? std::max<int64_t>(columns, 1) : p.group_size),
        span(int(std::min<int64_t>(p.group_size < 0 ? kSpan : group, kSpan))),
        blocks((p.out_features + kFeatures - 1) / kFeatures),
        rows(p.x, p.perm, span, bool(p.zeros)) {}

  void run() {
    static thread_local Scratch::Block packed;
    int64_t count = rows_together();
    for (int64_t first = 0; first < p.out.size[0]; first += count) {
      first_row = first, row_count = int(std::min(count, p.out.size[0] - first));
      rows.pack(packed, first, row_count);
      int64_t each = std::max<int64_t>(1, blocks / (8 * omp_get_max_threads()));
      parallel_for((blocks + each - 1) / each, each * kFeatures * columns * row_count,
                   [&](int64_t i) { multiply(i * each, std::min(blocks, (i + 1) * each)); });
    }
  }

 private:
  // As many rows as stay in the L2 cache, but enough to be worth unpacking the weights.
  int64_t rows_together() const {
    constexpr int64_t kCacheBytes = 1 << 20;
    return std::clamp<int64_t>(kCacheBytes / std::max<int64_t>(1, rows.row_bytes()) / 32 * 32, 64, 256);
  }

  bool in_registers() const {
    if (kHasTiles && !a8) return false;  // a row's bits are those of the tile unit, however few rows there are
    return row_count <= kMostRows;
  }

  void multiply(int64_t begin, int64_t end) const {
    static thread_local Scratch::Block block;
    float* sums;
    Unit* panel;
    Scratch::plan(block, [&](Scratch& scratch) {
      sums = scratch.take<float>(int64_t(row_count) * kFeatures);
      panel = scratch.take<Unit>(kSpan / kUnitColumns<Unit> * kFeatures);
    });
    if (in_registers()) {
      for (int64_t b = begin; b < end; b++)
        sum_block(b, sums, [&](const auto& x, const uint8_t* bytes, auto zeros, const FeatureScales& features) {
          add_product<a8, zeros()>(x, Nibbles<Unit>{bytes}, features, sums);
        });
      return;
    }
    [[maybe_unused]] TileSession session(span / kUnitColumns<Unit>);
    for (int64_t b = begin; b < end; b++)
      sum_block(b, sums, [&](const auto& x, const uint8_t* bytes, auto zeros, const FeatureScales& features) {
        unpack_panel<kHasTiles>(Nibbles<Unit>{bytes}, x.octets, panel);
        if constexpr (kHasTiles) {
          add_tile_product<a8, zeros()>(x, Rows::kParts, panel, features, sums);
        } else {
          add_product<a8, zeros()>(x, Panel<Unit>{panel}, features, sums);
        }
      });
  }

  // Adds up all spans of a block of features with `add`, and writes the block's outputs.
  template <class Add>
  void sum_block(int64_t b, float* sums, const Add& add) const {
    int64_t first = b * kFeatures;
    int count = int(std::min<int64_t>(kFeatures, p.out_features - first));
    const uint8_t* bytes = static_cast<const uint8_t*>(p.weight.data) + b * p.weight.stride[0];
    std::fill_n(sums, row_count * kFeatures, 0.f);
    FeatureScales features;
    for (int64_t s = 0; s < rows.spans(); s++) {
      int64_t offset = s * span / group * p.out_features + first;
      load_scales(p.scales, p.zeros, offset, count, features);
      const uint8_t* span_bytes = bytes + s * span / kOctet * kOctetBytes;
      if (p.zeros) {
        add(rows.span(s), span_bytes, std::true_type{}, features);
      } else {
        add(rows.span(s), span_bytes, std::false_type{}, features);
      }
    }
    float bias[kFeatures];
    if (p.bias) load_features(p.bias, first, count, bias);
    for (int row = 0; row < row_count; row++) {
      float* sum = sums + row * kFeatures;
      for (int n = 0; p.bias && n < kFeatures; n++) sum[n] += bias[n];
      convert(sum, p.out.at<X>(first_row + row, first), count);
    }
  }

  const Int4LinearParams& p;
  int64_t columns, group;
  int span;
  int64_t blocks, first_row = 0;
  int row_count = 0;
  Rows rows;
};

template <class X>
void forward(const Int4LinearParams& params) {
  if (params.mode == Int4Mode::a8) return Forward<X, true>(params).run();
  Forward<X, false>(params).run();
}

}  // namespace

void int4_linear(const Int4LinearParams& params) {
  if (params.out.elements() == 0) return;
  switch (params.x.dtype) {
    case DType::float16: return forward<Half>(params);
    case DType::bfloat16: return forward<BFloat16>(params);
    default: return forward<float>(params);
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
