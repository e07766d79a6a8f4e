// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Quantised formats: tokens of blocks that are not sealed, rows in the chunks of blocks to come.
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

}  // namespace vllm_sparse::cuda
