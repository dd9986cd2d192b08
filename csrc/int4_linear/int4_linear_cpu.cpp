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

constexpr int kPassRows = 64;             // rows whose sums stay in the L1 cache
constexpr int kScalesAhead = 2;           // spans between fetching scales and using them
constexpr int64_t kRowBytes = 768 << 10;  // rows that stay in the L2 cache

// A row's bits are those of the tile unit or of vectors, however few rows there are; integers are exact in both.
template <class X, bool a8, bool tiles>
class Forward {
  using Rows = Activations<X, a8, tiles>;
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
  // As many rows as stay in the cache, but enough to be worth unpacking the weights.
  int64_t rows_together() const {
    int64_t rows_in_cache = kRowBytes / std::max<int64_t>(1, rows.row_bytes());
    return std::clamp<int64_t>(rows_in_cache / kPassRows * kPassRows, kPassRows, 4 * kPassRows);
  }

  bool in_registers() const { return (a8 || !tiles) && row_count <= kMostRows; }

  // Where block b's scales of a span are; the next block follows on the last span.
  int64_t scales_at(int64_t b, int64_t s) const {
    return s % rows.spans() * span / group * p.out_features + (b + s / rows.spans()) * kFeatures;
  }

  // Scratch of a thread.
  struct Work {
    float* sums;  // [kPassRows][kFeatures]
    Unit* panel;
    FeatureScales features;
  };

  void multiply(int64_t begin, int64_t end) const {
    static thread_local Scratch::Block block;
    Work work;
    Scratch::plan(block, [&](Scratch& scratch) {
      work.sums = scratch.take<float>(kPassRows * kFeatures);
      work.panel = scratch.take<Unit>(kSpan / kUnitColumns<Unit> * kFeatures);
    });
    [[maybe_unused]] TileSession session(span / kUnitColumns<Unit>, row_count);
    for (int64_t b = begin; b < end; b++)
      for (int first = 0; first < row_count; first += kPassRows) {
        if (p.zeros) {
          pass<true>(b, first, work);
        } else {
          pass<false>(b, first, work);
        }
      }
  }

  // Rows from `first_of_pass` on times block b.
  template <bool zeros>
  void pass(int64_t b, int first_of_pass, Work& work) const {
    int64_t first = b * kFeatures;
    int count = int(std::min<int64_t>(kFeatures, p.out_features - first));
    int pass_rows = std::min(row_count - first_of_pass, kPassRows);
    const uint8_t* bytes = static_cast<const uint8_t*>(p.weight.data) + b * p.weight.stride[0];
    std::fill_n(work.sums, pass_rows * kFeatures, 0.f);
    for (int64_t s = 0; s < rows.spans(); s++) {
      load_scales(p.scales, p.zeros, scales_at(b, s), count, work.features);
      prefetch_scales(p.scales, p.zeros, scales_at(b, s + kScalesAhead));
      RowSpan<Unit> x = rows.span(s).from(first_of_pass, kPassRows);
      Nibbles<Unit> nibbles{bytes + s * span / kOctet * kOctetBytes};
      if (in_registers()) {
        add_product<a8, zeros>(x, nibbles, work.features, work.sums);
        continue;
      }
      unpack_panel<tiles>(nibbles, x.octets, work.panel);
      if constexpr (tiles) {
        add_tile_product<a8, zeros>(x, Rows::kParts, work.panel, work.features, work.sums);
      } else {
        add_product<a8, zeros>(x, Panel<Unit>{work.panel}, work.features, work.sums);
      }
    }
    float bias[kFeatures];
    if (p.bias) load_features(p.bias, first, count, bias);
    for (int row = 0; row < pass_rows; row++) {
      float* sum = work.sums + row * kFeatures;
      for (int n = 0; p.bias && n < kFeatures; n++) sum[n] += bias[n];
      convert(sum, p.out.at<X>(first_row + first_of_pass + row, first), count);
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
  bool one_row = params.out.size[0] == 1;  // vectors are faster than tiles
  if (params.mode == Int4Mode::a8) return Forward<X, true, kHasTiles>(params).run();
  if (params.mode == Int4Mode::fast && one_row) return Forward<X, false, false>(params).run();
  Forward<X, false, kHasTiles>(params).run();
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
