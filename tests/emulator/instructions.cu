// SPDX-License-Identifier: Apache-2.0
//
// Every wrapped instruction against a plain formula. The same file runs on the emulator (g++) and on a device (nvcc),
// which is how the emulator itself is checked. Prints one line per failure; exits 1 if there was any.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.cuh"

using namespace torch_kernels;

// Memory that host and kernel both reach, of exactly `count` elements.
template <class T>
struct Buffer {
  explicit Buffer(size_t count) : count(count) {
#ifdef __CUDACC__
    cudaMallocManaged(&data, count * sizeof(T));
#else
    data = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
#endif
    std::memset(static_cast<void*>(data), 0xFF, count * sizeof(T));
  }
  ~Buffer() {
#ifdef __CUDACC__
    cudaFree(data);
#else
    std::free(data);
#endif
  }
  T& operator[](size_t i) { return data[i]; }
  T* data;
  size_t count;
};

int failures = 0;

void expect(const std::string& what, double got, double want, double tolerance = 0) {
  bool same = std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) <= tolerance;
  if (same || ++failures > 20) return;
  std::printf("%s: got %.9g, want %.9g\n", what.c_str(), got, want);
}

void synchronize() {
#ifdef __CUDACC__
  cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) std::printf("%s\n", cudaGetErrorString(error)), std::exit(2);
#endif
}

HOST_DEVICE unsigned mixed(unsigned x) {
  x = (x ^ 61) ^ (x >> 16), x *= 9, x ^= x >> 4, x *= 0x27d4eb2d;
  return x ^ (x >> 15);
}

// --- Warp and block collectives ---

constexpr int collectives = 27;

__global__ void collectives_kernel(unsigned* out) {
  int t = threadIdx.x, lane = t % 32, n = 0;
  unsigned v = mixed(t), full = ~0u, half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  auto put = [&](unsigned x) { out[n++ * blockDim.x + t] = x; };
  put(__shfl_xor_sync(full, v, 5));
  put(__shfl_xor_sync(full, v, 9, 8));
  put(__shfl_up_sync(full, v, 3));
  put(__shfl_up_sync(full, v, 3, 16));
  put(__shfl_down_sync(full, v, 7));
  put(__shfl_down_sync(full, v, 7, 8));
  put(__shfl_sync(full, v, lane * 7 + 3));
  put(__shfl_sync(full, v, lane + 1, 4));
  put(__ballot_sync(full, v & 4));
  put(__any_sync(full, lane == 40));
  put(__any_sync(full, lane == 31));
  put(__all_sync(full, lane < 32));
  put(__all_sync(full, lane < 31));
  put(__match_any_sync(full, v % 3));
  int all;
  put(__match_all_sync(full, t / 32, &all) + all);
  put(__match_all_sync(full, t, &all) + all);
  put(__reduce_add_sync(full, v));
  put(__reduce_min_sync(full, v));
  put(__reduce_max_sync(full, v));
  put(__reduce_and_sync(full, v | 0xf0));
  put(__reduce_or_sync(full, v & 0xf0));
  put(__reduce_xor_sync(full, v));
  // Both halves of a warp, one after the other.
  unsigned in_half;
  if (lane < 16)
    in_half = __shfl_xor_sync(half, v, 2);
  else
    in_half = __reduce_max_sync(half, v);
  put(in_half);
  put(__syncthreads_or(t == 70));
  put(__syncthreads_and(t < 70));
  put(__syncthreads_count(t % 3 == 0));
  double wide = __shfl_xor_sync(full, double(t) + 0.5, 1);
  put(unsigned(wide * 2) + ptx::lane_id() * 1000);
}

