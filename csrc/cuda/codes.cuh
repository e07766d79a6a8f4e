// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Quantised chunks as the kernels read them.
#pragma once

#include "accumulate.cuh"
#include "lists.cuh"

namespace vllm_sparse::cuda {

#ifdef __CUDACC__

// The K|V row of a token whose block, the context's `index`-th, is not sealed.
__device__ inline int64_t tail_place(const Codes& codes, int index, int offset) {
  return int64_t{index} + codes.ahead - offset / codes.rows;
}
template <class Args>
__device__ inline const uint8_t* tail_row(
    const Args& p, const int32_t* table, int head, int index, int offset) {
  const int64_t place = min(tail_place(p.codes, index, offset), p.max_blocks - 1);
  return chunk_of(p.cache, safe_block(p.cache, table[place]), head) +
         offset % p.codes.rows * p.cache.row_bytes();
}

__device__ inline float2 scale_and_minimum(const uint8_t* params) {
  return __half22float2(*reinterpret_cast<const __half2*>(params));
}

// A sealed token's key in channel d, as attention reads it.
__device__ inline float key_of(
    const KvCache& cache, const Codes& codes, const uint8_t* chunk, int d, int token) {
  if (cache.key_rows) {
    const float2 p = scale_and_minimum(chunk + codes.key_row_params + token * 4);
    const uint32_t code = chunk[codes.key_rows + token * cache.head_size + d];
    return fmaf(static_cast<float>(code), p.x, p.y);
  }
  const int word = d * kLanes + token % kLanes, shift = token / kLanes * 4;
  const int group = token * cache.key_groups / kBlockSize;
  const float2 p = scale_and_minimum(chunk + codes.params + (d * cache.key_groups + group) * 4);
  const uint32_t high = reinterpret_cast<const uint32_t*>(chunk)[word] >> shift & 15;
  float code = static_cast<float>(high);
  if (cache.key_bits == 8) {
    const uint32_t low =
        reinterpret_cast<const uint32_t*>(chunk + codes.low_codes)[word] >> shift & 15;
    code += (static_cast<float>(low) - 7.5f) * 0.0625f;
  }
  return fmaf(code, p.x, p.y);
}

// A sealed token's value in channel d.
__device__ inline float value_of(
    const KvCache& cache, const Codes& codes, const uint8_t* chunk, int d, int token) {
  const uint8_t* row = chunk + codes.value_codes + token * codes.value_code_bytes;
  const uint8_t* params = chunk + codes.value_params + token * codes.value_param_bytes;
  const float2 p = scale_and_minimum(params + d / cache.value_group * 4);
  const uint32_t code =
      cache.value_bits == 8 ? row[d] : row[d / 16 * 8 + d % 8] >> (d / 8 % 2 * 4) & 15;
  return fmaf(static_cast<float>(code), p.x, p.y);
}

// Mean over the context of one element of V, as mean_value of lists.cuh.
template <class T>
__device__ __noinline__ float mean_of_codes(
    const AttendArgs& p, int64_t row, int head, int d, int length) {
  const int sealed = p.cache.sealed_blocks(length), tail = length - sealed * kBlockSize;
  const int32_t* table = p.block_table + row * p.block_table_stride;
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

// store_result of lists.cuh.
template <class T>
__device__ inline void store_result_of_codes(
    const AttendArgs& p, int64_t row, int head, int query_head, int d, int length, float y) {
  if (p.kept_mass != nullptr && length > 0) {
    const float alpha = p.kept_mass[row * p.cache.num_kv_heads * p.group + query_head];
    y = alpha * y + (1 - alpha) * mean_of_codes<T>(p, row, head, d, length);
  }
  T* out = reinterpret_cast<T*>(static_cast<uint8_t*>(p.out) + row * p.out_stride);
  out[int64_t{query_head} * p.cache.head_size + d] = from_float(y, T());
}

// Four elements from d on.
template <class T>
__device__ inline void store_words_of_codes(const AttendArgs& p,
                                            int64_t row,
                                            int head,
                                            int query_head,
                                            int d,
                                            int length,
                                            const Merged& merged,
                                            const float4& sum) {
  const float inverse = merged.total > 0 ? 1 / merged.total : 0;
  const float x[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float y = merged.total > 0 ? x[i] * inverse : 0;
    store_result_of_codes<T>(p, row, head, query_head, d + i, length, y);
  }
}

#endif  // __CUDACC__

}  // namespace vllm_sparse::cuda
