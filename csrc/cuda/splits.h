// SPDX-License-Identifier: Apache-2.0
// How the keys that a row of attention sees are divided among thread blocks: plain arithmetic, the same on the host and
// on the device. The number of splits follows from the row's own keys and from the call's heads and rows, never from
// the batch, so its bits do not depend on its company. A split's fp32 partial result costs memory traffic too:
// min_split_keys keeps it near an eighth of the keys' and values' traffic.
#pragma once
#include <algorithm>

#include "core/tensor.h"

namespace torch_kernels {

struct KeySplits {
  int key_tile;        // keys a block handles at a time
  int min_split_keys;  // a split is at least this long
  int max_splits;      // enough to fill a large GPU with one sequence

  // For `rows` rows that share a key/value head, in `blocks` blocks that share a split.
  void divide(int64_t rows, int64_t blocks) {
    constexpr int64_t kBlocks = 256;
    min_split_keys = int(std::clamp<int64_t>(16 * rows, 256, 1024));
    max_splits = int(std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, blocks)));
  }

  TORCH_KERNELS_HOST_DEVICE int splits_of(int tiles) const {
    int wanted = int((int64_t(tiles) * key_tile + min_split_keys - 1) / min_split_keys);
    return wanted < 1 ? 1 : wanted < max_splits ? wanted : max_splits;
  }
  // The first tile of a split; that of split number splits_of(tiles) is where the last one ends.
  TORCH_KERNELS_HOST_DEVICE int first_of(int split, int tiles) const {
    return int(int64_t(tiles) * split / splits_of(tiles));
  }
};

}  // namespace torch_kernels
