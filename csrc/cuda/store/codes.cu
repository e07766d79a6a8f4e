// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Storing new tokens in quantised blocks, and sealing those that they fill.
#include "common/codes.cuh"
#include "common/instructions.cuh"
#include "common/launch.cuh"
#include "common/tails.cuh"
#include "store/new_tokens.cuh"

namespace vllm_sparse::cuda {

namespace {

// Seals K or V of a block, of which some tokens may be rows of its tail and the others are new.
// Calls mean(channel, mean of V over the block).
template <class T, class Mean>
__device__ void seal_block(const StoreArgs& p,
                           const NewTokens& tokens,
                           const SealJob& job,
                           int head,
                           bool value,
                           const Mean& mean) {
  __shared__ const T* rows[kBlockSize];
  if (job.id == 0) return;
  const int32_t* table = p.table(job.row);
  const int size = p.cache.head_size;
  for (int t = threadIdx.x; t < kBlockSize; t += kSealThreads) {
    const int position = job.index * kBlockSize + t;
    rows[t] = position < tokens.computed
                  ? reinterpret_cast<const T*>(tail_row(p, table, head, job.index, t)) +
                        (value ? size : 0)
                  : new_row<T>(p, tokens.at(position), head, value);
  }
  __syncthreads();
  uint8_t* chunk = chunk_of(p.cache, job.id, head);
  if (value) {
    write_values<T>(p, size, rows, chunk);
    if (!p.cache.has_mean) return;
    constexpr int kParts = 8, kTokens = kBlockSize / kParts, kChannels = kSealThreads / kParts;
    __shared__ float partial[kParts][kChannels];
    const int part = threadIdx.x / kChannels, c = threadIdx.x % kChannels;
    for (int first = 0; first < size; first += kChannels) {
      const int d = first + c;
      float sum = 0;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (d < size) sum += to_float(rows[part * kTokens + t][d]);
      }
      partial[part][c] = sum;
      __syncthreads();
      if (part == 0 && d < size) {
        for (int i = 1; i < kParts; ++i) sum += partial[i][c];
        mean(d, sum / kBlockSize);
      }
      __syncthreads();
    }
    return;
  }
  write_keys<T>(p, size, rows, chunk);
}

// New tokens from `position` on, as rows.
template <class T>
__device__ void store_tail(
    const StoreArgs& p, const NewTokens& tokens, int row, int position, int head, bool value) {
  const int size = p.cache.head_size;
  const int32_t* table = p.table(row);
  for (int i = threadIdx.x; i < (tokens.length - position) * size; i += kSealThreads) {
    const int at = position + i / size, d = i % size;
    const int offset = at % kBlockSize;
    const int64_t token = tokens.at(at);
    const int32_t id = table[tail_place(p.codes, at / kBlockSize, offset)];
    if (id <= 0 || id >= p.cache.num_blocks || !has_slot(p.slot_mapping[token])) continue;
    T* to = reinterpret_cast<T*>(chunk_of(p.cache, id, head) +
                                 offset % p.codes.rows * p.cache.row_bytes());
    to[(value ? size : 0) + d] = new_row<T>(p, token, head, value)[d];
  }
}

// One thread block per (row, KV head, K or V): stores the rows of requests with few new tokens, and
// seals the block that has a tail, if it is filled. New rows never lie where that tail does.
template <class T>
__global__ void __launch_bounds__(kSealThreads) store_codes_kernel(StoreArgs p) {
  wait_for_previous();
  let_next_begin();
  const int row = blockIdx.x, head = blockIdx.y;
  const bool value = blockIdx.z;
  const NewTokens tokens(p, row);
  if (!tokens.valid) return;
  if (tokens.few(p)) store_tail<T>(p, tokens, row, tokens.computed, head, value);
  if (tokens.fill_begun()) {
    const SealJob job = seal_job(p, tokens, row, tokens.computed / kBlockSize);
    seal_block<T>(p, tokens, job, head, value, [&](int d, float mean) {
      store_mean(p, job, head, d, mean, load_mean(p, job, head, d));
    });
  }
}

// After store_codes_kernel, as tails lie in the chunks of blocks that are sealed here: blocks that
// new tokens alone fill, then the last rows of requests with many new tokens.
template <class T>
__global__ void __launch_bounds__(kSealThreads) store_code_blocks_kernel(StoreArgs p) {
  wait_for_previous();
  let_next_begin();
  const int head = blockIdx.y, at = blockIdx.x;
  const bool value = blockIdx.z;
  if (at >= p.max_jobs) {
    const int row = at - p.max_jobs;
    const NewTokens tokens(p, row);
    if (!tokens.valid || tokens.few(p)) return;
    const int last = (tokens.length - 1) / kBlockSize * kBlockSize;
    return store_tail<T>(p, tokens, row, max(tokens.computed, last), head, value);
  }
  const SealJob job = find_job(p, at);
  if (value && head == 0 && threadIdx.x == 0) p.jobs[at] = job;
  if (job.id == 0) return;
  seal_block<T>(p, NewTokens(p, job.row), job, head, value, [&](int d, float mean) {
    p.block_mean[(int64_t{at} * p.cache.num_kv_heads + head) * p.cache.head_size + d] = mean;
  });
}

template <class T>
void launch_typed(const Device& device, const StoreArgs& p) {
  const int heads = p.cache.num_kv_heads;
  launch(device, store_codes_kernel<T>, 1, dim3(p.num_rows, heads, 2), kSealThreads, 0, p, true);
  if (p.num_tokens <= p.codes.rows) return;
  const dim3 grid(p.max_jobs + p.num_rows, heads, 2);
  launch(device, store_code_blocks_kernel<T>, 1, grid, kSealThreads, 0, p, true);
  launch_prefix_means(device, p);
}

}  // namespace

void launch_store_codes(const Device& device, const StoreArgs& p) {
  p.cache.dtype == Dtype::kHalf ? launch_typed<__half>(device, p)
                                : launch_typed<__nv_bfloat16>(device, p);
}

}  // namespace vllm_sparse::cuda
