// SPDX-License-Identifier: Apache-2.0
// The Hadamard transform of rows, in float32: y = x H with H = H_base (x) H_power, base 1, 12 or 20, power a power of
// two in Sylvester's order. Both factors are symmetric.
//
// A thread takes elements from global memory, transforms those index bits that its registers span, and the row goes
// through shared memory to threads whose registers span other bits, until all are done; the last ones write.
#pragma once
#include "int8_linear/rows.cuh"

namespace torch_kernels {

// Whether an entry of the base matrix of order q + 1 is -1. Paley's first construction made symmetric: row and column 0
// are 1, the others -chi(i + j), with -1 where i + j = 0 modulo q.
template <int kOrder>
HOST_DEVICE constexpr bool base_negative(int i, int j) {
  static_assert(kOrder == 12 || kOrder == 20);
  constexpr int q = kOrder - 1;
  constexpr unsigned squares =
      kOrder == 12 ? 1u << 1 | 1u << 3 | 1u << 4 | 1u << 5 | 1u << 9
                   : 1u << 1 | 1u << 4 | 1u << 5 | 1u << 6 | 1u << 7 | 1u << 9 | 1u << 11 | 1u << 16 | 1u << 17;
  return i > 0 && j > 0 && ((squares | 1u) >> (i + j - 2) % q & 1);
}

struct RotateWork {
  Tensor x;              // [M, n], last stride 1
  Tensor out;            // [M, n], contiguous: floats, or int8 when quantised
  int pieces;            // of a row, each transformed by itself
  int power;             // a piece has kBase << power elements
  float factor;          // multiplies the transform
  Tensor signs;          // [n], multiplies x; or absent
  Tensor smooth;         // [n], divides the result; or absent
  float* scale;          // [M], when quantised
  const float* x_scale;  // the scale of every row; or null
  int levels;            // the largest integer
  bool aligned;          // whether rows of x suit 16-byte loads
};

// y[j] = sum over i of +-x[i], in registers; stride and count in elements of a flat array.
template <int kOrder, int kStride, class Values>
DEVICE void transform_base(Values& values, int first) {
  if constexpr (kOrder == 12 || kOrder == 20) {
    float sums[kOrder];
#pragma unroll
    for (int i = 0; i < kOrder; i++) {
      sums[i] = values[first];
#pragma unroll
      for (int j = 1; j < kOrder; j++) {
        float x = values[first + j * kStride];
        sums[i] = base_negative<kOrder>(i, j) ? sums[i] - x : sums[i] + x;
      }
    }
#pragma unroll
    for (int i = 0; i < kOrder; i++) values[first + i * kStride] = sums[i];
  } else {
#pragma unroll
    for (int bit = 1; bit < kOrder; bit *= 2)
#pragma unroll
      for (int i = 0; i < kOrder; i++)
        if (!(i & bit)) {
          float &a = values[first + i * kStride], &b = values[first + (i | bit) * kStride], sum = a + b;
          b = a - b, a = sum;
        }
  }
}

// kBytes of packed words to memory that is aligned to as much, or to 16 bytes.
template <int kBytes>
DEVICE void store_words(void* to, const unsigned* words) {
  if constexpr (kBytes == 1)
    *static_cast<uint8_t*>(to) = uint8_t(words[0]);
  else if constexpr (kBytes == 2)
    *static_cast<uint16_t*>(to) = uint16_t(words[0]);
  else if constexpr (kBytes == 4)
    *static_cast<unsigned*>(to) = words[0];
  else if constexpr (kBytes == 8)
    *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  else
#pragma unroll
    for (int i = 0; i < kBytes / 4; i += 4)
      static_cast<uint4*>(to)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
}

// kBase is 12, 20, or 4 for powers of two, whose two highest bits are then the base. A thread holds kElements elements:
// first kWide adjacent ones for each index of the base, later kTasks times 2^kBits.
template <int kBase, bool kQuantize>
struct RotateBlock {
  static constexpr bool kPower = kBase == 4;
  static constexpr int kWide = kPower ? 8 : 4, kWideBits = kPower ? 3 : 2, kElements = kBase * kWide;
  static constexpr int kBits = kPower ? 5 : 4, kTasks = kElements >> kBits;

  // Where element i lies in shared memory: shifts that keep the accesses below free of bank conflicts. Additive for
  // indices that share no bit.
  HOST_DEVICE static constexpr int place(int i) { return kPower ? i + (i >> 5) * 4 + (i >> 8) * 8 : i + (i >> 6) * 4; }
  HOST_DEVICE static constexpr int row_words(int power) { return place(kBase << power) + 4; }

