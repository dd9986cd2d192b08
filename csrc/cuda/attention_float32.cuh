// SPDX-License-Identifier: Apache-2.0
// Attention for float32 queries over one split of the keys: IEEE multiply-adds, no TF32. Simple rather than fast: a
// block of 16 rows, 8 threads a row, and tiles of 32 keys that are decoded into shared memory as float32.
//
// `Work` is that of cuda/key_tiles.cuh, and says what multiplies stored keys and values: factor(tile, is_v). `Row` is
// one row of it, as each of its threads sees it:
//   start(row)                        after Q has been copied; all threads call it
//   turn_queries(tile, q, stride)     before the tile is met, while nobody reads Q; all threads call it
//   visible(tile, present)            those of the tile's keys, as bits, that the row sees
//   is_padding()
#pragma once
#include "core/tensor.h"
#include "cuda/launch.cuh"
#include "cuda/softmax.cuh"

namespace torch_kernels {

struct Float32Attention {
  static constexpr int kRows = 16, kKeys = 32, kThreads = 128, kRowThreads = kThreads / kRows, kMaxHead = 256;

  // Floats in a row of Q, K or V; rows next to each other start in different banks.
  static constexpr HOST_DEVICE int stride_of(int head_tile) { return head_tile + 4; }
  // Byte offsets in shared memory.
  static constexpr HOST_DEVICE int places_of(int stride) {
    return (kRows + 2 * kKeys) * stride * 4 + kRows * kKeys * 4;
  }
  static constexpr HOST_DEVICE int shared_bytes(int stride) { return places_of(stride) + kKeys * 8 + 4; }

  DEVICE static float stored_value(const void* data, DType dtype, int64_t i) {
    if (dtype == DType::float32) return static_cast<const float*>(data)[i];
    if (dtype == DType::int8) return static_cast<const int8_t*>(data)[i];
    return float(static_cast<const __nv_fp8_e4m3*>(data)[i]);
  }

  // Decodes a tile of K or V to shared memory rows of `stride` floats; keys that do not exist become zeros.
  DEVICE static void copy_tile(const Tensor& from, int head, float factor, const Shared<int2>& places,
                               const Shared<float>& to, int stride) {
    int columns = int(from.size[3]);
    for (int i = threadIdx.x; i < kKeys * columns; i += kThreads) {
      int key = i / columns, column = i % columns;
      int2 place = places[key];
      int64_t at = place.x * from.stride[0] + place.y * from.stride[1] + head * from.stride[2] + column;
      to[key * stride + column] = place.x >= 0 ? factor * stored_value(from.data, from.dtype, at) : 0.f;
    }
  }

  template <class Work, class Row>
  DEVICE static void run(Work& work, Row& row_state, int stride, double scale, const Partials& partials) {
    const int thread = threadIdx.x, row = thread / kRowThreads, column = thread % kRowThreads * 4;
    const int head_size = int(work.q().size[3]), value_size = work.value_size();
    const double softcap = work.softcap();

    const Shared<float> q = shared_array<float>(0, kRows * stride),
                        k = shared_array<float>(kRows * stride * 4, kKeys * stride);
    const Shared<float> v = shared_array<float>((kRows + kKeys) * stride * 4, kKeys * stride);
    const Shared<float> weights = shared_array<float>((kRows + 2 * kKeys) * stride * 4, kRows * kKeys);
    const Shared<int2> places = shared_array<int2>(places_of(stride), kKeys);
    const Shared<unsigned> present = shared_array<unsigned>(places_of(stride) + kKeys * 8, 1);

    for (int i = thread; i < kRows * head_size; i += kThreads) {
      int r = work.row0 + i / head_size;
      q[i / head_size * stride + i % head_size] = r < work.rows ? *work.template q_at<float>(r, i % head_size) : 0.f;
    }
    __syncthreads();
    int global_row = work.row0 + row;
    row_state.start(global_row);

    float maximum = -INFINITY, sum = 0, out[kMaxHead / 4 / kRowThreads][4] = {};
    for (int tile = 0; tile < work.tiles; tile++) {
      row_state.turn_queries(tile, q, stride);
      if (thread < kKeys) {
        int2 place = work.place(tile, thread, work.table_entry(tile, thread));
        places[thread] = place;
        unsigned exist = __ballot_sync(0xffffffffu, place.x >= 0);
        if (thread == 0) present[0] = exist;
      }
      __syncthreads();
      copy_tile(work.source(tile, false), work.head, work.factor(tile, false), places, k, stride);
      copy_tile(work.source(tile, true), work.head, work.factor(tile, true), places, v, stride);
      unsigned bits = row_state.visible(tile, present[0]);
      __syncthreads();

      float scores[kKeys / kRowThreads] = {}, highest = maximum;
      for (int d = 0; d < head_size; d += 4) {
        float4 a = q.load<float4>(row * stride + d);
#pragma unroll
        for (int i = 0; i < kKeys / kRowThreads; i++) {
          float4 b = k.load<float4>((thread % kRowThreads + i * kRowThreads) * stride + d);
          scores[i] = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, scores[i]))));
        }
      }
