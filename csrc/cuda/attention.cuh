// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores, for 16-bit queries: flash attention over one split of the keys.
//
// K and V tiles travel through one ring of shared memory buffers (K0, V0, K1, V1, ...), filled by cp.async as far ahead
// as the ring is long. All rows of the block share each tile. Warps that share rows (kWarpsN of them, for few rows)
// take different keys of each tile and keep a softmax state of their own; the states are joined at the end. 8-bit keys
// and values are decoded between shared memory and the tensor cores; the mma's k order (for K) and n order (for V)
// follow from where ldmatrix puts their bytes.
#pragma once
#include "cuda/key_tiles.cuh"

namespace torch_kernels {

// `Tiles` are KeyTiles that also know about rows:
//   prepare_rows(tile)               called once for each tile, before its keys are met and no others are
//   needs_mask(tile), visible_bits(tile, half, bits)    which of a tile's keys this thread's rows see
//   is_padding(half)                 rows that see nothing, not even the sink
template <class T, class Tiles, int kHeadTile, int kRowTile>
struct AttentionBlock : Tiles {
  using Tiles::kKeys, Tiles::kRing, Tiles::kThreads, Tiles::kWarpKeys, Tiles::kWarpsN, Tiles::kWords;
  using Tiles::place_keys, Tiles::prepare_rows, Tiles::visible_bits, Tiles::needs_mask, Tiles::is_padding;
  using Tiles::work, Tiles::thread, Tiles::lane, Tiles::warp_m, Tiles::warp_n, Tiles::shared, Tiles::entry;

