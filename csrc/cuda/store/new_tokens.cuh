// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// What a call stores, as its kernels find it, and the means of V that sealing leaves.
#pragma once

#include "common/kernels.h"
#include "common/primitives.cuh"

namespace vllm_sparse::cuda {

// A request's new tokens.
struct NewTokens {
  int start, count, computed, length;
  bool valid;

  __device__ NewTokens(const StoreArgs& p, int row) {
    start = p.query_start_loc[row];
    count = p.query_start_loc[row + 1] - start;
    length = p.seq_lens[row];
    computed = length - count;
    const int64_t blocks = (int64_t{length} + kBlockSize - 1) / kBlockSize + p.codes.ahead;
    // Values are not checked on the host; a length of 0 is padding.
    valid = count > 0 && computed >= 0 && start >= 0 && blocks <= p.max_blocks &&
            int64_t{start} + count <= p.num_tokens;
  }
  // Drafts may be rejected: quantised formats keep all of a few tokens as rows.
  __device__ bool few(const StoreArgs& p) const { return count <= p.codes.rows; }
  // Whether they fill a block that earlier calls have begun. The block before it is sealed then.
  __device__ bool fill_begun() const {
    return valid && computed % kBlockSize > 0 && computed / kBlockSize < length / kBlockSize;
  }
  // The first block that they alone fill, and how many more.
  __device__ int first_full() const { return (computed + kBlockSize - 1) / kBlockSize; }
  __device__ int full_blocks() const {
    return valid ? max(0, length / kBlockSize - first_full()) : 0;
  }
  // Which token of the call the context's `position`-th is.
  __device__ int64_t at(int position) const { return int64_t{start} + position - computed; }
};

// Half of a new token's row of one head.
template <class T>
__device__ inline const T* new_row(const StoreArgs& p, int64_t token, int head, bool value) {
  const void* from = value ? p.value : p.key;
  const int64_t stride = value ? p.value_stride : p.key_stride;
  const int64_t head_stride = value ? p.value_head_stride : p.key_head_stride;
  return reinterpret_cast<const T*>(static_cast<const uint8_t*>(from) + token * stride +
                                    head * head_stride);
}

// What there is to seal of a block that new tokens fill.
__device__ inline SealJob seal_job(const StoreArgs& p,
                                   const NewTokens& tokens,
                                   int row,
                                   int index) {
  const int64_t slot = p.slot_mapping[tokens.at((index + 1) * kBlockSize - 1)];
  const int32_t* table = p.table(row);
  const int64_t id = !has_slot(slot) ? 0 : p.cache.quantised() ? table[index] : slot / kBlockSize;
  const int previous = index > 0 ? table[index - 1] : 0;
  const bool inside =
      id > 0 && id < p.cache.num_blocks && previous >= 0 && previous < p.cache.num_blocks;
  return {row, index, inside ? static_cast<int>(id) : 0, previous};
}

// The `job`-th block that new tokens alone fill.
__device__ inline SealJob find_job(const StoreArgs& p, int job) {
  const int rows = static_cast<int>(p.num_rows), lane = threadIdx.x % 32;
  int before = 0;
  for (int first = 0; first < rows; first += 32) {
    int full = 0, index = 0;
    if (first + lane < rows) {
      const NewTokens tokens(p, first + lane);
      full = tokens.full_blocks();
      index = tokens.first_full();
    }
    const int end = before + static_cast<int>(warp_scan(full));
    const uint32_t beyond = __ballot_sync(kFullMask, end > job);
    if (beyond) {
      const int found = __ffs(beyond) - 1, row = first + found;
      const int place = __shfl_sync(kFullMask, index + job - (end - full), found);
      return seal_job(p, NewTokens(p, row), row, place);
    }
    before = __shfl_sync(kFullMask, end, 31);
  }
  return {0, -1, 0, 0};
}

// Means of V from the context's start: up to a block, and to its end. `mean`: the block's own.
__device__ inline float load_mean(const StoreArgs& p, const SealJob& job, int head, int d) {
  if (job.index == 0) return 0;
  const uint8_t* chunk = chunk_of(p.cache, job.previous, head);
  return __half2float(reinterpret_cast<const __half*>(chunk + p.codes.mean)[d]);
}
__device__ inline float store_mean(
    const StoreArgs& p, const SealJob& job, int head, int d, float mean, float before) {
  if (job.index > 0) mean = before + (mean - before) / static_cast<float>(job.index + 1);
  const __half rounded = clamped_half(mean);
  uint8_t* chunk = chunk_of(p.cache, job.id, head);
  reinterpret_cast<__half*>(chunk + p.codes.mean)[d] = rounded;
  return __half2float(rounded);
}

}  // namespace vllm_sparse::cuda
