// SPDX-License-Identifier: Apache-2.0
// Moves rotated keys to other positions.
#include <cmath>
#include <vector>

#include "cpu/dtypes.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "graph_attention/rotation.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

// Rows [first, last) of all heads, turned by one angle per channel pair; no angles: copied.
template <class T, class Real>
void turn_rows(const RopeShiftParams& p, int64_t first, int64_t last, const Real* turn) {
  int channels = int(p.k.size[2]);
  Real row[256];
  for (int64_t t = first; t < last; t++)
    for (int64_t h = 0; h < p.k.size[1]; h++) {
      const T* from = p.k.at<const T>(t, h);
      for (int c = 0; c < channels; c++) row[c] = Real(to_float(from[c * p.k.stride[2]]));
      if (turn) turn_row(row, row, channels, turn, p.interleaved);
      convert(row, p.out.at<T>(t, h), channels);
    }
}

template <class T, class Real>
void shift(const RopeShiftParams& p) {
  int64_t tokens = p.k.size[0], segments = p.delta.size[0], channels = p.k.size[2];
  // Segments are cut into pieces that threads share; what lies before the first and after the last is copied.
  struct Piece {
    int64_t first, last, segment;
  };
  constexpr int64_t kPiece = 64;
  std::vector<Piece> pieces;
  auto cut = [&](int64_t first, int64_t last, int64_t segment) {
    for (; first < last; first += kPiece) pieces.push_back({first, std::min(last, first + kPiece), segment});
  };
  cut(0, p.offsets.index(0), -1);
  for (int64_t s = 0; s < segments; s++) cut(p.offsets.index(s), p.offsets.index(s + 1), s);
  cut(p.offsets.index(segments), tokens, -1);
  std::vector<Real> turns(segments * channels);
  for (int64_t s = 0; s < segments; s++) make_turn(p.delta.index(s), p.inv_freq, &turns[s * channels]);
  parallel_for(int64_t(pieces.size()), kPiece * p.k.size[1] * p.k.size[2], [&](int64_t i) {
    auto [first, last, segment] = pieces[i];
    turn_rows<T, Real>(p, first, last, segment < 0 ? nullptr : &turns[segment * channels]);
  });
}

}  // namespace

void rope_shift(const RopeShiftParams& params) {
  if (params.out.elements() == 0) return;
  for_each_dtype(params.k.dtype, [&]<class Stored>(Stored) { shift<Stored, RealOf<Stored>>(params); });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
