// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Exact attention over quantised blocks in fp32, without tensor cores, for all formats
// and head sizes that code_blocks.cu and code_rows.cu do not cover. A thread block takes a (row, KV
// head, a few query heads).
#include "attend/store_result.cuh"
#include "common/codes.cuh"
#include "common/instructions.cuh"
#include "common/launch.cuh"
#include "common/tails.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTile = kThreads;  // tokens at once
constexpr int kHeads = 4;

// A token of a tile: where its K and V are, and which of its block if that is sealed, or -1.
struct Place {
  const uint8_t* from;
  int token;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    attend_codes_kernel(const __grid_constant__ AttendArgs p) {
  __shared__ Place places[kTile];
  __shared__ float query[kHeads][kMaxHeadSize], weights[kHeads][kTile];
  __shared__ float partial[kHeads][kThreads / 32];
  wait_for_previous();
  let_next_begin();
  const int item = blockIdx.x, row = item / p.cache.num_kv_heads;
  const int head = item - row * p.cache.num_kv_heads, size = p.cache.head_size;
  const int first_head = blockIdx.y * kHeads, heads = min(kHeads, p.group - first_head);
  const int query_head = head * p.group + first_head;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const TokenList tokens = token_list(p, row, item);
  const int sealed = p.cache.sealed_blocks(tokens.length);
  const int32_t* table = p.table(row);
  const float scale = p.soft_cap > 0 ? p.scale : p.scale * kLog2e;
  const T* from =
      reinterpret_cast<const T*>(static_cast<const uint8_t*>(p.query) + row * p.query_stride) +
      int64_t{query_head} * size;
  for (int i = threadIdx.x; i < kHeads * size; i += kThreads) {
    query[i / size][i % size] = i / size < heads ? to_float(from[i]) * scale : 0;
  }
  float top[kHeads], total[kHeads] = {}, sum[kHeads] = {};
#pragma unroll
  for (auto& x : top) x = -INFINITY;
  for (int first = 0; first < tokens.count; first += kTile) {
    const int count = min(kTile, tokens.count - first);
    __syncthreads();  // also for the queries
    float x[kHeads] = {};
    if (threadIdx.x < count) {
      int t = first + threadIdx.x;
      if (!tokens.all) t = p.indices[int64_t{item} * p.max_kept + t];
      t = min(max(t, 0), tokens.length - 1);
      Place place = {nullptr, -1};
      if (t / kBlockSize < sealed) {
        place = {chunk_of(p.cache, safe_block(p.cache, table[t / kBlockSize]), head),
                 t % kBlockSize};
      } else {
        place.from = tail_row(p, table, head, t / kBlockSize, t % kBlockSize);
      }
      places[threadIdx.x] = place;
#pragma unroll 4
      for (int d = 0; d < size; ++d) {
        const float k = place.token < 0 ? to_float(reinterpret_cast<const T*>(place.from)[d])
                                        : key_of(p.cache, p.codes, place.from, d, place.token);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) x[h] = fmaf(query[h][d], k, x[h]);
      }
    }
    float peak[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (p.soft_cap > 0) x[h] = p.soft_cap * kLog2e * tanhf(x[h] / p.soft_cap);
      if (threadIdx.x >= count) x[h] = -INFINITY;
      peak[h] = warp_max(x[h]);
      if (lane == 0) partial[h][warp] = peak[h];
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float highest = top[h];
      for (int w = 0; w < kThreads / 32; ++w) highest = fmaxf(highest, partial[h][w]);
      const float shift = highest == -INFINITY ? 0 : highest;  // keeps NaN out
      const float factor = fast_exp2(top[h] - shift);
      top[h] = highest;
      total[h] *= factor;
      sum[h] *= factor;
      weights[h][threadIdx.x] = fast_exp2(x[h] - shift);
    }
    __syncthreads();
    const int d = threadIdx.x;
    for (int t = 0; t < count; ++t) {
      const Place place = places[t];
      float v = 0;
      if (d < size) {
        v = place.token < 0 ? to_float(reinterpret_cast<const T*>(place.from)[size + d])
                            : value_of(p.cache, p.codes, place.from, d, place.token);
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        total[h] += weights[h][t];
        sum[h] = fmaf(weights[h][t], v, sum[h]);
      }
    }
  }
  if (threadIdx.x >= size) return;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= heads) break;
    float all = total[h], mine = sum[h];
    if (p.sinks != nullptr) {
      Merged merged = {top[h], all};
      float4 x = {mine, 0, 0, 0};
      merged.add_sink(p.sinks[query_head + h], x);
      all = merged.total;
      mine = x.x;
    }
    const float y = all > 0 ? mine / all : 0;
    store_result<T, true>(p, row, head, query_head + h, threadIdx.x, tokens.length, y);
  }
}

}  // namespace

void launch_attend_codes(const Device& device, const AttendArgs& p) {
  const dim3 grid(p.num_rows * p.cache.num_kv_heads, (p.group + kHeads - 1) / kHeads);
  const auto kernel = p.cache.dtype == Dtype::kHalf ? attend_codes_kernel<__half>
                                                    : attend_codes_kernel<__nv_bfloat16>;
  launch(device, kernel, 1, grid, kThreads, 0, p, true);
}

}  // namespace vllm_sparse::cuda