void test_collectives() {
  constexpr int threads = 96;
  Buffer<unsigned> out(collectives * threads);
  launch(collectives_kernel, 1, threads, 0, nullptr, out.data);
  synchronize();
  for (int t = 0; t < threads; t++) {
    int lane = t % 32, base = t - lane, n = 0;
    auto v = [&](int l) { return mixed(base + l); };
    auto check = [&](unsigned want) {
      expect("collective " + std::to_string(n) + " thread " + std::to_string(t), out[n * threads + t], want);
      n++;
    };
    auto fold = [&](int first, int last, auto op) {
      unsigned x = v(first);
      for (int l = first + 1; l < last; l++) x = op(x, v(l));
      return x;
    };
    check(v(lane ^ 5));
    check(v((lane ^ 9) > (lane | 7) ? lane : lane ^ 9));
    check(v(lane < 3 ? lane : lane - 3));
    check(v(lane % 16 < 3 ? lane : lane - 3));
    check(v(lane + 7 > 31 ? lane : lane + 7));
    check(v(lane % 8 + 7 > 7 ? lane : lane + 7));
    check(v((lane * 7 + 3) % 32));
    check(v(lane / 4 * 4 + (lane + 1) % 4));
    unsigned ballot = 0, same = 0;
    for (int l = 0; l < 32; l++)
      ballot |= unsigned((v(l) & 4) != 0) << l, same |= unsigned(v(l) % 3 == v(lane) % 3) << l;
    check(ballot);
    check(0), check(1), check(1), check(0);
    check(same);
    check(~0u + 1);
    check(0);
    check(fold(0, 32, [](unsigned a, unsigned b) { return a + b; }));
    check(fold(0, 32, [](unsigned a, unsigned b) { return a < b ? a : b; }));
    check(fold(0, 32, [](unsigned a, unsigned b) { return a > b ? a : b; }));
    check(fold(0, 32, [](unsigned a, unsigned b) { return a & b; }) | 0xf0);
    check(fold(0, 32, [](unsigned a, unsigned b) { return a | b; }) & 0xf0);
    check(fold(0, 32, [](unsigned a, unsigned b) { return a ^ b; }));
    check(lane < 16 ? v(lane ^ 2) : fold(16, 32, [](unsigned a, unsigned b) { return a > b ? a : b; }));
    check(1), check(0), check(32);
    check(unsigned(((t ^ 1) + 0.5) * 2) + lane * 1000);
    expect("collectives tested", n, collectives);
  }
}

// --- Arithmetic and conversions ---

__global__ void arithmetic_kernel(const unsigned* words, unsigned* out, float* floats, int count) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  unsigned a = words[3 * i], b = words[3 * i + 1], c = words[3 * i + 2];
  unsigned* o = out + 8 * i;
  o[0] = ptx::lop3<0xEA>(a, b, c);
  o[1] = ptx::lop3<0x96>(a, b, c);
  o[2] = ptx::prmt(a, b, c & 0xffff);
  o[3] = unsigned(ptx::dp4a(int(a), int(b), int(c)));
  o[4] = __byte_perm(a, b, c & 0x7777);
  o[5] = __funnelshift_r(a, b, c);
  o[6] = unsigned(__clz(int(a))) + __ffs(int(b)) + __popc(c) + __brev(a) + __umulhi(a, b);
  o[7] = bits_of(__hfma2(half2_of(a & 0x5fff5fffu), half2_of(b & 0x5fff5fffu), half2_of(c & 0x5fff5fffu)));
  float x = (int(a % 2000) - 1000) * 0.1f, y = (b % 100000 + 1) * 0.01f;
  float* f = floats + 6 * i;
  f[0] = ptx::exp2_approx(x);
  f[1] = ptx::log2_approx(y);
  f[2] = ptx::rcp_approx(y);
  f[3] = ptx::tanh_approx(x);
  f[4] = float(__float2int_rn(x * 1e8f)) + __float2int_rz(x);
  f[5] = __saturatef(x) + __fdividef(x, y) + rsqrtf(y) + max(0, int(a % 5)) + min(x, 1.5f);
}

