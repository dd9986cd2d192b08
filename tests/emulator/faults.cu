// SPDX-License-Identifier: Apache-2.0
//
// Kernels with one planted fault each, and the same kernels without it: `faults NAME [SEED]`. Prints what the emulator
// reports, or what the kernel computed; "bench" prints timings.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <string>

#include "../../csrc/cuda/launch.cuh"

using namespace torch_kernels;

// C[16, 8] = A[16, 64] B[8, 64]^T in bf16 by one warp, double buffered.
enum class Gemm { right, no_wait, wrong_fragment, raw_no_barrier };
template <Gemm fault>
__global__ void gemm(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  __nv_bfloat16* tiles = dynamic_shared<__nv_bfloat16>();
  int lane = ptx::lane_id();
  auto load = [&](int stage, int k) {
    __nv_bfloat16* to = tiles + stage * 24 * 16;
    ptx::cp_async_16(to + lane * 8, a + lane / 2 * 64 + k + lane % 2 * 8);
    if (lane < 16) ptx::cp_async_16(to + 256 + lane * 8, b + lane / 2 * 64 + k + lane % 2 * 8);
    ptx::cp_async_commit();
  };
  float d[4] = {};
  load(0, 0);
  for (int i = 0; i < 4; i++) {
    if (i < 3)
      load((i + 1) & 1, (i + 1) * 16);
    else
      ptx::cp_async_commit();
    if constexpr (fault != Gemm::no_wait) ptx::cp_async_wait<1>();
    if constexpr (fault != Gemm::raw_no_barrier) __syncwarp();
    const __nv_bfloat16* tile = tiles + (i & 1) * 24 * 16;
    unsigned af[4], bf[2];
    ptx::ldmatrix_x4(af, tile + lane % 16 * 16 + lane / 16 * 8);
    ptx::ldmatrix_x2(bf, tile + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
    if constexpr (fault == Gemm::wrong_fragment) std::swap(af[1], af[2]);
    ptx::mma_m16n8k16_bf16(d, af, bf[0], bf[1]);
    __syncwarp();
  }
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <Gemm fault>
void run_gemm() {
  auto a = std::make_unique<__nv_bfloat16[]>(16 * 64), b = std::make_unique<__nv_bfloat16[]>(8 * 64);
  float c[128];
  for (int i = 0; i < 16 * 64; i++) a[i] = float(i * 7 % 11 - 5);
  for (int i = 0; i < 8 * 64; i++) b[i] = float(i * 5 % 13 - 6);
  launch(gemm<fault>, 1, 32, 2 * 24 * 32, nullptr, a.get(), b.get(), c);
  int wrong = 0;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) {
      float sum = 0;
      for (int k = 0; k < 64; k++) sum += float(a[i * 64 + k]) * float(b[j * 64 + k]);
      wrong += c[i * 8 + j] != sum;
    }
  std::printf(wrong ? "%d wrong elements\n" : "right\n", wrong);
}

// Reverses an array within a block, through Shared or a plain pointer, with or without the barrier.
template <bool shared, bool barrier>
__global__ void reverse(int* x) {
  int t = threadIdx.x, n = blockDim.x;
  if constexpr (shared) {
    Shared<int> s = shared_array<int>(0, n);
    s[t] = x[t];
    if constexpr (barrier) __syncthreads();
    x[t] = s[n - 1 - t];
  } else {
    int* s = dynamic_shared<int>();
    s[t] = x[t];
    if constexpr (barrier) __syncthreads();
    x[t] = s[n - 1 - t];
  }
}

template <bool shared, bool barrier>
void run_reverse() {
  int x[96], wrong = 0;
  for (int i = 0; i < 96; i++) x[i] = i;
  launch(reverse<shared, barrier>, 1, 96, sizeof(x), nullptr, x);
  for (int i = 0; i < 96; i++) wrong += x[i] != 95 - i;
  std::printf(wrong ? "%d wrong elements\n" : "right\n", wrong);
}

// A tile is overwritten by the next copy while another warp may still read it.
template <bool barrier>
__global__ void overwrite(const int* in, int* out) {
  Shared<int> s = shared_array<int>(0, 64);
  int t = threadIdx.x;
  for (int i = 0; i < 3; i++) {
    ptx::cp_async_4(s.data() + t, in + i * 64 + t);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    out[i * 64 + t] = s[t ^ 32];
    if constexpr (barrier) __syncthreads();
  }
}

// Neighbours through a warp barrier (enough within a warp), then across warps (not enough).
template <bool within>
__global__ void neighbours(int* x) {
  Shared<int> s = shared_array<int>(0, 64);
  int t = threadIdx.x;
  s[t] = x[t];
  __syncwarp();
  x[t] = s[within ? t ^ 1 : t ^ 32];
}

// Named barriers: warp 1 waits for warp 0; with `early` warp 0 arrives before it writes.
template <bool early>
__global__ void handover(int* x) {
  Shared<int> s = shared_array<int>(0, 32);
  int t = threadIdx.x;
  if (t < 32) {
    if (early) ptx::barrier_arrive(3, 64);
    s[t] = x[t];
    if (!early) ptx::barrier_arrive(3, 64);
  } else {
    ptx::barrier_sync(3, 64);
    x[t] = s[t - 32];
  }
}

__global__ void produce(int* x) {
  ptx::let_next_kernel_start();
  x[threadIdx.x] = 1;
}

enum class Follow { right, reads_first, never_waits };

template <Follow how>
__global__ void follow(const int* x, int* y) {
  int first = x[threadIdx.x];
  if (how != Follow::never_waits) ptx::wait_for_previous_kernel();
  y[threadIdx.x] = how == Follow::reads_first ? first : x[threadIdx.x];
}

template <Follow how>
void run_follow() {
  int x[64] = {}, y[64] = {}, z[64] = {}, wrong = 0;
  {
    DeviceGuard guard(0);
    launch(produce, 1, 64, 0, nullptr, x);
    launch_early(follow<how>, 1, 64, 0, nullptr, x, y);
    launch_early(follow<how>, 1, 64, 0, nullptr, y, z);
  }
  for (int i : z) wrong += i != 1;
  if (wrong)
    std::printf("%d wrong elements\n", wrong);
  else
    std::printf("right\n");
}

__global__ void out_of_bounds(int* x, const char* where) {
  int t = threadIdx.x;
  int* raw = dynamic_shared<int>();
  Shared<int> first = shared_array<int>(0, 32), second = shared_array<int>(128, 32);
  if (!std::strcmp(where, "right")) first[t] = 1, second[31 - t] = 2;
  if (!std::strcmp(where, "raw")) raw[t + 33] = 1;
  if (!std::strcmp(where, "array")) first[t + 1] = 1;
  if (!std::strcmp(where, "vector"))
    first.store<int4>(t & 28, make_int4(0, 0, 0, 0)), first.store<int4>(32, make_int4(0, 0, 0, 0));
  if (!std::strcmp(where, "unaligned")) first.store<int2>(1, make_int2(0, 0));
  if (!std::strcmp(where, "global")) x[t + 1] = 1;
  if (!std::strcmp(where, "cp_async")) ptx::cp_async_4(raw + 64 + t, x + t);
  if (!std::strcmp(where, "cp_async_source")) ptx::cp_async_4(raw + t, x + t + 1);
  if (!std::strcmp(where, "cp_async_unaligned")) ptx::cp_async_16(raw + 1, x);
  unsigned r[4];
  if (!std::strcmp(where, "ldmatrix")) ptx::ldmatrix_x4(r, raw + t * 4);
}

__global__ void diverge(const char* how) {
  int t = threadIdx.x;
  if (!std::strcmp(how, "skipped")) {
    if (t < 32) __syncthreads();
    __syncthreads();
  }
  if (!std::strcmp(how, "exited")) {
    if (t == 7) return;
    __syncthreads();
  }
  if (!std::strcmp(how, "lane")) {
    if (t != 33) __shfl_xor_sync(~0u, t, 1);
    if (t == 33) __syncthreads();
  }
  if (!std::strcmp(how, "exited_lane")) {
    if (t != 33) __shfl_xor_sync(~0u, t, 1);
  }
  if (!std::strcmp(how, "deadlock")) {
    if (t < 32)
      ptx::barrier_sync(1, 64), ptx::barrier_arrive(2, 64);
    else
      ptx::barrier_sync(2, 64), ptx::barrier_arrive(1, 64);
  }
  if (!std::strcmp(how, "count")) ptx::barrier_sync(1, t < 32 ? 32 : 64);
  if (!std::strcmp(how, "mask")) __shfl_xor_sync(0xffffu, t, 1);
  if (!std::strcmp(how, "branches")) {
    float d[4] = {};
    unsigned a[4] = {};
    if (t % 2)
      ptx::mma_m16n8k16_f16(d, a, 0, 0);
    else
      ptx::mma_m16n8k16_f16(d, a, 0, 0);
  }
}

__global__ void banks(int stride) {
  char* s = dynamic_shared<char>();
  unsigned r[4];
  ptx::ldmatrix_x4(r, s + threadIdx.x * stride);
}

__global__ void mma_loop(float* out, int steps) {
  float d[4] = {};
  unsigned a[4] = {threadIdx.x, 0, 0, 0};
  for (int i = 0; i < steps; i++) ptx::mma_m16n8k16_bf16(d, a, 0x3f803f80u, 0);
  out[threadIdx.x] = d[0];
}
__global__ void ldmatrix_loop(float* out, int steps) {
  char* s = dynamic_shared<char>();
  unsigned r[4];
  for (int i = 0; i < steps; i++) ptx::ldmatrix_x4(r, s + threadIdx.x % 32 * 16);
  out[threadIdx.x] = r[0];
}
__global__ void shuffle_loop(float* out, int steps) {
  float x = threadIdx.x;
  for (int i = 0; i < steps; i++) x += __shfl_xor_sync(~0u, x, 1 << i % 5);
  out[threadIdx.x] = x;
}
__global__ void barrier_loop(float* out, int steps) {
  for (int i = 0; i < steps; i++) __syncthreads();
  out[threadIdx.x] = 0;
}
__global__ void copy_loop(float* out, int steps) {
  float* s = dynamic_shared<float>();
  for (int i = 0; i < steps; i++) {
    ptx::cp_async_16(s + threadIdx.x * 4, out + threadIdx.x / 4 * 4);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  }
}
__global__ void nothing(float*, int) {}

void bench() {
  static float out[256];
  auto time = [](const char* what, void (*kernel)(float*, int), int grid, int steps, double events) {
    double best = 1e9;
    for (int i = 0; i < 3; i++) {
      std::clock_t start = std::clock();
      launch(kernel, grid, 256, 256 * 16, nullptr, out, steps);
      best = std::min(best, double(std::clock() - start) / CLOCKS_PER_SEC);
    }
    std::printf("%s %.1f ns\n", what, best / events * 1e9);
  };
  time("mma, per warp", mma_loop, 1, 500, 500 * 8);
  time("ldmatrix.x4, per warp", ldmatrix_loop, 1, 500, 500 * 8);
  time("shuffle, per thread", shuffle_loop, 1, 500, 500 * 256);
  time("__syncthreads, per thread", barrier_loop, 1, 500, 500 * 256);
  time("cp.async of 16 bytes and wait, per thread", copy_loop, 1, 200, 200 * 256);
  time("block of 256 threads that do nothing", nothing, 100, 0, 100);
}

int main(int argc, char** argv) {
  std::string name = argc > 1 ? argv[1] : "";
  emulator::set_seed(argc > 2 ? unsigned(std::atoi(argv[2])) : 0);
  auto block = [](auto kernel, int threads, auto... arguments) {
    auto x = std::make_unique<int[]>(192);
    launch(kernel, 1, threads, 256, nullptr, arguments(x.get())...);
    std::printf("right\n");
  };
  auto bounds = [](const char* where) {
    auto x = std::make_unique<int[]>(32);
    launch(out_of_bounds, 1, 32, 256, nullptr, x.get(), where);
    std::printf("right\n");
  };
  auto x = [](int* p) { return p; };
  try {
    size_t colon = name.find(':');
    std::string group = name.substr(0, colon), how = colon == std::string::npos ? "" : name.substr(colon + 1);
    if (name == "gemm")
      run_gemm<Gemm::right>();
    else if (name == "gemm:no_wait")
      run_gemm<Gemm::no_wait>();
    else if (name == "gemm:no_wait_raw")
      emulator::settings.races = false, run_gemm<Gemm::no_wait>();
    else if (name == "gemm:wrong_fragment")
      run_gemm<Gemm::wrong_fragment>();
    else if (name == "gemm:no_syncwarp")
      run_gemm<Gemm::raw_no_barrier>();
    else if (name == "reverse")
      run_reverse<true, true>();
    else if (name == "reverse:raw")
      run_reverse<false, true>();
    else if (name == "reverse:no_barrier")
      run_reverse<true, false>();
    else if (name == "reverse:raw_no_barrier")
      run_reverse<false, false>();
    else if (name == "overwrite")
      block(overwrite<true>, 64, x, x);
    else if (name == "overwrite:no_barrier")
      block(overwrite<false>, 64, x, x);
    else if (name == "neighbours")
      block(neighbours<true>, 64, x);
    else if (name == "neighbours:across")
      block(neighbours<false>, 64, x);
    else if (name == "handover")
      block(handover<false>, 64, x);
    else if (name == "handover:early")
      block(handover<true>, 64, x);
    else if (name == "follow")
      run_follow<Follow::right>();
    else if (name == "follow:reads_first")
      run_follow<Follow::reads_first>();
    else if (name == "follow:never_waits")
      run_follow<Follow::never_waits>();
    else if (group == "bounds")
      bounds(how.c_str());
    else if (group == "diverge")
      launch(diverge, 1, 64, 0, nullptr, how.c_str()), std::printf("right\n");
    else if (group == "partial")
      launch(diverge, 1, 48, 0, nullptr, "branches"), std::printf("right\n");
    else if (group == "oversized")
      launch(diverge, 1, 64, 300000, nullptr, ""), std::printf("right\n");
    else if (group == "banks") {
      launch(banks, 1, 32, 32 * 144, nullptr, std::atoi(how.c_str()));
      std::printf("%ld passes for %ld tiles\n", emulator::statistics.ldmatrix_wavefronts,
                  emulator::statistics.ldmatrix_tiles);
    } else if (name == "after") {  // the emulator is usable after a report
      try {
        launch(diverge, 1, 64, 0, nullptr, "deadlock");
      } catch (const emulator::Error&) {
        run_gemm<Gemm::right>();
      }
    } else if (name == "bench") {
      bench();
    } else {
      std::printf("no test named %s\n", name.c_str());
    }
  } catch (const emulator::Error& error) {
    std::printf("%s\n", error.what());
  }
}
