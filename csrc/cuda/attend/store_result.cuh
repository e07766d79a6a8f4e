// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The end of attention: from sums to the result.
#pragma once

#include "attend/accumulate.cuh"
#include "common/tails.cuh"
#include "common/token_lists.cuh"

namespace vllm_sparse::cuda {

// Mean over the context of one element of V; the last sealed block knows it up to its end.
template <class T>
__device__ __noinline__ float mean_value(
    const AttendArgs& p, int64_t row, int head, int d, int length) {
  const int head_size = p.cache.head_size, sealed = length / kBlockSize, tail = length % kBlockSize;
  const int32_t* table = p.table(row);
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

// Likewise of quantised blocks.
template <class T>
__device__ __noinline__ float mean_of_codes(
    const AttendArgs& p, int64_t row, int head, int d, int length) {
  const int sealed = p.cache.sealed_blocks(length), tail = length - sealed * kBlockSize;
  const int32_t* table = p.table(row);
  float sum = 0;
  for (int t = 0; t < tail; ++t) {
    sum += to_float(
        reinterpret_cast<const T*>(tail_row(p, table, head, sealed, t))[p.cache.head_size + d]);
  }
  if (sealed > 0) {
    const uint8_t* chunk = chunk_of(p.cache, safe_block(p.cache, table[sealed - 1]), head);
    sum += __half2float(reinterpret_cast<const __half*>(chunk + p.codes.mean)[d]) *
           static_cast<float>(sealed * kBlockSize);
  }
  return sum / static_cast<float>(length);
}

// Stores y with, where that is asked for, the mean of V standing in for the tokens left out.
template <class T, bool kCodes>
__device__ inline void store_result(
    const AttendArgs& p, int64_t row, int head, int query_head, int d, int length, float y) {
  if (p.kept_mass != nullptr && length > 0) {
    const float alpha = p.kept_mass[row * p.cache.num_kv_heads * p.group + query_head];
    const float mean =
        kCodes ? mean_of_codes<T>(p, row, head, d, length) : mean_value<T>(p, row, head, d, length);
    y = alpha * y + (1 - alpha) * mean;
  }
  T* out = reinterpret_cast<T*>(static_cast<uint8_t*>(p.out) + row * p.out_stride);
  out[int64_t{query_head} * p.cache.head_size + d] = from_float(y, T());
}

// Four elements from d on.
template <class T, bool kCodes>
__device__ void store_four(const AttendArgs& p,
                           int64_t row,
                           int head,
                           int query_head,
                           int d,
                           int length,
                           Merged merged,
                           float4 sum) {
  if (p.sinks != nullptr) merged.add_sink(p.sinks[query_head], sum);
  if (p.lse != nullptr && d == 0) {
    p.lse[row * p.cache.num_kv_heads * p.group + query_head] =
        (merged.top + log2f(merged.total)) / kLog2e;
  }
  const float inverse = 1 / merged.total;
  const float x[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float y = merged.total > 0 ? x[i] * inverse : 0;
    store_result<T, kCodes>(p, row, head, query_head, d + i, length, y);
  }
}

}  // namespace vllm_sparse::cuda
