// SPDX-License-Identifier: Apache-2.0
// The highest scores of each row, over all its heads, by radix select. A block has one row. Scores become integers of
// the same order, whose digits are counted from the highest on: each count tells which digit the last score to keep
// has, and how many of those that share it are still wanted. What remains are ties, of which the first are kept.
#include "cuda/dtypes.cuh"
#include "cuda/launch.cuh"
#include "sea/kernels.h"

namespace torch_kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int kThreadBins = kBins / kThreads;
constexpr int kBlocksPerProcessor = 4;  // left to itself the compiler takes 32 registers and spills

// An integer in the order of scores. NaN counts as -inf, -0 as +0.
template <class T>
struct OrderedKey {
  using Type = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  static constexpr int kBits = 8 * sizeof(T);
  static constexpr uint32_t kSign = 1u << (kBits - 1), kAll = uint32_t((uint64_t(1) << kBits) - 1);
  static constexpr uint32_t kInfinity = std::is_same_v<T, __half>          ? 0x7c00u
                                        : std::is_same_v<T, __nv_bfloat16> ? 0x7f80u
                                                                           : 0x7f800000u;
  static DEVICE Type of(T score) {
    uint32_t bits = same_bits<Type>(score), magnitude = bits & ~kSign;
    if (magnitude > kInfinity) bits = kSign | kInfinity;
    if (magnitude == 0) bits = 0;
    return Type(bits & kSign ? ~bits & kAll : bits | kSign);
  }
};

struct SelectShared {
  static constexpr int kCounts = 0, kSums = kCounts + kBins * 4, kFound = kSums + kWarps * 4, kKeys = kFound + 8;
};

// The sum over the threads after this one, and over all of them.
DEVICE int2 sums_from_behind(int own) {
  const Shared<int> sums = shared_array<int>(SelectShared::kSums, kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int suffix = own;
  for (int step = 1; step < 32; step *= 2) {
    int right = __shfl_down_sync(0xffffffffu, suffix, step);
    if (lane + step < 32) suffix += right;
  }
  if (lane == 0) sums[warp] = suffix;
  __syncthreads();
  int behind = suffix - own, all = 0;
  for (int i = 0; i < kWarps; i++) {
    int sum = sums[i];
    all += sum;
    if (i > warp) behind += sum;
  }
  return make_int2(behind, all);
}

template <class T, bool kCached>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) select_kernel(SeaSelectParams p, double wanted) {
  using Key = OrderedKey<T>;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int heads = int(p.scores.size[1]), num_cells = int(p.scores.size[3]), total = heads * num_cells;
  const int words = int(p.cells.size[2]), warp_words = (words + kWarps - 1) / kWarps;
  const int64_t batch = blockIdx.x / p.scores.size[2], row = blockIdx.x % p.scores.size[2];
  int32_t* to = p.cells.at<int32_t>(batch, row);
  const int64_t width = p.widths.index(batch, row);
  if (width <= 0) {
    for (int word = thread; word < words; word += kThreads) to[word] = 0;
    return;
  }

  const Shared<typename Key::Type> keys = shared_array<typename Key::Type>(SelectShared::kKeys, kCached ? total : 0);
  const T* scores = p.scores.at<const T>(batch, 0, row);
  auto key_at = [&](int i) -> uint32_t {
    if constexpr (kCached) return keys[i];
    return Key::of(scores[i / num_cells * p.scores.stride[1] + i % num_cells]);
  };
  if constexpr (kCached)
    for (int head = 0; head < heads; head++)
#pragma unroll 4
      for (int cell = thread; cell < num_cells; cell += kThreads)
        keys[head * num_cells + cell] = Key::of(scores[head * p.scores.stride[1] + cell]);

  // How many to keep, then how many of those that have the digits found so far.
  int keep = int(fmin(fmax(rint(wanted / double(width)), 1.), double(total)));
  const Shared<int> counts = shared_array<int>(SelectShared::kCounts, kBins),
                    found = shared_array<int>(SelectShared::kFound, 2);
  uint32_t prefix = 0;
  for (int high = Key::kBits; high > 0;) {
    const int shift = max(high - kDigitBits, 0), bins = 1 << (high - shift);
    for (int bin = thread; bin < kBins; bin += kThreads) counts[bin] = 0;
    __syncthreads();
    for (int i = thread; i < total; i += kThreads) {
      uint32_t key = key_at(i);
      if (uint64_t(key) >> high == prefix) atomicAdd(&counts[key >> shift & (bins - 1)], 1);
    }
    __syncthreads();
    int own = 0;
#pragma unroll
    for (int i = 0; i < kThreadBins; i++) own += counts[thread * kThreadBins + i];
    int above = sums_from_behind(own).x;
    if (above < keep && keep <= above + own) {
      int bin = (thread + 1) * kThreadBins - 1;
      for (int count = counts[bin]; above + count < keep; count = counts[--bin]) above += count;
      found[0] = bin, found[1] = keep - above;
    }
    __syncthreads();
    prefix = prefix << (high - shift) | uint32_t(int(found[0]));
    keep = found[1];
    high = shift;
  }

  // A warp has consecutive words. Ties before them count.
  const int first = warp * warp_words, last = min(first + warp_words, words);
  auto tied = [&](int i) { return i < total && key_at(i) == prefix; };
  int ties = 0;
  for (int word = first; word < last; word++) ties += __popc(__ballot_sync(0xffffffffu, tied(word * 32 + lane)));
  int2 sums = sums_from_behind(lane == 0 ? ties : 0);
  int before = sums.y - __shfl_sync(0xffffffffu, sums.x, 0) - ties;
  for (int word = first; word < last; word++) {
    const int i = word * 32 + lane;
    unsigned equal = __ballot_sync(0xffffffffu, tied(i));
    int rank = before + __popc(equal & ((1u << lane) - 1));
    bool kept = i < total && (key_at(i) > prefix || (equal >> lane & 1 && rank < keep));
    unsigned bits = __ballot_sync(0xffffffffu, kept);
    if (lane == 0) to[word] = int32_t(bits);
    before += __popc(equal);
  }
}

}  // namespace

void cuda::sea_select(const SeaSelectParams& p, const Context& context) {
  DeviceGuard guard(context.device);
  int64_t total = p.scores.size[1] * p.scores.size[3];
  double wanted = double(p.scores.size[1]) * p.k * double(p.scores.size[3]);
  for_each_dtype(p.scores.dtype, [&]<class T>(T) {
    size_t cached = SelectShared::kKeys + size_t(total) * sizeof(T);
    bool fits = cached <= shared_memory_limit(context.device);
    launch(fits ? select_kernel<T, true> : select_kernel<T, false>, dim3(unsigned(p.widths.elements())), dim3(kThreads),
           fits ? cached : size_t(SelectShared::kKeys), context.stream, p, wanted);
  });
}

}  // namespace torch_kernels