void test_arithmetic() {
  constexpr int count = 3000;
  Buffer<unsigned> words(3 * count), out(8 * count);
  Buffer<float> floats(6 * count);
  for (int i = 0; i < 3 * count; i++) words[i] = mixed(i);
  launch(arithmetic_kernel, (count + 127) / 128, 128, 0, nullptr, words.data, out.data, floats.data, count);
  synchronize();
  for (int i = 0; i < count; i++) {
    unsigned a = words[3 * i], b = words[3 * i + 1], c = words[3 * i + 2], *o = out.data + 8 * i;
    auto byte = [&](int n) { return unsigned(n < 4 ? a >> 8 * n : b >> 8 * (n - 4)) & 0xff; };
    unsigned permuted = 0, signs = 0;
    int dot = int(c);
    for (int n = 0; n < 4; n++) {
      unsigned digit = c >> 4 * n & 15, value = byte(digit & 7);
      permuted |= value << 8 * n;
      signs |= (digit & 8 ? (value & 0x80 ? 0xffu : 0) : value) << 8 * n;
      dot = int(unsigned(dot) + unsigned(int8_t(a >> 8 * n) * int8_t(b >> 8 * n)));
    }
    expect("lop3 (a&b)|c", o[0], (a & b) | c);
    expect("lop3 a^b^c", o[1], a ^ b ^ c);
    expect("prmt", o[2], signs);
    expect("dp4a", int(o[3]), dot);
    expect("byte_perm", o[4], permuted);
    expect("funnelshift_r", o[5], unsigned((uint64_t(b) << 32 | a) >> (c & 31)));
    unsigned reversed = 0;
    for (int n = 0; n < 32; n++) reversed |= (a >> n & 1) << (31 - n);
    expect("bit counts", o[6],
           unsigned((a ? __builtin_clz(a) : 32) + __builtin_ffs(int(b)) + __builtin_popcount(c) + reversed +
                    unsigned(uint64_t(a) * b >> 32)));
    for (int n = 0; n < 2; n++) {
      auto half = [&](unsigned w) {
        __half_raw raw;
        raw.x = (w & 0x5fff5fffu) >> 16 * n & 0xffff;
        return double(__half2float(__half(raw)));
      };
      // Exact in long double; rounded once.
      __float128 exact = __float128(half(a)) * half(b) + half(c);
      __half_raw got;
      got.x = o[7] >> 16 * n & 0xffff;
      double value = double(__half2float(__half(got)));
      __float128 error = exact - value;
      double ulp = std::ldexp(1.0, std::max(std::ilogb(value == 0 ? 1e-7 : value), -14) - 10);
      bool finite = std::fabs(double(exact)) < 65504;
      if (finite && (error < 0 ? -error : error) > __float128(ulp) / 2) expect("hfma2", value, double(exact));
    }
    float x = (int(a % 2000) - 1000) * 0.1f, y = (b % 100000 + 1) * 0.01f, *f = floats.data + 6 * i;
    expect("ex2", f[0], std::exp2(double(x)), std::exp2(double(x)) * 1e-6);
    expect("lg2", f[1], std::log2(double(y)), 2e-6 * std::fmax(1, std::fabs(std::log2(y))));
    expect("rcp", f[2], 1.0 / y, 1e-6 / y);
    expect("tanh", f[3], std::tanh(double(x)), 1e-3);
    double scaled = x * 1e8f;
    double rounded = scaled >= 2147483648.   ? 2147483647.
                     : scaled < -2147483648. ? -2147483648.
                                             : std::nearbyint(scaled);
    expect("float to int", f[4], float(rounded) + std::trunc(x), 256);
    double other = std::fmin(std::fmax(x, 0), 1) + double(x) / y + 1 / std::sqrt(y) + a % 5 + std::fmin(x, 1.5);
    expect("float functions", f[5], other, 1e-4 * std::fmax(1., std::fabs(other)));
  }
}

