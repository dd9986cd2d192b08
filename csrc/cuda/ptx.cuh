// SPDX-License-Identifier: Apache-2.0
//
// The only inline assembly of the project: each PTX instruction the kernels use, wrapped once. g++ takes the same names
// from emulator/ptx.h, which defines in C++ what each instruction does, so that every kernel also runs on a CPU.
//
// Rules that keep a kernel runnable on both:
//   * dynamic shared memory comes from dynamic_shared<T>(); `__shared__` arrays work, but unpoisoned and unchecked
//   * shared memory that threads exchange goes through Shared<T> where speed allows: a raw pointer on the device, and
//     under the emulator an array whose bounds are checked and whose races are reported. Write `T x = s[i]`, since
//     `auto x = s[i]` would read when x is used
//   * g++ is given -x c++ -std=c++20 -Wno-unknown-pragmas (for #pragma unroll) and the CUDA headers' directory
//   * kernels start through launch() in launch.cuh; CUDA headers other than cuda_fp16/bf16/fp8.h are not included
#pragma once
#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include "../emulator/ptx.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__

namespace torch_kernels {

// The block's dynamic shared memory, 128-byte aligned.
template <class T = char>
DEVICE T* dynamic_shared() {
  extern __shared__ __align__(128) char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

// An array in shared memory. `data()` is the plain pointer that cp_async and ldmatrix take.
template <class T>
class Shared {
 public:
  DEVICE Shared(T* data, size_t) : data_(data) {}
  DEVICE T& operator[](int i) const { return data_[i]; }
  DEVICE T* data() const { return data_; }
  DEVICE Shared operator+(int i) const { return Shared(data_ + i, 0); }
  // V is loaded or stored in one access at element i, which must be a multiple of V's alignment.
  template <class V>
  DEVICE V load(int i) const {
    return *reinterpret_cast<const V*>(data_ + i);
  }
  template <class V>
  DEVICE void store(int i, const V& value) const {
    *reinterpret_cast<V*>(data_ + i) = value;
  }

 private:
  T* data_;
};

// `count` elements of T that start `offset` bytes into dynamic shared memory.
template <class T>
DEVICE Shared<T> shared_array(size_t offset, size_t count) {
  return Shared<T>(reinterpret_cast<T*>(dynamic_shared<char>() + offset), count);
}

namespace ptx {

DEVICE unsigned shared_address(const void* pointer) { return static_cast<unsigned>(__cvta_generic_to_shared(pointer)); }

DEVICE int lane_id() {
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// --- Asynchronous copies, global to shared. With `valid`, bytes past the first `valid` are written as zeros and not
// read. ---

DEVICE void cp_async_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void cp_async_16(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
               : "memory");
}
DEVICE void cp_async_8(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void cp_async_8(void* to, const void* from, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
               : "memory");
}
DEVICE void cp_async_4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void cp_async_4(void* to, const void* from, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
               : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's committed groups are in flight.
template <int pending>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// --- Matrix loads: 8x8 tiles of 16-bit elements; lane 8i+j gives the address of row j of tile i. ---

DEVICE void ldmatrix_x1(unsigned (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x2(unsigned (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x1_trans(unsigned (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x2_trans(unsigned (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The transpose of an 8x8 tile of 16-bit elements that the warp holds as ldmatrix gives it.
DEVICE unsigned transpose_8x8(unsigned tile) {
  unsigned r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(tile));
  return r;
}

// --- Tensor core products, d += a * b: a is row-major (m x k), b is column-major (k x n). ---

DEVICE void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_m16n8k32_s8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- Arithmetic ---

DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Bitwise function of three words; `table` is what the function gives for (0xF0, 0xCC, 0xAA).
template <int table>
DEVICE unsigned lop3(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(table));
  return d;
}
// Four bytes picked from b:a (byte 0 is a's lowest), one per hexadecimal digit of `selector`, lowest digit first.
DEVICE unsigned prmt(unsigned a, unsigned b, unsigned selector) {
  unsigned d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
DEVICE int dp4a(int a, int b, int c) { return __dp4a(a, b, c); }

// --- Barriers: ids 1 to 15 (0 is __syncthreads), `threads` counts all that arrive or wait, in whole warps. ---

DEVICE void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- Kernels that follow one another in a stream: see launch_early(). Without effect before sm_90. ---

// Until the previous kernel has ended and what it wrote is visible.
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- Global loads of 4, 8 or 16 bytes. `streaming` data is read once: it does not take up L1. ---

DEVICE unsigned load_streaming_4(const void* from) {
  unsigned v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}
DEVICE uint2 load_streaming_8(const void* from) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}
DEVICE uint4 load_streaming_16(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

}  // namespace ptx
}  // namespace torch_kernels
#endif

#include "convert.cuh"
