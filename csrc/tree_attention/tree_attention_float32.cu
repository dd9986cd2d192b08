// SPDX-License-Identifier: Apache-2.0
// Tree attention for float32 queries: IEEE multiply-adds, no TF32. Simple rather than fast: a block of 16 rows, 8
// threads a row, and tiles of 32 keys that are decoded into shared memory as float32.
#include "tree_attention/work.cuh"

namespace torch_kernels {
namespace {

constexpr int kRows = 16, kKeys = 32, kThreads = 128, kRowThreads = kThreads / kRows, kMaxHead = 256;

DEVICE float stored_value(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[i];
  if (dtype == DType::int8) return static_cast<const int8_t*>(data)[i];
  return float(static_cast<const __nv_fp8_e4m3*>(data)[i]);
}

// Decodes a tile of K or V to shared memory rows of `stride` floats; keys that do not exist become zeros.
DEVICE void copy_tile(const Tensor& from, int head, float scale, const Shared<int2>& places, const Shared<float>& to,
                      int stride) {
  int columns = int(from.size[3]);
  for (int i = threadIdx.x; i < kKeys * columns; i += kThreads) {
    int key = i / columns, column = i % columns;
    int2 place = places[key];
    int64_t at = place.x * from.stride[0] + place.y * from.stride[1] + head * from.stride[2] + column;
    to[key * stride + column] = place.x >= 0 ? scale * stored_value(from.data, from.dtype, at) : 0.f;
  }
}

__global__ void __launch_bounds__(kThreads)
    tree_attention_float32_kernel(TreeAttentionParams p, TreeAttentionPlan plan, Partials partials) {
  TreeAttentionWork work(p, plan);
  if (work.split >= work.splits) return;
  const int thread = threadIdx.x, row = thread / kRowThreads, column = thread % kRowThreads * 4;
  const int head_size = int(p.q.size[3]), value_size = int(p.v_cache.size[3]), nodes = int(p.q.size[1]);
  const int stride = plan.head_tile + 4;  // floats; keys next to each other start in different banks

  const Shared<float> q = shared_array<float>(0, kRows * stride),
                      k = shared_array<float>(kRows * stride * 4, kKeys * stride);
  const Shared<float> v = shared_array<float>((kRows + kKeys) * stride * 4, kKeys * stride);
  const int base = (kRows + 2 * kKeys) * stride * 4;
  const Shared<float> weights = shared_array<float>(base, kRows * kKeys);
  const Shared<int2> places = shared_array<int2>(base + kRows * kKeys * 4, kKeys);
  const Shared<unsigned> visible = shared_array<unsigned>(base + kRows * kKeys * 4 + kKeys * 8, kRows);
  const Shared<int16_t> parents = shared_array<int16_t>(base + kRows * kKeys * 4 + kKeys * 8 + kRows * 4, nodes);

  for (int i = thread; i < nodes; i += kThreads) parents[i] = int16_t(checked_parent(p.parents, work.batch, i));
  for (int i = thread; i < kRows * head_size; i += kThreads) {
    int r = work.row0 + i / head_size;
    q[i / head_size * stride + i % head_size] =
        r < work.rows ? *p.q.at<const float>(work.batch, work.node(r), work.query_head(r), i % head_size) : 0.f;
  }
  __syncthreads();

  // The row's chain is walked by its first thread; the others only need to know its depth.
  AncestorWalk walk;
  int global_row = work.row0 + row, depth = -1;
  if (global_row < work.rows) depth = walk.start(parents, work.node(global_row), plan.window);

  float k_scale = p.k_scale ? *p.k_scale.at<const float>(p.k_scale.size[0] == 1 ? 0 : work.head) : 1.f;
  float v_scale = p.v_scale ? *p.v_scale.at<const float>(p.v_scale.size[0] == 1 ? 0 : work.head) : 1.f;
  float maximum = -INFINITY, sum = 0, out[kMaxHead / 4 / kRowThreads][4] = {};
  for (int tile = 0; tile < work.tiles; tile++) {
    unsigned present = 0;
    if (thread < kKeys) {
      int2 place = work.place(tile, thread, work.table_entry(tile, thread));
      places[thread] = place;
      present = __ballot_sync(0xffffffffu, place.x >= 0);
      if (thread < kRows) visible[thread] = present;
    }
    __syncthreads();
    bool cached = work.in_cache(tile);
    copy_tile(cached ? p.k_cache : p.k_tree, work.head, cached ? k_scale : 1.f, places, k, stride);
    copy_tile(cached ? p.v_cache : p.v_tree, work.head, cached ? v_scale : 1.f, places, v, stride);
    unsigned bits = visible[row];
    if (work.is_tree(tile))
      bits &= walk.bits(parents, work.first_node(tile));
    else
      bits &= work.window_bits(work.first_slot(tile), depth);
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
      float x = scores[i] * p.scale;
      if (p.softcap > 0) x = p.softcap * tanhf(x / p.softcap);
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
  if (depth < 0) sum = 0, maximum = NAN;
  float factor = 1;
  if (work.splits > 1) {
    if (column == 0) partials.state[work.partial_row(global_row)] = make_float2(maximum, sum);
  } else {
    int head = work.query_head(global_row);
    float lse, sink = p.sinks && depth >= 0 ? *p.sinks.at<const float>(head) : -INFINITY;
    factor = finish_row(depth < 0 ? -INFINITY : maximum, sum, sink, lse);
    if (column == 0) *p.lse.at<float>(work.batch, head, work.node(global_row)) = lse;
  }
  float* to = work.splits > 1 ? partials.out + work.partial_row(global_row) * value_size
                              : p.out.at<float>(work.batch, work.node(global_row), work.query_head(global_row));
#pragma unroll
  for (int i = 0; i < kMaxHead / 4 / kRowThreads; i++) {
    int at = column + i * kRowThreads * 4;
    if (at >= value_size) break;
    bool seen = sum != 0;
    *reinterpret_cast<float4*>(to + at) = make_float4(seen ? factor * out[i][0] : 0.f, seen ? factor * out[i][1] : 0.f,
                                                      seen ? factor * out[i][2] : 0.f, seen ? factor * out[i][3] : 0.f);
  }
}

}  // namespace

void launch_tree_attention_float32(const TreeAttentionParams& p, const TreeAttentionPlan& plan, Partials partials,
                                   void* stream) {
  unsigned blocks = unsigned(p.q.size[0] * p.k_cache.size[2] * plan.grid_splits * plan.row_tiles);
  size_t shared = size_t(kRows + 2 * kKeys) * (plan.head_tile + 4) * 4 + kRows * kKeys * 4 + kKeys * 8 + kRows * 4 +
                  size_t(p.q.size[1]) * sizeof(int16_t);
  launch(tree_attention_float32_kernel, dim3(blocks), dim3(kThreads), shared, stream, p, plan, partials);
}

}  // namespace torch_kernels