  const bool has_rows;  // whether this warp has any
  float out[kHeadTile / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // base 2; sum: this lane's share

  template <class Work>
  DEVICE explicit AttentionBlock(Work& w) : Tiles(w), has_rows(w.row0 + warp_m * 16 < w.rows) {}

  // scores += Q K^T for this warp's rows and keys.
  template <class KV>
  DEVICE void multiply_q_k(const char* k, float (&scores)[kWarpKeys / 8][4]) {
    constexpr int kRowBytes = kHeadTile * int(sizeof(KV));
    int head_size = int(work.q().size[3]);
    int q_offset = swizzled<kHeadTile * 2>(warp_m * 16 + lane % 16, lane / 16);
    int k_offset = swizzled<kRowBytes>(warp_n * kWarpKeys + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    auto load_q_fragment = [&](int step, unsigned (&a)[4]) {
      ptx::ldmatrix_x4(a, shared + swizzled_step<kHeadTile * 2>(q_offset, 0, step * 2));
    };
#pragma unroll
    for (int step = 0; step < kRowBytes / 32; step++) {  // of 32 bytes: 16 or 32 columns
      if (step * 32 >= head_size * int(sizeof(KV))) break;
      unsigned a[2][4];
      if constexpr (sizeof(KV) == 2) {
        load_q_fragment(step, a[0]);
      } else {
        load_q_fragment(step * 2, a[0]);
        load_q_fragment(step * 2 + 1, a[1]);
      }
#pragma unroll
      for (int keys = 0; keys < kWarpKeys; keys += 16) {
        unsigned b[4];
        ptx::ldmatrix_x4(b, k + swizzled_step<kRowBytes>(k_offset, keys, step * 2));
        if constexpr (sizeof(KV) == 2) {
          mma_m16n8k16<T>(scores[keys / 8], a[0], b[0], b[1]);
          mma_m16n8k16<T>(scores[keys / 8 + 1], a[0], b[2], b[3]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            unsigned pairs[2];
            decode<T, KV>(b[i], pairs);
            mma_m16n8k16<T>(scores[keys / 8 + i / 2], a[i % 2], pairs[0], pairs[1]);
          }
        }
      }
    }
  }

  // Turns scores into weights relative to the running maximum and rescales what was accumulated under the old one.
  DEVICE void update_softmax(int tile, bool masked, float factor, float (&scores)[kWarpKeys / 8][4]) {
    constexpr float kLog2e = 1.4426950408889634f;
    float cap = work.softcap(), cap_factor = cap > 0 ? factor / cap : 0;
    factor *= kLog2e;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unsigned bits[kWords];
      if (masked) visible_bits(tile, half, bits);
      float highest = maximum[half];
#pragma unroll
      for (int i = 0; i < kWarpKeys / 8; i++)
#pragma unroll
        for (int j = half * 2; j < half * 2 + 2; j++) {
          float x = scores[i][j];
          if (cap > 0) {
            float e = ptx::exp2_approx(2 * kLog2e * cap_factor * x);
            x = cap * kLog2e * (1 - 2 * ptx::rcp_approx(e + 1));
          } else {
            x *= factor;
          }
          if (masked) {
            int key = warp_n * kWarpKeys + i * 8 + lane % 4 * 2 + j % 2;
            unsigned word = kWords == 1 || key < 32 ? bits[0] : bits[kWords - 1];
            if (!(word >> (key & 31) & 1)) x = -INFINITY;
          }
          scores[i][j] = x;
          highest = fmaxf(highest, x);
        }
      highest = quad_max(highest);
      float shift = shift_of(highest), decay = ptx::exp2_approx(maximum[half] - shift);
      float total = 0;
#pragma unroll
      for (int i = 0; i < kWarpKeys / 8; i++)
#pragma unroll
        for (int j = half * 2; j < half * 2 + 2; j++) total += scores[i][j] = ptx::exp2_approx(scores[i][j] - shift);
      sum[half] = sum[half] * decay + total;
      maximum[half] = highest;
#pragma unroll
      for (int i = 0; i < kHeadTile / 8; i++) out[i][half * 2] *= decay, out[i][half * 2 + 1] *= decay;
    }
  }

  // The mma fragments of 32 bytes of V's columns and 16 keys: of 2 accumulator tiles, or of 4 for 8-bit values (columns
  // 0, 2, 4, ... of 16, then 1, 3, 5, ...).
  template <class KV>
  static constexpr int kStepTiles = 4 / int(sizeof(KV));
  template <class KV>
  DEVICE void load_v(const char* v, int step, int keys, unsigned (&b)[kStepTiles<KV>][2]) {
    constexpr int kRowBytes = kHeadTile * int(sizeof(KV));
    int offset = swizzled<kRowBytes>(warp_n * kWarpKeys + lane / 8 % 2 * 8 + lane % 8, lane / 16);
    unsigned loaded[4];
    ptx::ldmatrix_x4_trans(loaded, v + swizzled_step<kRowBytes>(offset, keys, step * 2));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (sizeof(KV) == 2) {
        b[i / 2][i % 2] = loaded[i];
      } else {
        unsigned pairs[2];
        decode<T, KV>(ptx::prmt(loaded[i], 0, 0x3120), pairs);
        b[i / 2 * 2][i % 2] = pairs[0], b[i / 2 * 2 + 1][i % 2] = pairs[1];
      }
    }
  }

  // out += weights V. Of a masked tile, NaN and infinite values are left out and reported.
  template <class KV>
  DEVICE bool multiply_weights_v(const char* v, bool masked, const unsigned (&weights)[kWarpKeys / 16][4]) {
    int value_bytes = work.value_size() * int(sizeof(KV));
    bool nonfinite = false;
#pragma unroll
    for (int step = 0; step < kHeadTile * int(sizeof(KV)) / 32; step++) {
      if (step * 32 >= value_bytes) break;
#pragma unroll
      for (int keys = 0; keys < kWarpKeys; keys += 16) {
        unsigned b[kStepTiles<KV>][2];
        load_v<KV>(v, step, keys, b);
        if (masked && !std::is_same_v<KV, int8_t>)
#pragma unroll
          for (int i = 0; i < kStepTiles<KV> * 2; i++) nonfinite |= drop_nonfinite<T>(b[i / 2][i % 2]);
#pragma unroll
        for (int i = 0; i < kStepTiles<KV>; i++)
          mma_m16n8k16<T>(out[step * kStepTiles<KV> + i], weights[keys / 16], b[i][0], b[i][1]);
      }
    }
    return nonfinite;
  }