  const RotateWork& work;
  const int thread = threadIdx.x, length = kBase << work.power;
  const int64_t piece = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = piece < work.x.size[0] * work.pieces;
  const int64_t row = live ? piece / work.pieces : 0;
  const int column = live ? int(piece % work.pieces) * length : 0;  // of the piece's first element
  const Shared<float> shared = shared_array<float>(threadIdx.y * row_words(work.power) * 4, row_words(work.power));
  float values[kElements];

  DEVICE explicit RotateBlock(const RotateWork& w) : work(w) {}

  template <class T>
  DEVICE void load() {
    const T* from = work.x.at<const T>(row, column);
    Pack<T, kWide> packs[kBase];
#pragma unroll
    for (int b = 0; b < kBase; b++)
      packs[b].load(from + (int64_t(b) << work.power) + thread * kWide, live ? kWide : 0, work.aligned);
#pragma unroll
    for (int b = 0; b < kBase; b++)
#pragma unroll
      for (int i = 0; i < kWide; i++) values[b * kWide + i] = packs[b][i];
  }

  // The bits of the base and the lowest ones.
  DEVICE void first_pass() {
    if (work.x.dtype == DType::float16)
      load<__half>();
    else if (work.x.dtype == DType::bfloat16)
      load<__nv_bfloat16>();
    else
      load<float>();
    if (work.signs) {
#pragma unroll
      for (int i = 0; i < kElements; i++) {
        int at = column + (i / kWide << work.power) + thread * kWide + i % kWide;
        values[i] *= load_float(work.signs.data, work.signs.dtype, at * work.signs.stride[0]);
      }
    }
#pragma unroll
    for (int b = 0; b < kBase; b++) transform_base<kWide, 1>(values, b * kWide);
#pragma unroll
    for (int i = 0; i < kWide; i++) transform_base<kBase, kWide>(values, i);
#pragma unroll
    for (int i = 0; i < kElements; i += 4)
      shared.store(place((i / kWide << work.power) + thread * kWide + i % kWide),
                   make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
    __syncthreads();
  }

  // A pass over bits kStart .. kStart + kCount - 1. Registers also span the lowest bits where that leaves some over.
  // Element r of a task is at first_element + element(r).
  template <int kStart, int kCount>
  static constexpr int kAdjacent = 1 << (kBits - kCount);
  template <int kStart, int kCount>
  HOST_DEVICE static constexpr int element(int r) {
    constexpr int kLow = kBits - kCount;
    return (r & ((1 << kLow) - 1)) + (r >> kLow << kStart);
  }
  template <int kStart, int kCount>
  DEVICE int first_element(int task) const {
    constexpr int kLow = kBits - kCount;
    static_assert(kLow <= kStart);
    int id = thread + task * int(blockDim.x);
    return ((id & ((1 << (kStart - kLow)) - 1)) << kLow) + (id >> (kStart - kLow) << (kStart + kCount));
  }

  template <int kStart, int kCount>
  DEVICE void pass() {
    constexpr int kStep = kAdjacent<kStart, kCount> < 4 ? kAdjacent<kStart, kCount> : 4;
#pragma unroll
    for (int task = 0; task < kTasks; task++) {
      int from = place(first_element<kStart, kCount>(task)), to = task << kBits;
#pragma unroll
      for (int r = 0; r < 1 << kBits; r += kStep) {
        int at = from + place(element<kStart, kCount>(r));
        if constexpr (kStep == 4) {
          float4 four = shared.template load<float4>(at);
          values[to + r] = four.x, values[to + r + 1] = four.y, values[to + r + 2] = four.z,
                      values[to + r + 3] = four.w;
        } else if constexpr (kStep == 2) {
          float2 two = shared.template load<float2>(at);
          values[to + r] = two.x, values[to + r + 1] = two.y;
        } else {
          values[to + r] = shared[at];
        }
      }
#pragma unroll
      for (int low = 0; low < kAdjacent<kStart, kCount>; low++)
        transform_base<(1 << kCount), kAdjacent<kStart, kCount>>(values, to + low);
    }
  }

  template <int kStart>
  DEVICE void middle_pass() {
    pass<kStart, kBits>();
#pragma unroll
    for (int task = 0; task < kTasks; task++) {
      int to = place(first_element<kStart, kBits>(task));
#pragma unroll
      for (int r = 0; r < 1 << kBits; r++) shared[to + place(element<kStart, kBits>(r))] = values[(task << kBits) + r];
    }
    __syncthreads();
  }

  template <int kStart, int kCount, class T>
  DEVICE void write_floats() {
    constexpr int kStep = kAdjacent<kStart, kCount>;
    T* to = work.out.at<T>() + piece * length;
    if (!live) return;
#pragma unroll
    for (int task = 0; task < kTasks; task++)
#pragma unroll
      for (int r = 0; r < 1 << kBits; r += kStep) {
        const float* value = values + (task << kBits) + r;
        unsigned words[kStep];
#pragma unroll
        for (int i = 0; i < kStep; i++) {
          if constexpr (sizeof(T) == 4)
            words[i] = __float_as_uint(value[i]);
          else if (i % 2 == 0)
            words[i / 2] = pack<T>(value[i], kStep > 1 ? value[i + (kStep > 1)] : 0.f);
        }
        store_words<kStep* int(sizeof(T))>(to + first_element<kStart, kCount>(task) + element<kStart, kCount>(r),
                                           words);
      }
  }

  template <int kStart, int kCount>
  DEVICE void write_integers() {
    constexpr int kStep = kAdjacent<kStart, kCount>;
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < kElements; i++) largest = max(largest, magnitude_bits(values[i]));
    int warps = int(blockDim.x * blockDim.y) / 32;
    largest = row_maximum(
        largest, shared_array<unsigned>(blockDim.y * row_words(work.power) * 4, size_t(warps > 0 ? warps : 1)));
    float scale = row_scale(largest, work.x_scale, work.levels);
    if (!live) return;
    if (thread == 0) work.scale[row] = scale;
    RowSteps steps(scale, work.levels);
    int8_t* to = work.out.at<int8_t>() + piece * length;
#pragma unroll
    for (int task = 0; task < kTasks; task++)
#pragma unroll
      for (int r = 0; r < 1 << kBits; r += kStep) {
        const float* value = values + (task << kBits) + r;
        unsigned words[(kStep + 3) / 4];
        if constexpr (kStep >= 4) {
#pragma unroll
          for (int i = 0; i < kStep; i += 4)
            words[i / 4] = pack_bytes(steps(value[i]), steps(value[i + 1]), steps(value[i + 2]), steps(value[i + 3]));
        } else {
          words[0] = steps(value[0]);
          if constexpr (kStep == 2) words[0] = ptx::prmt(words[0], steps(value[1]), 0x0040);
        }
        store_words<kStep>(to + first_element<kStart, kCount>(task) + element<kStart, kCount>(r), words);
      }
  }

