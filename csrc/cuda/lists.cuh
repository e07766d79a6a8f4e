// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// What a row keeps, token lists, and the end of attention that both of its kernels share.
#pragma once

#include "kernels.h"

namespace vllm_sparse::cuda {

#ifdef __CUDACC__

struct RowPlan {
  int length, sealed;  // tokens, full blocks
  int sinks, recent;   // tokens before and from here on are kept
  int wanted;          // how many others
  bool all;            // everything is kept, nothing needs scores
};

// Values on the device are not checked: a length beyond the block table is cut.
template <class Args>
__device__ inline RowPlan plan_row(const Args& p, int64_t row) {
  RowPlan r;
  r.length =
      static_cast<int>(min(int64_t{max(p.seq_lens[row], 0)}, p.max_blocks * int64_t{kBlockSize}));
  const int budget = p.budgets[row];
  r.sealed = p.cache.sealed_blocks(r.length);
  r.recent = max(0, min(r.length - p.local_window, r.sealed * kBlockSize));
  r.all = budget < 0 || budget >= r.length || r.recent <= p.sink_tokens;
  r.sinks = min(p.sink_tokens, r.recent);
  r.wanted = max(0, budget - r.sinks - (r.length - r.recent));
  return r;
}

// Counts the length of an item's list.
__device__ inline void count_kept(const SelectArgs& p, int head, int count) {
  if (p.kept_histogram == nullptr || count <= 0) return;
  auto* bins = reinterpret_cast<unsigned long long*>(p.kept_histogram) + head * kKeptBins;
  atomicAdd(bins + kept_bin(count), 1);
  atomicAdd(bins + kKeptBins - 1, count);
}

// Tokens of one (row, KV head): listed ones, or with `all` the first `count` of its context.
struct TokenList {
  int length, count;
  bool all;
};

// Behind a selection of the same call, counts follow from the row before selection is through. Not
// inlined: it is called in many places, rarely, and instructions have to be fetched, too.
static __device__ __noinline__ TokenList token_list(const AttendArgs& p, int row, int item) {
  TokenList t;
  int64_t listed;
  if (p.budgets != nullptr) {
    const RowPlan plan = plan_row(p, row);
    t.length = plan.length;
    listed = plan.all ? -1 : plan.sinks + plan.wanted + plan.length - plan.recent;
  } else {
    t.length =
        static_cast<int>(min(int64_t{max(p.seq_lens[row], 0)}, p.max_blocks * int64_t{kBlockSize}));
    listed = p.counts == nullptr ? -1 : p.counts[item];
  }
  t.all = listed < 0;
  t.count = t.all ? t.length : static_cast<int>(min(listed, p.max_kept));
  return t;
}

// Mean over the context of one element of V; the last sealed block knows it up to its end.
template <class T>
__device__ __noinline__ float mean_value(
    const AttendArgs& p, int64_t row, int head, int d, int length) {
  const int head_size = p.cache.head_size, sealed = length / kBlockSize, tail = length % kBlockSize;
  const int32_t* table = p.block_table + row * p.block_table_stride;
  float sum = 0;
  if (tail > 0) {
    const uint8_t* chunk = chunk_of(p.cache, safe_block(p.cache, table[sealed]), head);
    const T* from = reinterpret_cast<const T*>(chunk) + head_size + d;
#pragma unroll 8
    for (int t = 0; t < tail; ++t) sum += to_float(from[int64_t{t} * 2 * head_size]);
  }
  if (sealed > 0) {
    const int64_t offset =
        int64_t{kBlockSize} * 2 * head_size * sizeof(T) + head_size * (kCodeBytes + 4);
    const uint8_t* chunk = chunk_of(p.cache, safe_block(p.cache, table[sealed - 1]), head);
    sum += __half2float(reinterpret_cast<const __half*>(chunk + offset)[d]) *
           static_cast<float>(sealed * kBlockSize);
  }
  return sum / static_cast<float>(length);
}

__device__ inline float from_float(float x, float) { return x; }
__device__ inline __half from_float(float x, __half) { return __float2half_rn(x); }
__device__ inline __nv_bfloat16 from_float(float x, __nv_bfloat16) {
  return __float2bfloat16_rn(x);
}

// Stores y with, where that is asked for, the mean of V standing in for the tokens left out.
template <class T>
__device__ inline void store_result(
    const AttendArgs& p, int64_t row, int head, int query_head, int d, int length, float y) {
  if (p.kept_mass != nullptr && length > 0) {
    const float alpha = p.kept_mass[row * p.cache.num_kv_heads * p.group + query_head];
    y = alpha * y + (1 - alpha) * mean_value<T>(p, row, head, d, length);
  }
  T* out = reinterpret_cast<T*>(static_cast<uint8_t*>(p.out) + row * p.out_stride);
  out[int64_t{query_head} * p.cache.head_size + d] = from_float(y, T());
}

#endif  // __CUDACC__

}  // namespace vllm_sparse::cuda
