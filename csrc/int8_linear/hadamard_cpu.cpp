// SPDX-License-Identifier: Apache-2.0
// Hadamard transforms of rows, in float32, and their quantisation.
#include "cpu/hadamard.h"

#include "cpu/int8_quantize.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "int8_linear/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

// Runs body(m, row) for each row, with room for its n floats.
template <class Body>
void for_rows(int64_t rows, int64_t n, const Body& body) {
  int64_t group = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, n));
  parallel_for((rows + group - 1) / group, group * n * 8, [&](int64_t g) {
    static thread_local Scratch::Block block;
    float* row = reinterpret_cast<float*>(block.reserve(n * int64_t(sizeof(float))));
    for (int64_t m = g * group; m < std::min(rows, (g + 1) * group); m++) body(m, row);
  });
}

template <class T>
void transform(const HadamardParams& p) {
  int64_t n = p.x.size[1];
  for_rows(p.x.size[0], n, [&](int64_t m, float* row) {
    const T* x = p.x.at<const T>(m);
    T* out = p.out.at<T>(m);
    hadamard(
        n, [&](int64_t i) { return load_float(x + i, n - i); }, row,
        [&](int64_t i, Vector<float> v) { store_float(out + i, v * float(p.scale), n - i); });
  });
}

template <class T>
void rotate(const RotateQuantizeParams& p) {
  int64_t n = p.x.size[1];
  const float* signs = p.signs ? p.signs.at<const float>() : nullptr;
  const float* smooth = p.smooth ? p.smooth.at<const float>() : nullptr;
  const float* given = p.x_scale ? p.x_scale.at<const float>() : nullptr;
  float limit = float((1 << (p.bits - 1)) - 1), factor = float(1 / std::sqrt(double(n)));
  for_rows(p.x.size[0], n, [&](int64_t m, float* row) {
    const T* x = p.x.at<const T>(m);
    hadamard(
        n,
        [&](int64_t i) {
          Vector<float> v = load_float(x + i, n - i);
          return signs ? v * load_float(signs + i, n - i) : v;
        },
        row,
        [&](int64_t i, Vector<float> v) {
          v *= factor;
          if (smooth) v /= load_float(smooth + i, n - i);
          store_float(row + i, v, n - i);
        });
    float scale = row_scale(absmax(row, n), given, limit);
    *p.scale.at<float>(m) = scale;
    Rounding(scale, given, limit).row(row, n, p.q.at<int8_t>(m));
  });
}

}  // namespace

void hadamard_transform(const HadamardParams& params) {
  switch (params.x.dtype) {
    case DType::float16: return transform<Half>(params);
    case DType::bfloat16: return transform<BFloat16>(params);
    default: return transform<float>(params);
  }
}

void rotate_quantize(const RotateQuantizeParams& params) {
  switch (params.x.dtype) {
    case DType::float16: return rotate<Half>(params);
    case DType::bfloat16: return rotate<BFloat16>(params);
    default: return rotate<float>(params);
  }
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