  template <int kStart, int kCount>
  DEVICE void last_pass() {
    pass<kStart, kCount>();
#pragma unroll
    for (int i = 0; i < kElements; i++) values[i] *= work.factor;
    if constexpr (kQuantize) {
      if (work.smooth) {
#pragma unroll
        for (int i = 0; i < kElements; i++) {
          int at = column + first_element<kStart, kCount>(i >> kBits) + element<kStart, kCount>(i & ((1 << kBits) - 1));
          values[i] = __fdiv_rn(values[i], load_float(work.smooth.data, work.smooth.dtype, at * work.smooth.stride[0]));
        }
      }
      write_integers<kStart, kCount>();
    } else if (work.out.dtype == DType::float16) {
      write_floats<kStart, kCount, __half>();
    } else if (work.out.dtype == DType::bfloat16) {
      write_floats<kStart, kCount, __nv_bfloat16>();
    } else {
      write_floats<kStart, kCount, float>();
    }
  }

  DEVICE void run() {
    first_pass();
    if constexpr (kPower) {
      if (work.power > 8) middle_pass<3>();
      switch (work.power) {
        case 5: return last_pass<3, 2>();
        case 6: return last_pass<3, 3>();
        case 7: return last_pass<3, 4>();
        case 8: return last_pass<3, 5>();
        case 9: return last_pass<8, 1>();
        case 10: return last_pass<8, 2>();
        case 11: return last_pass<8, 3>();
        case 12: return last_pass<8, 4>();
        case 13: return last_pass<8, 5>();
      }
    } else {
      if (work.power > 6) middle_pass<2>();
      if (work.power > 10) middle_pass<6>();
      switch (work.power) {
        case 4: return last_pass<2, 2>();
        case 5: return last_pass<2, 3>();
        case 6: return last_pass<2, 4>();
        case 7: return last_pass<6, 1>();
        case 8: return last_pass<6, 2>();
        case 9: return last_pass<6, 3>();
        case 10: return last_pass<6, 4>();
        case 11: return last_pass<10, 1>();
      }
    }
  }
};

}  // namespace torch_kernels
