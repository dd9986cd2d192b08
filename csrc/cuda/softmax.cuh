// SPDX-License-Identifier: Apache-2.0
// States of attention over a part of the keys, and how they are joined.
#pragma once
#include <math.h>

#include "core/context.h"
#include "cuda/tile.cuh"

namespace torch_kernels {

// A softmax state is a maximum m and a sum l of exp(score - m); l == 0 means that nothing was seen. Shifting by the
// maximum must not make NaN of an empty state, nor hide NaN scores, which leave m at -inf.
DEVICE float shift_of(float m) { return m == -INFINITY ? 0.f : m; }

// Joins the sink, if any, to a finished row, natural exponents: returns the factor for its accumulator and sets lse.
DEVICE float finish_row(float m, float l, float sink, float& lse) {
  float joint = shift_of(fmaxf(m, sink));
  float scaled = l == 0 ? 0.f : expf(shift_of(m) - joint), total = l * scaled + expf(sink - joint);
  lse = total == 0 ? -INFINITY : joint + logf(total);
  return l == 0 ? 0.f : scaled / total;
}

// Partial results of splits, by row: O [rows, Dv] unnormalised, then (maximum, sum) [rows], natural exponents.
struct Partials {
  float* out = nullptr;
  float2* state = nullptr;

  Partials(const Context& context, int64_t rows, int64_t value_size) {
    if (rows == 0) return;
    out = static_cast<float*>(context.allocate(rows * (value_size + 2) * int64_t(sizeof(float))));
    state = reinterpret_cast<float2*>(out + rows * value_size);
  }

  // One warp joins the splits of one row, in ascending order: rows first, first + stride, ...
  template <class T>
  DEVICE void combine(int64_t first, int64_t stride, int splits, float sink, int value_size, float* lse, T* to) const {
    int lane = threadIdx.x % 32;
    // A lane has the states of splits lane, lane + 32, ...: they are loaded together.
    float m = -INFINITY, l = 0;
    for (int s = lane; s < splits; s += 32) {
      float2 part = state[first + int64_t(s) * stride];
      if (part.y != 0) m = fmaxf(m, part.x);
    }
    for (int step = 16; step > 0; step /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
    auto weight_of = [&](int s) {
      float2 part = s < splits ? state[first + int64_t(s) * stride] : make_float2(0, 0);
      return make_float2(part.y == 0 ? 0.f : expf(shift_of(part.x) - shift_of(m)), part.y);
    };
    for (int s = lane; s < splits; s += 32) {
      float2 weight = weight_of(s);
      l += weight.x * weight.y;
    }
    for (int step = 16; step > 0; step /= 2) l += __shfl_xor_sync(0xffffffffu, l, step);
    float row_lse, factor = finish_row(m, l, sink, row_lse);
    if (lane == 0) *lse = row_lse;

    for (int start = 0; start < value_size; start += 128) {
      int column = start + lane * 4;
      bool inside = column < value_size;
      float4 total = make_float4(0, 0, 0, 0);
      for (int group = 0; group < splits; group += 32) {
        float2 mine = weight_of(group + lane);
        if (mine.y == 0) mine.x = -1;  // saw nothing: what its accumulator holds does not count
#pragma unroll 8
        for (int i = 0; i < min(splits - group, 32); i++) {
          float weight = __shfl_sync(0xffffffffu, mine.x, i);
          if (!inside) continue;
          const float* from = out + (first + int64_t(group + i) * stride) * value_size + column;
          float4 x = *reinterpret_cast<const float4*>(from);
          if (weight < 0) continue;
          total.x += weight * x.x, total.y += weight * x.y, total.z += weight * x.z, total.w += weight * x.w;
        }
      }
      if (!inside) continue;
      if (l == 0) factor = 0;
      if constexpr (sizeof(T) == 4)
        *reinterpret_cast<float4*>(to + column) =
            make_float4(factor * total.x, factor * total.y, factor * total.z, factor * total.w);
      else
        *reinterpret_cast<uint2*>(to + column) =
            make_uint2(pack<T>(factor * total.x, factor * total.y), pack<T>(factor * total.z, factor * total.w));
    }
  }
};

}  // namespace torch_kernels
