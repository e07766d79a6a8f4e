// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Quantised chunks as the kernels read them.
#pragma once

#include "common/kernels.h"
#include "common/primitives.cuh"

namespace vllm_sparse::cuda {

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

// Codes by token, in groups of channels.
struct TokenCodes {
  int bits, group, code_bytes, param_bytes;  // bytes of a token
  uint8_t *codes, *params;
};
template <class Args>
__device__ inline TokenCodes values_of(const Args& p, uint8_t* chunk) {
  return {p.cache.value_bits,
          p.cache.value_group,
          p.codes.value_code_bytes,
          p.codes.value_param_bytes,
          chunk + p.codes.value_codes,
          chunk + p.codes.value_params};
}
template <class Args>
__device__ inline TokenCodes keys_of(const Args& p, uint8_t* chunk) {
  const int size = p.cache.head_size;
  return {8, size, size, 4, chunk + p.codes.key_rows, chunk + p.codes.key_row_params};
}

}  // namespace vllm_sparse::cuda
