// SPDX-License-Identifier: Apache-2.0
//
// The emulator's half of cuda/ptx.cuh: what each instruction does, in C++. Each takes the caller's line as a hidden
// last argument.
#pragma once
#include "builtins.h"
#include "machine.h"
#include "shared.h"
#include "tensor_core.h"

#define DEVICE inline
#define HOST_DEVICE inline

namespace torch_kernels::ptx {

using emulator::Site;

inline int lane_id() { return emulator::self().lane; }

inline void cp_async_16(void* to, const void* from, Site site = Site::current()) {
  emulator::start_copy(to, from, 16, 16, site);
}
inline void cp_async_16(void* to, const void* from, int valid, Site site = Site::current()) {
  emulator::start_copy(to, from, 16, valid, site);
}
inline void cp_async_8(void* to, const void* from, Site site = Site::current()) {
  emulator::start_copy(to, from, 8, 8, site);
}
inline void cp_async_8(void* to, const void* from, int valid, Site site = Site::current()) {
  emulator::start_copy(to, from, 8, valid, site);
}
inline void cp_async_4(void* to, const void* from, Site site = Site::current()) {
  emulator::start_copy(to, from, 4, 4, site);
}
inline void cp_async_4(void* to, const void* from, int valid, Site site = Site::current()) {
  emulator::start_copy(to, from, 4, valid, site);
}
inline void cp_async_commit() { emulator::self().committed++; }
template <int pending>
void cp_async_wait() {
  unsigned committed = emulator::self().committed;
  if (committed > pending) emulator::land_copies(committed - pending);
}
inline void cp_async_wait_all() { emulator::land_copies(++emulator::self().committed); }

inline void ldmatrix_x1(unsigned (&r)[1], const void* row, Site site = Site::current()) {
  emulator::ldmatrix<1, false>(r, row, "ldmatrix.x1", site);
}
inline void ldmatrix_x2(unsigned (&r)[2], const void* row, Site site = Site::current()) {
  emulator::ldmatrix<2, false>(r, row, "ldmatrix.x2", site);
}
inline void ldmatrix_x4(unsigned (&r)[4], const void* row, Site site = Site::current()) {
  emulator::ldmatrix<4, false>(r, row, "ldmatrix.x4", site);
}
inline void ldmatrix_x1_trans(unsigned (&r)[1], const void* row, Site site = Site::current()) {
  emulator::ldmatrix<1, true>(r, row, "ldmatrix.x1.trans", site);
}
inline void ldmatrix_x2_trans(unsigned (&r)[2], const void* row, Site site = Site::current()) {
  emulator::ldmatrix<2, true>(r, row, "ldmatrix.x2.trans", site);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, Site site = Site::current()) {
  emulator::ldmatrix<4, true>(r, row, "ldmatrix.x4.trans", site);
}

inline unsigned transpose_8x8(unsigned tile, Site site = Site::current()) {
  return emulator::transpose_8x8(tile, "movmatrix.trans", site);
}

inline void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                             Site site = Site::current()) {
  emulator::mma_m16n8<emulator::F16>(d, a, b0, b1, "mma.m16n8k16.f16", site);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                              Site site = Site::current()) {
  emulator::mma_m16n8<emulator::BF16>(d, a, b0, b1, "mma.m16n8k16.bf16", site);
}
inline void mma_m16n8k32_s8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                            Site site = Site::current()) {
  emulator::mma_m16n8<emulator::S8>(d, a, b0, b1, "mma.m16n8k32.s8", site);
}

// The .ftz instructions take and give zero for subnormals.
inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }
inline float exp2_approx(float x) { return flush(std::exp2(flush(x))); }
inline float log2_approx(float x) { return std::log2(flush(x)); }
inline float rcp_approx(float x) { return flush(1.f / flush(x)); }
inline float tanh_approx(float x) { return std::tanh(x); }

template <int table>
unsigned lop3(unsigned a, unsigned b, unsigned c) {
  unsigned d = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return d;
}
// Bit 3 of a selector's digit asks for the byte's sign, repeated.
inline unsigned prmt(unsigned a, unsigned b, unsigned selector) {
  unsigned d = __byte_perm(a, b, selector);
  for (int i = 0; i < 4; i++)
    if (selector >> (4 * i + 3) & 1) {
      unsigned sign = d >> (8 * i + 7) & 1 ? 0xffu : 0u;
      d = (d & ~(0xffu << 8 * i)) | sign << 8 * i;
    }
  return d;
}
inline int dp4a(int a, int b, int c) { return __dp4a(a, b, c); }

inline void barrier_sync(int id, int threads, Site site = Site::current()) {
  emulator::block_barrier(id, threads, true, 0, "bar.sync", site);
}
inline void barrier_arrive(int id, int threads, Site site = Site::current()) {
  emulator::block_barrier(id, threads, false, 0, "bar.arrive", site);
}

inline void wait_for_previous_kernel(Site site = Site::current()) {
  if (emulator::pending.empty()) return;
  emulator::machine->held.push_back(&emulator::self());
  emulator::machine->wait("griddepcontrol.wait", site);
}
inline void let_next_kernel_start() {}  // it always may

template <class V>
V load_aligned(const void* from, Site site) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(V))
    emulator::fail("loads " + std::to_string(sizeof(V)) + " bytes from an unaligned address", site);
  return *static_cast<const V*>(from);
}
inline unsigned load_streaming_4(const void* from, Site site = Site::current()) {
  return load_aligned<unsigned>(from, site);
}
inline uint2 load_streaming_8(const void* from, Site site = Site::current()) { return load_aligned<uint2>(from, site); }
inline uint4 load_streaming_16(const void* from, Site site = Site::current()) {
  return load_aligned<uint4>(from, site);
}

}  // namespace torch_kernels::ptx
