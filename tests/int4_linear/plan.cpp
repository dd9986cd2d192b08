// SPDX-License-Identifier: Apache-2.0
// What every plan of the CUDA kernels must keep, over many sizes. Prints the sizes of the first that does not.
#include "int4_linear/plan.h"

#include <cstdio>
#include <cstdlib>

using namespace torch_kernels;

int main() {
  for (int64_t features : {1, 31, 128, 129, 1000, 4096, 11008, 28672, 75264})
    for (int64_t columns : {0, 1, 63, 200, 1024, 4096, 11008, 74240})
      for (int64_t group_size : {-1, 16, 32, 64, 128, 256})
        for (int64_t x_size : {1, 2, 4})
          for (int64_t scale_size : {2, 4})
            for (int64_t zero_size : {0, 2, 4}) {
              int splits = 0, split_tiles = 0;
              for (int64_t rows : {1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 1000, 100000}) {
                Int4LinearPlan p =
                    plan_int4_linear(rows, features, columns, group_size, x_size, scale_size, zero_size, x_size == 1);
                auto expect = [&](bool holds, const char* what) {
                  if (holds) return;
                  std::printf("%s: M=%d N=%d K=%d g=%d, bytes of x %d, scales %d, zeros %d\n", what, int(rows),
                              int(features), int(columns), int(group_size), int(x_size), int(scale_size),
                              int(zero_size));
                  std::exit(1);
                };
                if (!splits) splits = p.splits, split_tiles = p.split_tiles;
                expect(p.splits == splits && p.split_tiles == split_tiles, "splits depend on M");
                int64_t tiles = (columns + 63) / 64;
                expect(int64_t(splits) * split_tiles >= tiles, "splits do not cover K");
                expect(int64_t(splits - 1) * split_tiles < std::max<int64_t>(tiles, 1), "an empty split");
                expect(group_size < 0 || splits == 1 || split_tiles * 64 % group_size == 0, "a split cuts a group");
                expect(split_tiles * 64 % int4_stage_columns(p.row_tile, x_size) == 0, "a split cuts a stage");
                expect(p.stages >= 2 && p.stages <= kInt4MaxStages, "stages");
                expect(p.shared_bytes() <= kSharedBytes, "shared memory");
                expect(p.stage.bytes % 16 == 0 && p.stage.x % 16 == 0 && p.stage.x_scales % 16 == 0, "alignment");
                expect(p.slab_rows >= std::min<int64_t>(rows, 64) && p.slab_rows <= rows, "rows of a slab");
                expect(int64_t(p.row_tile) * p.row_tiles >= p.slab_rows, "tiles do not cover M");
                expect(int64_t(p.column_tile()) * p.column_tiles >= features, "tiles do not cover N");
                expect(p.row_tile == 8 || rows > p.row_tile / 2, "rows of padding");
                expect((p.row_tile >= 32 && x_size != 4) || p.warps == 4, "a tile that has no kernel");
              }
            }
  std::printf("ok");
}