__global__ void convert_kernel(float* fp8, float* int8_half, float* int8_bf16, float* int4) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;  // two bytes
  __half2 h = e4m3x2_to_half2(uint16_t(i));
  fp8[2 * i] = __low2float(h), fp8[2 * i + 1] = __high2float(h);
  unsigned packed = unsigned(i) | mixed(i) << 16;
  __half2 halves[2];
  __nv_bfloat162 brains[2];
  int8x4_to_half2x2(packed, halves);
  int8x4_to_bfloat162x2(packed, brains);
  for (int n = 0; n < 2; n++) {
    int8_half[4 * i + 2 * n] = __low2float(halves[n]), int8_half[4 * i + 2 * n + 1] = __high2float(halves[n]);
    int8_bf16[4 * i + 2 * n] = __low2float(brains[n]), int8_bf16[4 * i + 2 * n + 1] = __high2float(brains[n]);
  }
  __half2 nibbles[4];
  uint4x8_to_half2x4(packed, nibbles);
  for (int n = 0; n < 4; n++) int4[8 * i + n] = __low2float(nibbles[n]), int4[8 * i + n + 4] = __high2float(nibbles[n]);
}

void test_conversions() {
  constexpr int count = 65536;
  Buffer<float> fp8(2 * count), halves(4 * count), brains(4 * count), nibbles(8 * count);
  launch(convert_kernel, count / 64, 64, 0, nullptr, fp8.data, halves.data, brains.data, nibbles.data);
  synchronize();
  for (int i = 0; i < count; i++) {
    for (int n = 0; n < 2; n++) {
      int byte = i >> 8 * n & 0xff, exponent = byte >> 3 & 15, mantissa = byte & 7;
      double magnitude = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
      expect("e4m3 " + std::to_string(byte), fp8[2 * i + n],
             (byte & 0x7f) == 0x7f ? NAN
             : byte & 0x80         ? -magnitude
                                   : magnitude);
    }
    unsigned packed = unsigned(i) | mixed(i) << 16;
    for (int n = 0; n < 4; n++) {
      expect("int8 to half", halves[4 * i + n], int8_t(packed >> 8 * n));
      expect("int8 to bfloat16", brains[4 * i + n], int8_t(packed >> 8 * n));
    }
    for (int n = 0; n < 8; n++) expect("int4 to half", nibbles[8 * i + n], packed >> 4 * n & 15);
  }
}

// --- Tensor cores: C[16, 8] = A[16, K] B[K, 8] + C, one warp; A and B pass through shared memory. ---

struct Half {
  using T = __half;
  using D = float;
  static constexpr int k = 16;
  DEVICE static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    ptx::mma_m16n8k16_f16(d, a, b0, b1);
  }
};
struct Brain {
  using T = __nv_bfloat16;
  using D = float;
  static constexpr int k = 16;
  DEVICE static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    ptx::mma_m16n8k16_bf16(d, a, b0, b1);
  }
};
struct Byte {
  using T = int8_t;
  using D = int;
  static constexpr int k = 32;
  DEVICE static void mma(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    ptx::mma_m16n8k32_s8(d, a, b0, b1);
  }
};

