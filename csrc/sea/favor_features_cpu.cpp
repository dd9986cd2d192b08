// SPDX-License-Identifier: Apache-2.0
// Random features: a product with the projection, and what follows while it is in cache.
#include <array>
#include <cmath>

#include "cpu/dtypes.h"
#include "cpu/floats.h"
#include "cpu/matmul.h"
#include "cpu/parallel.h"
#include "sea/kernels.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

constexpr int64_t kRows = 32;
constexpr int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

// The projection, [D][padded(m)].
template <class Real>
void turn(const Tensor& proj, Real* to) {
  int64_t features = proj.size[0], size = proj.size[1], stride = padded(features);
  std::fill_n(to, size * stride, Real(0));
  for_each_dtype(proj.dtype, [&]<class Stored>(Stored) {
    for (int64_t f = 0; f < features; f++)
      for (int64_t c = 0; c < size; c++) to[c * stride + f] = Real(to_float(*proj.at<const Stored>(f, c)));
  });
}

template <class Stored>
class Features {
  using Real = RealOf<Stored>;

 public:
  Features(const FavorFeaturesParams& p, const Real* projection)
      : p(p), projection(projection), size(p.x.size[3]), features(p.proj.size[0]) {
    static thread_local Scratch::Block memory;
    Scratch::plan(memory, [&](Scratch& scratch) {
      x = scratch.take<Real>(kRows * size);
      projected = scratch.take<Real>(kRows * padded(features));
    });
  }

  // Rows [first, end) of all B * T * H.
  void run(int64_t first, int64_t end) {
    int64_t heads = p.x.size[2], tokens = p.x.size[1], stride = padded(features);
    Real factor = Real(std::pow(double(size), -0.25));
    auto place = [&](int64_t row) { return std::array{row / heads / tokens, row / heads % tokens, row % heads}; };
    for (int64_t row = first; row < end; row++) {
      auto [b, t, h] = place(row);
      Real* to = x + (row - first) * size;
      convert(p.x.at<const Stored>(b, t, h), to, size);
      for (int64_t c = 0; c < size; c++) to[c] *= factor;
    }
    matmul<false, true>(x, size, projection, stride, projected, stride, int(end - first), int(features), int(size));
    for (int64_t row = first; row < end; row++) {
      auto [b, t, h] = place(row);
      Real* values = projected + (row - first) * stride;
      if (p.exponential)
        exponentials(x + (row - first) * size, p.shift ? Real(number_at(p.shift, b, t, h)) : Real(0), values);
      else
        for (int64_t f = 0; f < stride; f += kLanes<Real>)
          store(values + f, maximum(Vector<Real>{}, load(values + f)) + Real(p.eps));
      convert(values, p.out.at<Stored>(b, t, h), features);
    }
  }

 private:
  void exponentials(const Real* row, Real shift, Real* values) const {
    constexpr Real infinity = std::numeric_limits<Real>::infinity();
    constexpr Real highest = std::is_same_v<Real, double> ? 1024 : 128;
    double square = 0;
    for (int64_t c = 0; c < size; c++) square += double(row[c]) * row[c];
    Real less = Real(square / 2) + shift, factor = Real(1 / std::sqrt(double(features)));
    for (int64_t f = 0; f < padded(features); f += kLanes<Real>) {
      Vector<Real> exponent = (load(values + f) - less) * Real(1.4426950408889634);
      auto overflows = exponent >= highest;
      Vector<Real> power = overflows ? broadcast(infinity) : exp2_vector(overflows ? Vector<Real>{} : exponent);
      store(values + f, factor * (power + Real(p.eps)));
    }
  }

  const FavorFeaturesParams& p;
  const Real* projection;
  int64_t size, features;
  Real *x, *projected;
};

}  // namespace

void favor_features(const FavorFeaturesParams& p) {
  int64_t rows = p.x.size[0] * p.x.size[1] * p.x.size[2], size = p.x.size[3], features = p.proj.size[0];
  for_each_dtype(p.x.dtype, [&]<class Stored>(Stored) {
    using Real = RealOf<Stored>;
    static thread_local Scratch::Block memory;
    Real* projection;
    Scratch::plan(memory, [&](Scratch& scratch) { projection = scratch.take<Real>(size * padded(features)); });
    turn(p.proj, projection);
    parallel_for((rows + kRows - 1) / kRows, kRows * size * features, [&](int64_t block) {
      Features<Stored>(p, projection).run(block * kRows, std::min(rows, (block + 1) * kRows));
    });
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
