// SPDX-License-Identifier: Apache-2.0
// Which columns a cell owns: those from boundary(m) up to boundary(m + 1), in exact integers.
#pragma once
#include "core/tensor.h"

namespace torch_kernels {

struct CellMap {
  uint64_t width;  // of the row: it sees columns [0, width); below 2^31
  uint64_t cells;  // at most 2^20

  TORCH_KERNELS_HOST_DEVICE int64_t boundary(uint64_t m) const {
    return int64_t((2 * m * width + cells) / (2 * cells));
  }
  // Of a column below the width.
  TORCH_KERNELS_HOST_DEVICE int64_t cell_of(uint64_t column) const {
    return int64_t((cells * (2 * column + 1) - 1) / (2 * width));
  }
};

// A row's width, whatever the tensor holds.
TORCH_KERNELS_HOST_DEVICE inline int64_t width_of(const Tensor& widths, int64_t b, int64_t i, int64_t most) {
  int64_t width = widths.index(b, i);
  return width < 0 ? 0 : width > most ? most : width;
}

// Of `span` columns from `first` on, of which `count` are kept: the t-th, descending.
TORCH_KERNELS_HOST_DEVICE inline int64_t kept_column(int64_t first, int64_t span, int64_t count, int64_t t) {
  return first + span - 1 - t * span / count;
}

}  // namespace torch_kernels
