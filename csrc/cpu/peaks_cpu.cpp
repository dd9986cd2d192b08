// SPDX-License-Identifier: Apache-2.0
// What this processor can do at most: operands that never leave the registers, memory that is only read. Benchmarks
// hold kernels against these rates.
#include <chrono>
#include <memory>

#include "cpu/matmul.h"
#include "cpu/parallel.h"
#include "cpu/peaks.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

// Work of all threads over the time of the slowest.
template <class Body>
double rate(double work_per_thread, const Body& body) {
  double slowest = 0;
  int threads = 1;
#pragma omp parallel
  {
#pragma omp single
    threads = omp_get_num_threads();
    auto start = std::chrono::steady_clock::now();
    body(omp_get_thread_num(), threads);
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
#pragma omp critical
    slowest = std::max(slowest, seconds);
  }
  return work_per_thread * threads / slowest;
}

constexpr int kChains = 12;  // independent sums: enough to hide the latency of one step
volatile float sink;

template <class Sum, class Step>
double chains(double operations, const Step& step) {
  constexpr int kSteps = 1 << 20;
  return rate(operations * kChains * kSteps, [&](int, int) {
    Sum sum[kChains];
    for (int j = 0; j < kChains; j++)
      sum[j] = Sum{} + std::remove_cvref_t<decltype(Sum{}[0])>(j);  // different, or the compiler would compute one
    for (int i = 0; i < kSteps; i++)
#pragma GCC unroll 12
      for (int j = 0; j < kChains; j++) sum[j] = step(sum[j]);
    for (auto& each : sum) sink = float(each[0]);
  });
}

#if defined(__AMX_TILE__)
template <class Step>
double tiles(double operations, const Step& step) {
  constexpr int kSteps = 1 << 18;
  return rate(operations * 4 * kSteps, [&](int, int) {
    MatmulSession session;
    alignas(64) char values[1024];
    for (int i = 0; i < 1024; i++) values[i] = char(i % 64);
    _tile_loadd(4, values, 64);
    _tile_loadd(5, values, 64);
    _tile_loadd(6, values, 64);
    _tile_loadd(7, values, 64);
    for (int i = 0; i < kSteps; i++) step();
  });
}
#endif

}  // namespace

void peak_float32(const PeakParams& p) {
  Vector<float> factor = broadcast(float(p.seed)), term = broadcast(0.5f);
  *p.rate = chains<Vector<float>>(2 * kLanes<float>, [&](Vector<float> sum) { return sum * factor + term; });
}

void peak_bfloat16(const PeakParams& p) {
#if defined(__AMX_TILE__)
  *p.rate = tiles(2 * 16 * 16 * 32, [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  });
#elif defined(__AVX512BF16__)
  Pair factor{{uint16_t(p.seed)}, {uint16_t(p.seed)}};
  Vector<float> other = broadcast(float(p.seed));
  *p.rate =
      chains<Vector<float>>(4 * kLanes<float>, [&](Vector<float> sum) { return multiply_add(factor, other, sum); });
#else
  peak_float32(p);
#endif
}

void peak_int8(const PeakParams& p) {
#if defined(__AMX_INT8__)
  *p.rate = tiles(2 * 16 * 16 * 64, [] {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  });
#elif defined(__AVX512VNNI__)
  __m512i a = _mm512_set1_epi8(char(p.seed)), b = _mm512_set1_epi8(3);
  using Sum = Vector<int32_t>;
  *p.rate = chains<Sum>(128, [&](Sum sum) { return Sum(_mm512_dpbusd_epi32(__m512i(sum), a, b)); });
#elif defined(__AVX2__)
  __m256i a = _mm256_set1_epi8(char(p.seed)), b = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  using Sum = Vector<int32_t>;
  *p.rate = chains<Sum>(64, [&](Sum sum) {
    __m256i varying = _mm256_xor_si256(a, __m256i(sum));
    return Sum(_mm256_add_epi32(__m256i(sum), _mm256_madd_epi16(_mm256_maddubs_epi16(varying, b), ones)));
  });
#else
  peak_float32(p);
#endif
}

void peak_bandwidth(const PeakParams& p) {
  constexpr int64_t kBytes = int64_t(768) << 20, kBlock = 64 * 16;  // past any cache that a few cores own
  static const std::unique_ptr<char[]> memory(new char[kBytes]());
  int64_t threads = omp_get_max_threads(), share = kBytes / threads / kBlock * kBlock;
  *p.rate = rate(double(share), [&](int thread, int) {
    const char* begin = memory.get() + thread * share;
    Vector<int32_t> sum[4] = {};
    for (int64_t i = 0; i < share; i += kBlock) {
      for (int64_t j = 0; j < kBlock; j += 64) prefetch(begin + i + 4096 + j);
      for (int64_t j = 0; j < kBlock; j += 4 * kVectorBytes)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) sum[k] += load(reinterpret_cast<const int32_t*>(begin + i + j + k * kVectorBytes));
    }
    sink = float((sum[0] + sum[1] + sum[2] + sum[3])[0]);
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