  // Adds the NaN and infinite values of a masked tile to the rows that see them (weights of zero would spread them to
  // all). The tensor core counts them per row and column: NaN in ones, inf in 128s, -inf in 16384s.
  template <class KV>
  DEVICE void add_nonfinite(int tile, const char* v) {
    unsigned seen[kWarpKeys / 16][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unsigned bits[kWords];
      visible_bits(tile, half, bits);
#pragma unroll
      for (int i = 0; i < kWarpKeys / 8; i++) {
        int key = warp_n * kWarpKeys + i * 8 + lane % 4 * 2;
        unsigned word = (kWords == 1 || key < 32 ? bits[0] : bits[kWords - 1]) >> (key & 31);
        seen[i / 2][i % 2 * 2 + half] = pack<T>(float(word & 1), float(word >> 1 & 1));
      }
    }
    auto code = [](float x) { return isnan(x) ? 1.f : isinf(x) ? (x > 0 ? 128.f : 16384.f) : 0.f; };
#pragma unroll
    for (int step = 0; step < kHeadTile * int(sizeof(KV)) / 32; step++) {
      if (step * 32 >= work.value_size() * int(sizeof(KV))) break;
      float counts[kStepTiles<KV>][4] = {};
#pragma unroll
      for (int keys = 0; keys < kWarpKeys; keys += 16) {
        unsigned b[kStepTiles<KV>][2];
        load_v<KV>(v, step, keys, b);
#pragma unroll
        for (int i = 0; i < kStepTiles<KV>; i++)
          mma_m16n8k16<T>(counts[i], seen[keys / 16], pack<T>(code(unpack<T>(b[i][0], 0)), code(unpack<T>(b[i][0], 1))),
                          pack<T>(code(unpack<T>(b[i][1], 0)), code(unpack<T>(b[i][1], 1))));
      }
#pragma unroll
      for (int i = 0; i < kStepTiles<KV>; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          int count = int(counts[i][j]);
          if (count & 127) out[step * kStepTiles<KV> + i][j] = NAN;
          if (count >> 7 & 127) out[step * kStepTiles<KV> + i][j] += INFINITY;
          if (count >> 14) out[step * kStepTiles<KV> + i][j] -= INFINITY;
        }
    }
  }