// B is given as B^T[8][K] (b_rows false) or, for 16-bit types, as B[K][8] (b_rows true: ldmatrix.trans).
// `valid_k`: columns of A from there on count as zero, by cp.async's zero fill.
template <class Type, bool b_rows, int loads>
__global__ void matmul_kernel(const typename Type::T* a, const typename Type::T* b, typename Type::D* c, int K,
                              int valid_k) {
  using T = typename Type::T;
  constexpr int k = Type::k, per_16 = 16 / sizeof(T);
  Shared<T> as = shared_array<T>(0, 16 * k), bs = shared_array<T>(16 * k * sizeof(T), 8 * k);
  int lane = ptx::lane_id();
  typename Type::D d[4];
  for (int i = 0; i < 4; i++) d[i] = c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
  for (int k0 = 0; k0 < K; k0 += k) {
    int row = lane / 2, column = lane % 2 * per_16;
    int bytes = (valid_k - k0 - column) * int(sizeof(T));
    bytes = bytes < 0 ? 0 : bytes > 16 ? 16 : bytes;
    ptx::cp_async_16(as.data() + row * k + column, bytes ? a + row * K + k0 + column : a, bytes);
    // B's 8 * k elements: 16 copies of 16 bytes, the first half of them in 8s, a quarter of those in 4s.
    if (lane < 16) {
      T* to = bs.data() + lane * per_16;
      const T* from = b_rows ? b + (k0 + lane) * 8 : b + (lane / 2) * K + k0 + lane % 2 * per_16;
      if (lane < 8) {
        ptx::cp_async_8(to, from);
        if (lane < 4)
          ptx::cp_async_4(to + per_16 / 2, from + per_16 / 2),
              ptx::cp_async_4(to + per_16 * 3 / 4, from + per_16 * 3 / 4);
        else
          ptx::cp_async_8(to + per_16 / 2, from + per_16 / 2, 8);
      } else {
        ptx::cp_async_16(to, from);
      }
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    unsigned af[4], bf[2];
    ptx::ldmatrix_x4(af, as.data() + (lane % 16) * k + lane / 16 * per_16);
    if constexpr (b_rows) {
      if constexpr (loads == 1) {
        unsigned x[1];
        ptx::ldmatrix_x1_trans(x, bs.data() + lane % 8 * 8), bf[0] = x[0];
        ptx::ldmatrix_x1_trans(x, bs.data() + (8 + lane % 8) * 8), bf[1] = x[0];
      } else {
        ptx::ldmatrix_x2_trans(bf, bs.data() + (lane % 16) * 8);
      }
    } else if constexpr (loads == 1) {
      unsigned x[1];
      ptx::ldmatrix_x1(x, bs.data() + lane % 8 * k), bf[0] = x[0];
      ptx::ldmatrix_x1(x, bs.data() + lane % 8 * k + per_16), bf[1] = x[0];
    } else if constexpr (loads == 2) {
      ptx::ldmatrix_x2(bf, bs.data() + lane % 8 * k + lane / 8 % 2 * per_16);
    } else {  // four tiles, of which the last two repeat the first
      unsigned x[4];
      ptx::ldmatrix_x4(x, bs.data() + lane % 8 * k + lane / 8 % 2 * per_16);
      bf[0] = x[2], bf[1] = x[3];
    }
    Type::mma(d, af, bf[0], bf[1]);
    __syncwarp();
  }
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <class Type, bool b_rows, int loads>
void test_matmul(const char* name) {
  using T = typename Type::T;
  constexpr int K = 96, range = sizeof(T) == 1 ? 255 : 15;
  for (int valid_k : {K, 35 / (4 / int(sizeof(T))) * (4 / int(sizeof(T)))}) {
    Buffer<T> a(16 * K), b(K * 8);
    Buffer<typename Type::D> c(16 * 8);
    std::vector<int> ai(16 * K), bi(K * 8), ci(16 * 8);
    for (int i = 0; i < 16 * K; i++) a[i] = T(float(ai[i] = int(mixed(i) % range) - range / 2));
    for (int i = 0; i < K * 8; i++) bi[i] = int(mixed(i + 5000) % range) - range / 2;
    for (int i = 0; i < K; i++)
      for (int j = 0; j < 8; j++) b[b_rows ? i * 8 + j : j * K + i] = T(float(bi[i * 8 + j]));
    for (int i = 0; i < 16 * 8; i++) c[i] = ci[i] = int(mixed(i + 9000) % 1000);
    launch(matmul_kernel<Type, b_rows, loads>, 1, 32, 24 * 32, nullptr, a.data, b.data, c.data, K, valid_k);
    synchronize();
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 8; j++) {
        int sum = ci[i * 8 + j];
        for (int k = 0; k < valid_k; k++) sum += ai[i * K + k] * bi[k * 8 + j];
        expect(std::string(name) + " at " + std::to_string(i) + "," + std::to_string(j), c[i * 8 + j], sum);
      }
  }
}

// The four transposed tiles of ldmatrix.x4.trans, or of ldmatrix.x4 and movmatrix, element by element.
__global__ void transpose_kernel(const uint16_t* in, unsigned* out, bool in_registers) {
  Shared<uint16_t> s = shared_array<uint16_t>(0, 256);
  s.store<uint4>(threadIdx.x * 8, ptx::load_streaming_16(in + threadIdx.x * 8));
  __syncthreads();
  unsigned r[4];
  if (in_registers) {
    ptx::ldmatrix_x4(r, s.data() + threadIdx.x * 8);
    for (int i = 0; i < 4; i++) r[i] = ptx::transpose_8x8(r[i]);
  } else {
    ptx::ldmatrix_x4_trans(r, s.data() + threadIdx.x * 8);
  }
  for (int i = 0; i < 4; i++) out[i * 32 + threadIdx.x] = r[i];
}

void test_transpose() {
  Buffer<uint16_t> in(256);
  Buffer<unsigned> out(128);
  for (int i = 0; i < 256; i++) in[i] = uint16_t(mixed(i));
  for (bool in_registers : {false, true}) {
    launch(transpose_kernel, 1, 32, 512, nullptr, in.data, out.data, in_registers);
    synchronize();
    for (int tile = 0; tile < 4; tile++)
      for (int lane = 0; lane < 32; lane++)
        for (int half = 0; half < 2; half++)
          expect(in_registers ? "movmatrix.trans" : "ldmatrix.x4.trans", out[tile * 32 + lane] >> 16 * half & 0xffff,
                 in[tile * 64 + (lane % 4 * 2 + half) * 8 + lane / 4]);
  }
}

// mma must not hide infinities, NaNs and subnormals.
__global__ void special_kernel(float* out) {
  unsigned values[] = {0x7c00u, 0x7e01u, 0x0001u, 0xfc00u};  // inf, NaN, smallest subnormal, -inf in fp16
  for (int i = 0; i < 4; i++) {
    unsigned a[4] = {ptx::lane_id() % 4 == 0 ? values[i] : 0, 0, 0, 0};
    float d[4] = {};
    ptx::mma_m16n8k16_f16(d, a, ptx::lane_id() % 4 == 0 ? 0x3c00u : 0, 0);
    if (ptx::lane_id() == 0) out[i] = d[0];
  }
}

void test_special_values() {
  Buffer<float> out(4);
  launch(special_kernel, 1, 32, 0, nullptr, out.data);
  synchronize();
  expect("fp16 inf", out[0], INFINITY), expect("fp16 NaN", out[1], NAN);
  expect("fp16 subnormal", out[2], std::ldexp(1.0, -24)), expect("fp16 -inf", out[3], -INFINITY);
}

// --- cp.async groups, named barriers, atomics, 3-d indices ---

// Warp 0 produces, warp 1 consumes, through two slots and four named barriers.
__global__ void pipeline_kernel(const int* in, int* out, int steps) {
  Shared<int> slots = shared_array<int>(0, 64);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < steps; i++) {
    int slot = i & 1, full = 1 + slot, empty = 3 + slot;
    if (warp == 0) {
      if (i >= 2) ptx::barrier_sync(empty, 64);
      slots[slot * 32 + lane] = in[i * 32 + lane];
      __threadfence_block();
      ptx::barrier_arrive(full, 64);
    } else {
      ptx::barrier_sync(full, 64);
      out[i * 32 + lane] = slots[slot * 32 + 31 - lane];
      if (i + 2 < steps) ptx::barrier_arrive(empty, 64);
    }
  }
}

