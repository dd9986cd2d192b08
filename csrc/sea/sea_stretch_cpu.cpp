// SPDX-License-Identifier: Apache-2.0
// Maps of cells as maps of columns, and lists of columns.
#include "core/error.h"
#include "cpu/dtypes.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"
#include "sea/kernels.h"
#include "sea/runs_cpu.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
namespace {

// Calls body(cell, first, end) for every cell of a row in order, without a division for each.
template <class Body>
void for_each_cell(CellMap map, const Body& body) {
  uint64_t step = 2 * map.width / (2 * map.cells), rest = 2 * map.width % (2 * map.cells);
  uint64_t boundary = 0, remainder = map.cells;
  for (uint64_t m = 0; m < map.cells; m++) {
    uint64_t first = boundary;
    boundary += step, remainder += rest;
    if (remainder >= 2 * map.cells) boundary++, remainder -= 2 * map.cells;
    body(int64_t(m), int64_t(first), int64_t(boundary));
  }
}

template <class Stored>
RealOf<Stored> sum_of(const Stored* from, int64_t count) {
  using Real = RealOf<Stored>;
  Vector<Real> sums{};
  int64_t i = 0;
  for (; i + kLanes<Real> <= count; i += kLanes<Real>) {
    if constexpr (std::is_same_v<Stored, double>)
      sums += load(from + i);
    else
      sums += load_float(from + i);
  }
  Real sum = 0;
  for (; i < count; i++) sum += to_float(from[i]);
  for (int j = 0; j < kLanes<Real>; j++) sum += sums[j];
  return sum;
}

}  // namespace

void sea_stretch(const SeaStretchParams& p) {
  int64_t batch = p.x.size[0], heads = p.x.size[1], rows = p.x.size[2], cells = p.x.size[3], length = p.out.size[3];
  for_each_dtype(p.x.dtype, [&]<class Stored>(Stored) {
    Stored fill = from_float<Stored>(p.fill);
    parallel_for(batch * rows, heads * (cells + length), [&](int64_t item) {
      int64_t b = item / rows, i = item % rows, width = width_of(p.widths, b, i, length);
      for (int64_t h = 0; h < heads; h++) {
        const Stored* from = p.x.at<const Stored>(b, h, i);
        Stored* to = p.out.at<Stored>(b, h, i);
        for_each_cell({uint64_t(width), uint64_t(cells)},
                      [&](int64_t m, int64_t first, int64_t end) { std::fill(to + first, to + end, from[m]); });
        std::fill(to + width, to + length, fill);
      }
    });
  });
}

void sea_stretch_backward(const SeaStretchBackwardParams& p) {
  int64_t batch = p.grad_x.size[0], heads = p.grad_x.size[1], rows = p.grad_x.size[2], cells = p.grad_x.size[3];
  int64_t length = p.grad_out.size[3];
  for_each_dtype(p.grad_out.dtype, [&]<class Stored>(Stored) {
    parallel_for(batch * rows, heads * (cells + length), [&](int64_t item) {
      int64_t b = item / rows, i = item % rows, width = width_of(p.widths, b, i, length);
      for (int64_t h = 0; h < heads; h++) {
        const Stored* from = p.grad_out.at<const Stored>(b, h, i);
        Stored* to = p.grad_x.at<Stored>(b, h, i);
        for_each_cell({uint64_t(width), uint64_t(cells)}, [&](int64_t m, int64_t first, int64_t end) {
          to[m] = from_float<Stored>(sum_of(from + first, end - first));
        });
      }
    });
  });
}

void sea_csr(const SeaCsrParams& p) {
  int64_t batch = p.widths.size[0], rows = p.widths.size[1], heads = p.num_heads, cells = p.num_cells;
  int32_t *crow = p.crow.at<int32_t>(), *col = p.col.at<int32_t>();
  auto runs = [&](int64_t row, int64_t h, const auto& emit) {
    int64_t b = row / rows, i = row % rows, width = width_of(p.widths, b, i, std::numeric_limits<int32_t>::max());
    for_each_run(p.cells.at<const int32_t>(b, i), h * cells, {uint64_t(width), uint64_t(cells)}, p.max_columns, 0,
                 width, emit);
  };
  parallel_for(batch * rows, heads * (cells / 8 + 64), [&](int64_t row) {
    for (int64_t h = 0; h < heads; h++) {
      int32_t* to = col + (p.col ? crow[row * heads + h] : 0);
      int64_t count = 0;
      runs(row, h, [&](const Run& run) {
        count += run.count;
        if (p.col) for_each_column(run, 0, int64_t(1) << 31, [&](int64_t column) { *to++ = int32_t(column); });
      });
      if (!p.col) crow[row * heads + h + 1] = int32_t(count);
    }
  });
  if (p.col) return;
  int64_t sum = 0;
  crow[0] = 0;
  for (int64_t row = 1; row <= batch * rows * heads; row++) {
    sum += crow[row];
    require(sum <= std::numeric_limits<int32_t>::max(), "sea_csr: widths must give fewer than 2**31 columns in all");
    crow[row] = int32_t(sum);
  }
}

void running_mean(const RunningMeanParams& p) {
  int64_t batch = p.v.size[0], tokens = p.v.size[1], heads = p.v.size[2], size = p.v.size[3];
  int64_t parts = std::min<int64_t>(heads, std::max<int64_t>(1, omp_get_max_threads() / std::max<int64_t>(1, batch)));
  int64_t of_part = parts ? (heads + parts - 1) / parts : 0;
  for (int64_t b = 0; b < batch; b++) *p.count_after.at<int64_t>(b) = (p.count ? p.count.index(b) : 0) + tokens;
  for_each_dtype(p.v.dtype, [&]<class Stored>(Stored) {
    using Real = RealOf<Stored>;
    parallel_for(batch * parts, tokens * of_part * size, [&](int64_t item) {
      int64_t b = item / parts, first = item % parts * of_part, end = std::min(heads, first + of_part);
      static thread_local Scratch::Block memory;
      Real* row;
      Scratch::plan(memory, [&](Scratch& scratch) { row = scratch.take<Real>(size); });
      for (int64_t h = first; h < end; h++)
        for (int64_t c = 0; c < size; c++)
          *p.sum_after.at<double>(b, h, c) = p.sum ? *p.sum.at<const double>(b, h, c) : 0;
      int64_t count = p.count ? p.count.index(b) : 0;
      for (int64_t t = 0; t < tokens; t++) {
        double share = 1 / double(count + t + 1);
        for (int64_t h = first; h < end; h++) {
          double* sum = p.sum_after.at<double>(b, h);
          convert(p.v.at<const Stored>(b, t, h), row, size);
          for (int64_t c = 0; c < size; c++) {
            sum[c] += row[c];
            row[c] = Real(sum[c] * share);
          }
          convert(row, p.mean.at<Stored>(b, t, h), size);
        }
      }
    });
  });
}

}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
