// SPDX-License-Identifier: Apache-2.0
// Rotary embedding on the GPU. Angles are formed and reduced in double, because positions reach hundreds of thousands.
#pragma once
#include <math.h>

#include "core/tensor.h"
#include "cuda/tile.cuh"

namespace torch_kernels {

// Of so many turns, to 1e-7.
DEVICE void cosine_sine(double turns, float& cosine, float& sine) {
  double quarters = floor(4 * turns + 0.5);
  float x = float(turns - 0.25 * quarters) * 6.2831853f, square = x * x;
  float s = x * (1 + square * (-1.f / 6 + square * (1.f / 120 + square * (-1.f / 5040 + square * (1.f / 362880)))));
  float c = 1 + square * (-0.5f + square * (1.f / 24 + square * (-1.f / 720 + square * (1.f / 40320))));
  int quarter = int(int64_t(quarters) & 3);
  cosine = quarter & 1 ? s : c, sine = quarter & 1 ? c : s;
  if (quarter == 1 || quarter == 2) cosine = -cosine;
  if (quarter >= 2) sine = -sine;
}

// Turns two neighbouring channel pairs of a head by one number of positions. They are two times two neighbouring
// channels, `low`, low + 1 and `high`, high + 1, in either layout.
struct TwoPairs {
  int low, high;
  bool interleaved;
  float cosine[2], sine[2];

  // `pair` is even.
  DEVICE TwoPairs(const Tensor& inv_freq, bool is_interleaved, int pair, int64_t positions)
      : low(is_interleaved ? 2 * pair : pair),
        high(is_interleaved ? low + 2 : low + int(inv_freq.size[0])),
        interleaved(is_interleaved) {
    constexpr double kTurn = 0.15915494309189535;  // of an angle of 1
#pragma unroll
    for (int i = 0; i < 2; i++) {
      double angle = inv_freq.dtype == DType::float64 ? *inv_freq.at<const double>(pair + i)
                                                      : double(*inv_freq.at<const float>(pair + i));
      cosine_sine(double(positions) * (angle * kTurn), cosine[i], sine[i]);
    }
  }

  // The values of channels low, low + 1, high, high + 1.
  DEVICE void turn(float (&x)[4]) const {
    if (interleaved) {
      turn_pair(x[0], x[1], 0);
      turn_pair(x[2], x[3], 1);
    } else {
      turn_pair(x[0], x[2], 0);
      turn_pair(x[1], x[3], 1);
    }
  }

 private:
  DEVICE void turn_pair(float& a, float& b, int i) const {
    float first = a * cosine[i] - b * sine[i];
    b = a * sine[i] + b * cosine[i];
    a = first;
  }
};

// Two neighbouring elements; `aligned`: they can be loaded and stored at once.
template <class T>
DEVICE void load_two(const T* from, bool aligned, float& first, float& second) {
  if (!aligned) {
    first = to_float(from[0]), second = to_float(from[1]);
  } else if constexpr (sizeof(T) == 4) {
    float2 two = *reinterpret_cast<const float2*>(from);
    first = two.x, second = two.y;
  } else {
    unsigned two = *reinterpret_cast<const unsigned*>(from);
    first = unpack<T>(two, 0), second = unpack<T>(two, 1);
  }
}
template <class T>
DEVICE void store_two(T* to, float first, float second) {
  if constexpr (sizeof(T) == 4)
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
  else
    *reinterpret_cast<unsigned*>(to) = pack<T>(first, second);
}

}  // namespace torch_kernels