// A three-stage cp.async pipeline per thread.
__global__ void stages_kernel(const uint2* in, uint2* out, int steps) {
  uint2* s = dynamic_shared<uint2>();
  int t = threadIdx.x, n = blockDim.x;
  for (int i = 0; i < 2; i++) ptx::cp_async_8(s + i * n + t, in + i * n + t), ptx::cp_async_commit();
  for (int i = 0; i < steps; i++) {
    if (i + 2 < steps) ptx::cp_async_8(s + (i + 2) % 3 * n + t, in + (i + 2) * n + t);
    ptx::cp_async_commit();
    ptx::cp_async_wait<2>();
    __syncthreads();
    out[i * n + t] = s[i % 3 * n + (t + 1) % n];
    __syncthreads();
  }
}

__global__ void indices_kernel(int* out, int* counter, unsigned long long* wide) {
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * 24 + thread] = block * 100 + thread;
  atomicAdd(counter, thread);
  atomicMax(counter + 1, thread);
  atomicMin(counter + 2, block - 7);
  atomicOr(counter + 3, 1 << thread);
  atomicAdd(wide, 1ull << 33);
}

void test_blocks() {
  constexpr int steps = 7;
  Buffer<int> in(steps * 32), out(steps * 32);
  for (int i = 0; i < steps * 32; i++) in[i] = i * i;
  launch(pipeline_kernel, 1, 64, 256, nullptr, in.data, out.data, steps);
  synchronize();
  for (int i = 0; i < steps * 32; i++) expect("pipeline", out[i], in[i / 32 * 32 + 31 - i % 32]);

  constexpr int n = 48;
  Buffer<uint2> from(steps * n), to(steps * n);
  for (int i = 0; i < steps * n; i++) from[i] = make_uint2(mixed(i), i);
  launch(stages_kernel, 1, n, 3 * n * sizeof(uint2), nullptr, from.data, to.data, steps);
  synchronize();
  for (int i = 0; i < steps * n; i++) expect("stages", to[i].x, from[i / n * n + (i % n + 1) % n].x);

  Buffer<int> cells(12 * 24), counter(4);
  Buffer<unsigned long long> wide(1);
  counter[0] = counter[1] = counter[2] = counter[3] = 0, wide[0] = 0;
  launch(indices_kernel, dim3(2, 3, 2), dim3(4, 3, 2), 0, nullptr, cells.data, counter.data, wide.data);
  synchronize();
  for (int i = 0; i < 12 * 24; i++) expect("indices", cells[i], i / 24 * 100 + i % 24);
  expect("atomicAdd", counter[0], 12 * 23 * 24 / 2), expect("atomicMax", counter[1], 23);
  expect("atomicMin", counter[2], -7), expect("atomicOr", counter[3], (1 << 24) - 1);
  expect("atomicAdd, 64 bits", double(wide[0]), 288 * std::ldexp(1., 33));
}