  // Tiles first .. last - 1, stored as KV. Starts and ends with all threads past a barrier and no copy in flight.
  template <class KV>
  DEVICE void attend(int first, int last, float factor) {
    constexpr int kBuffers = Tiles::template kBuffers<KV>, kBufferBytes = Tiles::template kBufferBytes<KV>;
    if (first >= last) return;
    int load = 0, loads = (last - first) * 2, ring_slot = 0;  // loads: K and V tiles in turn
    auto issue = [&] {
      if (load < loads) {
        this->template copy_tile<KV>(first + load / 2, load % 2, shared + kRing + ring_slot * kBufferBytes);
        if (load % 2) place_keys(first + load / 2 + 1, last);
      }
      ptx::cp_async_commit();
      load++;
      ring_slot = ring_slot + 1 == kBuffers ? 0 : ring_slot + 1;
    };

    this->template load_q<KV>();
    if (thread < kKeys) entry = work.table_entry(first, thread);
    place_keys(first, last);
    for (int i = 0; i < kBuffers - 1; i++) {
      if (i % 2 == 0) __syncthreads();
      issue();
    }
    prepare_rows(first);

    auto next_buffer = [&]() -> const char* {
      ptx::cp_async_wait<kBuffers - 2>();
      __syncthreads();
      issue();
      return shared + kRing + ring_slot * kBufferBytes;  // the oldest: the next to be overwritten
    };
    for (int tile = first; tile < last; tile++) {
      const char* k = next_buffer();
      bool masked = needs_mask(tile);
      float scores[kWarpKeys / 8][4] = {};
      if (has_rows) {
        multiply_q_k<KV>(k, scores);
        update_softmax(tile, masked, factor, scores);
      }
      unsigned weights[kWarpKeys / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpKeys / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          weights[i][j] = pack<T>(scores[i * 2 + j / 2][j % 2 * 2], scores[i * 2 + j / 2][j % 2 * 2 + 1]);

      const char* v = next_buffer();
      if (tile + 1 < last) prepare_rows(tile + 1);
      if (has_rows) {
        bool nonfinite = multiply_weights_v<KV>(v, masked, weights);
        if constexpr (!std::is_same_v<KV, int8_t>)
          if (masked && __any_sync(0xffffffffu, nonfinite)) add_nonfinite<KV>(tile, v);
      }
    }
    ptx::cp_async_wait_all();
    __syncthreads();
  }

  // Brings the accumulators from the order of 8-bit values to that of 16-bit ones, scaled.
  DEVICE void to_16_bit_order(float scale) {
#pragma unroll
    for (int i = 0; i < kHeadTile / 8; i += 2)
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        float moved[2][2];
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
          int source = lane / 4 * 4 + tile * 2 + lane % 4 / 2;
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float low = __shfl_sync(0xffffffffu, out[i + e][half], source);
            float high = __shfl_sync(0xffffffffu, out[i + e][half + 1], source);
            moved[tile][e] = scale * (lane % 2 ? high : low);
          }
        }
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
          out[i + tile][half] = moved[tile][0], out[i + tile][half + 1] = moved[tile][1];
      }
  }

  // Joins the warps that share rows, in order, and writes the result or, with several splits, the partial result.
  DEVICE void write(Partials partials) {
    constexpr float kLn2 = 0.6931471805599453f;
    constexpr int kStride = kHeadTile + 8;
    const Shared<float> result = shared_array<float>(0, kWarpsN * kRowTile * kStride);
    const Shared<float2> states = shared_array<float2>(kWarpsN * kRowTile * kStride * 4, kWarpsN * kRowTile);
    int value_size = work.value_size();

#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = warp_m * 16 + half * 8 + lane / 4;
      sum[half] = quad_sum(sum[half]);
      if (is_padding(half)) sum[half] = 0;
      if (lane % 4 == 0) states[warp_n * kRowTile + row] = make_float2(maximum[half] * kLn2, sum[half]);
    }
    __syncthreads();
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = warp_m * 16 + half * 8 + lane / 4, global_row = work.row0 + row;
      float m = -INFINITY, l = 0;
      for (int n = 0; n < kWarpsN; n++) {
        float2 state = states[n * kRowTile + row];
        if (state.y != 0) m = fmaxf(m, state.x);
      }
      for (int n = 0; n < kWarpsN; n++) {
        float2 state = states[n * kRowTile + row];
        float weight = state.y == 0 ? 0.f : expf(shift_of(state.x) - shift_of(m));
        l += weight * state.y;
        if (n == warp_n) factor[half] = weight;
      }
      bool writer = lane % 4 == 0 && warp_n == 0 && global_row < work.rows;
      if (work.splits > 1) {
        if (writer) partials.state[work.partial_row(global_row)] = make_float2(is_padding(half) ? NAN : m, l);
      } else if (global_row < work.rows) {
        float lse, sink = is_padding(half) ? -INFINITY : work.sink(global_row);
        factor[half] *= finish_row(m, l, sink, lse);
        if (writer) *work.lse_at(global_row) = lse;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int at = (warp_n * kRowTile + warp_m * 16 + half * 8 + lane / 4) * kStride + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kHeadTile / 8; i++) {
        float2 mine = make_float2(factor[half] * out[i][half * 2], factor[half] * out[i][half * 2 + 1]);
        if (sum[half] == 0) mine = make_float2(0, 0);  // a row that saw nothing, or padding
        result.store(at + i * 8, mine);
      }
    }
    __syncthreads();
    for (int i = thread; i < kRowTile * value_size / 4; i += kThreads) {
      int row = i * 4 / value_size, column = i * 4 % value_size, global_row = work.row0 + row;
      if (global_row >= work.rows) break;
      float4 x = result.template load<float4>(row * kStride + column);
      for (int n = 1; n < kWarpsN; n++) {
        float4 other = result.template load<float4>((n * kRowTile + row) * kStride + column);
        x.x += other.x, x.y += other.y, x.z += other.z, x.w += other.w;
      }
      if (work.splits > 1) {
        *reinterpret_cast<float4*>(partials.out + work.partial_row(global_row) * value_size + column) = x;
      } else {
        T* to = work.template out_at<T>(global_row, column);
        *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(x.x, x.y), pack<T>(x.z, x.w));
      }
    }
  }
};

}  // namespace torch_kernels
