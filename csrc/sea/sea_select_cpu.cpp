// SPDX-License-Identifier: Apache-2.0
// Selection of the best cells of each row. Scores become integers in the same order, and the n-th largest is found by
// bisection over how many are at least a value. Few cells of many are kept, so most are out of question first: whatever
// is below the n-th largest of some values that stand for groups of the others.
#include "cpu/dtypes.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"
#include "sea/cells.h"
#include "sea/kernels.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

// Integers in the order of scores: -0 as +0, NaN as -inf.
template <class Real>
using KeyOf = std::conditional_t<std::is_same_v<Real, double>, int64_t, int32_t>;

template <class Real>
inline void keys_of(const Real* scores, KeyOf<Real>* keys, int64_t count) {
  using Key = KeyOf<Real>;
  constexpr Real infinity = std::numeric_limits<Real>::infinity();
  for (int64_t i = 0; i < count; i += kLanes<Real>) {
    Vector<Real> score = load(scores + i) + Real(0);
    score = score == score ? score : broadcast(-infinity);
    Vector<Key> bits = bit_cast_vector<Vector<Key>>(score);
    store(keys + i, bits ^ ((bits >> (8 * sizeof(Key) - 1)) & std::numeric_limits<Key>::max()));
  }
}

template <class Key>
int64_t count_from(const Key* keys, int64_t count, Key least) {
  Vector<Key> sum{};
  for (int64_t i = 0; i < count; i += kLanes<Key>) sum -= load(keys + i) >= least;
  int64_t total = 0;
  for (int i = 0; i < kLanes<Key>; i++) total += sum[i];
  return total;
}

// The n-th largest of `count` keys, a multiple of a vector, all above the least integer or padding. 0 < n <= count.
template <class Key>
Key nth_largest(const Key* keys, int64_t count, int64_t n) {
  Vector<Key> lowest = load(keys), highest = lowest;
  for (int64_t i = 0; i < count; i += kLanes<Key>)
    lowest = minimum(lowest, load(keys + i)), highest = maximum(highest, load(keys + i));
  Key low = lowest[0], high = highest[0];
  for (int i = 1; i < kLanes<Key>; i++) low = std::min<Key>(low, lowest[i]), high = std::max<Key>(high, highest[i]);
  while (low < high) {
    using Unsigned = std::make_unsigned_t<Key>;
    Unsigned half = (Unsigned(high) - Unsigned(low)) / 2;
    Key middle = Key(Unsigned(high) - half);  // above low
    if (count_from(keys, count, middle) >= n)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <class Real>
class Selection {
  using Key = KeyOf<Real>;
  static constexpr int kLane = kLanes<Key>;
  static constexpr Key kPadding = std::numeric_limits<Key>::min();  // below every score
  static constexpr int64_t kGroup = 16;

 public:
  explicit Selection(int64_t count) : count(count), padded((count + 31) / 32 * 32) {
    static thread_local Scratch::Block memory;
    Scratch::plan(memory, [&](Scratch& scratch) {
      scores = scratch.take<Real>(padded);
      keys = scratch.take<Key>(padded);
      likely = scratch.take<Key>(padded);
    });
    std::fill(scores + count, scores + padded, Real(0));
  }

  Real* scores;  // of the row

  void keep(int64_t n, int32_t* words) {
    int64_t filled = (count + 31) / 32;
    std::fill_n(words, filled, 0);
    if (n == 0) return;
    keys_of(scores, keys, padded);
    std::fill(keys + count, keys + padded, kPadding);
    Key threshold = nth(n);
    int64_t above = threshold == std::numeric_limits<Key>::max() ? 0 : count_from(keys, padded, Key(threshold + 1));
    int64_t of_threshold = n - above;
    for (int64_t w = 0; w < filled; w++) {
      MaskOf<Key> reaches{};
      for (int64_t i = 0; i < 32; i += kLane) reaches |= load(keys + 32 * w + i) >= threshold;
      if (none(reaches)) continue;
      for (int64_t i = 0; i < 32; i++) {
        Key key = keys[32 * w + i];
        if (key > threshold || (key == threshold && of_threshold-- > 0)) words[w] |= int32_t(1u << i);
      }
    }
  }

 private:
  Key nth(int64_t n) {
    int64_t groups = padded / kGroup / kLane * kLane;
    if (n > groups) return nth_largest(keys, padded, n);
    for (int64_t g = 0; g < groups; g += kLane) {
      Vector<Key> highest = load(keys + g);
      for (int64_t i = g + groups; i < padded; i += groups) highest = maximum(highest, load(keys + i));
      store(likely + g, highest);
    }
    Key least = nth_largest(likely, groups, n);
    int64_t found = 0;
    for (int64_t i = 0; i < padded; i += kLane) {
      MaskOf<Key> in = load(keys + i) >= least;
      if (none(in)) continue;
      for (int j = 0; j < kLane; j++)
        if (keys[i + j] >= least) likely[found++] = keys[i + j];
    }
    while (found % kLane) likely[found++] = kPadding;
    return nth_largest(likely, found, n);
  }

  static bool none(MaskOf<Key> mask) {
    uint64_t words[kVectorBytes / 8], all = 0;
    std::memcpy(words, &mask, sizeof words);
    for (uint64_t word : words) all |= word;
    return all == 0;
  }

  int64_t count, padded;
  Key *keys, *likely;
};

int64_t budget(int64_t width, int64_t heads, int64_t cells, double k) {
  if (width <= 0) return 0;
  double wanted = std::nearbyint(double(heads) * k * double(cells) / double(width));
  return int64_t(std::clamp(wanted, 1.0, double(heads * cells)));
}

}  // namespace

void sea_select(const SeaSelectParams& p) {
  int64_t batch = p.scores.size[0], heads = p.scores.size[1], rows = p.scores.size[2], cells = p.scores.size[3];
  for_each_dtype(p.scores.dtype, [&]<class Stored>(Stored) {
    constexpr int64_t kRows = 16;
    int64_t blocks = (rows + kRows - 1) / kRows;
    parallel_for(batch * blocks, kRows * heads * cells * 4, [&](int64_t item) {
      Selection<RealOf<Stored>> selection(heads * cells);
      int64_t b = item / blocks, first = item % blocks * kRows;
      for (int64_t i = first; i < std::min(rows, first + kRows); i++) {
        for (int64_t h = 0; h < heads; h++)
          convert(p.scores.at<const Stored>(b, h, i), selection.scores + h * cells, cells);
        selection.keep(budget(p.widths.index(b, i), heads, cells, p.k), p.cells.at<int32_t>(b, i));
      }
    });
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