// --- Each fragment function names every element of its matrix exactly once. ---

#ifndef __CUDACC__
void test_bijective(const char* name, int rows, int columns, int words, int parts,
                    const std::function<emulator::Element(int, int, int)>& at) {
  std::vector<int> times(rows * columns);
  for (int lane = 0; lane < 32; lane++)
    for (int word = 0; word < words; word++)
      for (int part = 0; part < parts; part++) {
        emulator::Element e = at(lane, word, part);
        if (e.row < 0 || e.row >= rows || e.column < 0 || e.column >= columns)
          expect(name, e.row, -1);
        else
          times[e.row * columns + e.column]++;
      }
  for (int count : times) expect(name, count, 1);
}

void test_fragments() {
  using Two = emulator::Fragment<2>;
  using Four = emulator::Fragment<4>;
  test_bijective("a, 16 bits", 16, 16, 4, 2, Two::a);
  test_bijective("b, 16 bits", 16, 8, 2, 2, Two::b);
  test_bijective("a, 8 bits", 16, 32, 4, 4, Four::a);
  test_bijective("b, 8 bits", 32, 8, 2, 4, Four::b);
  test_bijective("d", 16, 8, 4, 1, [](int lane, int word, int) { return emulator::fragment_d(lane, word); });
  test_bijective("8x8", 8, 8, 1, 2, [](int lane, int, int part) { return emulator::fragment_8x8(lane, part); });
}
#endif

void test_all() {
  test_collectives();
  test_arithmetic();
  test_matmul<Half, false, 2>("f16");
  test_matmul<Half, false, 1>("f16, ldmatrix.x1");
  test_matmul<Half, true, 2>("f16, ldmatrix.x2.trans");
  test_matmul<Half, true, 1>("f16, ldmatrix.x1.trans");
  test_matmul<Brain, false, 4>("bf16, ldmatrix.x4");
  test_matmul<Brain, true, 2>("bf16, ldmatrix.x2.trans");
  test_matmul<Byte, false, 2>("s8");
  test_transpose();
  test_special_values();
  test_blocks();
}

int main() {
#ifdef __CUDACC__
  test_all();
#else
  test_fragments();
  for (unsigned seed = 0; seed < 5; seed++) {
    emulator::set_seed(seed);
    test_all();
  }
#endif
  test_conversions();
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