#pragma unroll
      for (int i = 0; i < kKeys / kRowThreads; i++) {
        float x = scores[i] * scale;
        if (softcap > 0) x = softcap * tanhf(x / softcap);
        scores[i] = bits >> (thread % kRowThreads + i * kRowThreads) & 1 ? x : -INFINITY;
        highest = fmaxf(highest, scores[i]);
      }
      for (int lane = 1; lane < kRowThreads; lane *= 2)
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, lane));
      float shift = shift_of(highest), decay = expf(maximum - shift), total = 0;
#pragma unroll
      for (int i = 0; i < kKeys / kRowThreads; i++) {
        float weight = expf(scores[i] - shift);
        weights[row * kKeys + thread % kRowThreads + i * kRowThreads] = weight;
        total += weight;
      }
      for (int lane = 1; lane < kRowThreads; lane *= 2) total += __shfl_xor_sync(0xffffffffu, total, lane);
      maximum = highest, sum = sum * decay + total;
      __syncwarp();

#pragma unroll
      for (int i = 0; i < kMaxHead / 4 / kRowThreads; i++)
        for (int j = 0; j < 4; j++) out[i][j] *= decay;
      for (int key = 0; key < kKeys; key++) {
        if (!(bits >> key & 1)) continue;  // whatever is stored there
        float weight = weights[row * kKeys + key];
#pragma unroll
        for (int i = 0; i < kMaxHead / 4 / kRowThreads; i++) {
          if (column + i * kRowThreads * 4 >= value_size) break;
          float4 x = v.load<float4>(key * stride + column + i * kRowThreads * 4);
          out[i][0] = fmaf(weight, x.x, out[i][0]), out[i][1] = fmaf(weight, x.y, out[i][1]);
          out[i][2] = fmaf(weight, x.z, out[i][2]), out[i][3] = fmaf(weight, x.w, out[i][3]);
        }
      }
      __syncthreads();
    }

    if (global_row >= work.rows) return;
    if (row_state.is_padding()) sum = 0, maximum = NAN;
    float factor = 1;
    if (work.splits > 1) {
      if (column == 0) partials.state[work.partial_row(global_row)] = make_float2(maximum, sum);
    } else {
      float lse, sink = row_state.is_padding() ? -INFINITY : work.sink(global_row);
      factor = finish_row(row_state.is_padding() ? -INFINITY : maximum, sum, sink, lse);
      if (column == 0) *work.lse_at(global_row) = lse;
    }
    float* to = work.splits > 1 ? partials.out + work.partial_row(global_row) * value_size
                                : work.template out_at<float>(global_row, 0);
#pragma unroll
    for (int i = 0; i < kMaxHead / 4 / kRowThreads; i++) {
      int at = column + i * kRowThreads * 4;
      if (at >= value_size) break;
      bool seen = sum != 0;
      *reinterpret_cast<float4*>(to + at) =
          make_float4(seen ? factor * out[i][0] : 0.f, seen ? factor * out[i][1] : 0.f, seen ? factor * out[i][2] : 0.f,
                      seen ? factor * out[i][3] : 0.f);
    }
  }
};

}  // namespace torch_kernels
