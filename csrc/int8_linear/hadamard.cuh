// SPDX-License-Identifier: Apache-2.0
// The Hadamard transform of rows, in float32: y = x H with H = H_base (x) H_power, base 1, 12 or 20, power a power of
// two in Sylvester's order. Both factors are symmetric.
//
// A thread takes elements from global memory and transforms those index bits that its registers span. In short rows
// the few bits left are those of neighbouring lanes, which exchange values. Longer rows go through shared memory to
// threads whose registers span other bits, up to five at a time, until all are done: a trip costs as much as the
// exchange of two bits. The last threads write.
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
  const float* signs;    // [n], multiplies x; or null
  const float* smooth;   // [n], divides the result; or null
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
  static constexpr int kLaneBits = 2;  // at most, of a short row

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

  // Where values[i] lies in the piece when it comes from memory.
  DEVICE int first_position(int i) const { return (i / kWide << work.power) + thread * kWide + i % kWide; }

  // The bits of the base and the lowest ones.
  DEVICE void first_pass() {
    if (work.x.dtype == DType::float16)
      load<__half>();
    else if (work.x.dtype == DType::bfloat16)
      load<__nv_bfloat16>();
    else
      load<float>();
    if (work.signs) {
      bool aligned = reinterpret_cast<uint64_t>(work.signs) % 16 == 0;
#pragma unroll
      for (int b = 0; b < kBase; b++) {
        Pack<float, kWide> signs;
        signs.load(work.signs + column + first_position(b * kWide), kWide, aligned);
#pragma unroll
        for (int i = 0; i < kWide; i++) values[b * kWide + i] *= signs[i];
      }
    }
#pragma unroll
    for (int b = 0; b < kBase; b++) transform_base<kWide, 1>(values, b * kWide);
#pragma unroll
    for (int i = 0; i < kWide; i++) transform_base<kBase, kWide>(values, i);
  }

  // The bits in which lanes of a short row differ.
  DEVICE void lane_pass() {
#pragma unroll 1
    for (int step = 1; step < int(blockDim.x); step *= 2)
#pragma unroll
      for (int i = 0; i < kElements; i++) {
        float other = __shfl_xor_sync(0xffffffffu, values[i], step);
        values[i] = thread & step ? other - values[i] : values[i] + other;
      }
    finish<kWide>([&](int i) { return first_position(i); });
  }

  DEVICE void to_shared() const {
#pragma unroll
    for (int i = 0; i < kElements; i += 4)
      shared.store(place(first_position(i)), make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
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

  template <int kStart, int kCount>
  DEVICE void last_pass() {
    pass<kStart, kCount>();
    finish<kAdjacent<kStart, kCount>>([&](int i) {
      return first_element<kStart, kCount>(i >> kBits) + element<kStart, kCount>(i & ((1 << kBits) - 1));
    });
  }

  // Scales and writes. values[i] to values[i + kStep - 1], i a multiple of kStep, are neighbours in the piece, the
  // first one at position(i).
  template <int kStep, class Position>
  DEVICE void finish(Position position) {
#pragma unroll
    for (int i = 0; i < kElements; i++) values[i] *= work.factor;
    if constexpr (kQuantize) {
      if (work.smooth) {
#pragma unroll
        for (int i = 0; i < kElements; i++)
          values[i] = __fdiv_rn(values[i], work.smooth[column + position(i / kStep * kStep) + i % kStep]);
      }
      write_integers<kStep>(position);
    } else if (work.out.dtype == DType::float16) {
      write_floats<kStep, __half>(position);
    } else if (work.out.dtype == DType::bfloat16) {
      write_floats<kStep, __nv_bfloat16>(position);
    } else {
      write_floats<kStep, float>(position);
    }
  }

  template <int kStep, class T, class Position>
  DEVICE void write_floats(Position position) const {
    T* to = work.out.at<T>() + piece * length;
    if (!live) return;
#pragma unroll
    for (int i = 0; i < kElements; i += kStep) {
      unsigned words[kStep];
#pragma unroll
      for (int j = 0; j < kStep; j++) {
        if constexpr (sizeof(T) == 4)
          words[j] = __float_as_uint(values[i + j]);
        else if (j % 2 == 0)
          words[j / 2] = pack<T>(values[i + j], kStep > 1 ? values[i + j + (kStep > 1)] : 0.f);
      }
      store_words<kStep* int(sizeof(T))>(to + position(i), words);
    }
  }

  template <int kStep, class Position>
  DEVICE void write_integers(Position position) const {
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < kElements; i++) largest = max(largest, magnitude_bits(values[i]));
    size_t warps = max(blockDim.x * blockDim.y / 32, 1u);
    largest = row_maximum(largest, shared_array<unsigned>(blockDim.y * row_words(work.power) * 4, warps));
    float scale = row_scale(largest, work.x_scale, work.levels);
    if (!live) return;
    if (thread == 0) work.scale[row] = scale;
    RowSteps steps(scale, work.levels);
    int8_t* to = work.out.at<int8_t>() + piece * length;
#pragma unroll
    for (int i = 0; i < kElements; i += kStep) {
      unsigned words[(kStep + 3) / 4];
      if constexpr (kStep >= 4) {
#pragma unroll
        for (int j = 0; j < kStep; j += 4)
          words[j / 4] = pack_bytes(steps(values[i + j]), steps(values[i + j + 1]), steps(values[i + j + 2]),
                                    steps(values[i + j + 3]));
      } else {
        words[0] = steps(values[i]);
        if constexpr (kStep == 2) words[0] = ptx::prmt(words[0], steps(values[i + 1]), 0x0040);
      }
      store_words<kStep>(to + position(i), words);
    }
  }

  DEVICE void run() {
    first_pass();
    if (work.power <= kWideBits + kLaneBits) return lane_pass();
    to_shared();
    if constexpr (kPower) {
      if (work.power > 8) middle_pass<3>();
      switch (work.power) {
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
