// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Storing new tokens as rows of K and V, and sealing the blocks that they fill.
#include "common/codes.cuh"
#include "common/instructions.cuh"
#include "common/launch.cuh"
#include "store/new_tokens.cuh"

namespace vllm_sparse::cuda {

namespace {

__device__ inline bool inside(const KvCache& cache, int64_t slot) {
  return has_slot(slot) && slot < cache.num_blocks * kBlockSize;
}

// One thread block per token. Word is 16 bytes, or less where the inputs are not aligned to that.
template <class Word>
__global__ void store_rows_kernel(StoreArgs p) {
  wait_for_previous();
  let_next_begin();
  const int64_t token = blockIdx.x, slot = p.slot_mapping[token];
  if (!inside(p.cache, slot) || token >= p.query_start_loc[p.num_rows]) return;
  const int words = p.cache.head_size * p.cache.element_size / static_cast<int>(sizeof(Word));
  for (int i = threadIdx.x; i < p.cache.num_kv_heads * 2 * words; i += blockDim.x) {
    const int head = i / (2 * words), word = i % (2 * words);
    const bool value = word >= words;
    uint8_t* to =
        chunk_of(p.cache, slot / kBlockSize, head) + slot % kBlockSize * p.cache.row_bytes();
    reinterpret_cast<Word*>(to)[word] = new_row<Word>(p, token, head, value)[word % words];
  }
}

// Codes and parameters of one channel of K, by the thread that has it.
template <class T>
__device__ void quantise_channel(uint8_t* chunk, int head_size, int d) {
  const T* column = reinterpret_cast<const T*>(chunk) + d;
  const int stride = 2 * head_size;
  float low = to_float(column[0]), high = low;
#pragma unroll 16
  for (int t = 1; t < kBlockSize; ++t) {
    const float k = to_float(column[t * stride]);
    low = fminf(low, k);
    high = fmaxf(high, k);
  }
  Range range;
  range.round(__fdiv_rn(__fsub_rn(high, low), 15.0f), low);
  uint8_t* sidecar = chunk + int64_t{kBlockSize} * stride * sizeof(T);
  uint4* codes = reinterpret_cast<uint4*>(sidecar + d * kCodeBytes);
#pragma unroll
  for (int four = 0; four < kLanes / 4; ++four) {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float k = to_float(column[(4 * four + i + kLanes * j) * stride]);
        const float code = fminf(fmaxf(rintf(range.place(k)), 0.0f), 15.0f);
        words[i] |= static_cast<uint32_t>(code) << (4 * j);
      }
    }
    codes[four] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  __half* params = reinterpret_cast<__half*>(sidecar + head_size * kCodeBytes);
  params[2 * d] = range.scale;
  params[2 * d + 1] = range.minimum;
}

// Mean of one channel of V over a block.
template <class T>
__device__ float mean_of_channel(const uint8_t* chunk, int head_size, int d) {
  const T* column = reinterpret_cast<const T*>(chunk) + head_size + d;
  float sum = 0;
#pragma unroll 16
  for (int t = 0; t < kBlockSize; ++t) sum += to_float(column[t * 2 * head_size]);
  return sum / kBlockSize;
}

// The first D threads quantise a channel of K each, the others average one of V and call
// mean(channel, its mean).
template <class T, class Mean>
__device__ void seal_block(const StoreArgs& p, const SealJob& job, int head, const Mean& mean) {
  const int head_size = p.cache.head_size, d = threadIdx.x % head_size;
  uint8_t* chunk = chunk_of(p.cache, job.id, head);
  if (threadIdx.x < head_size) {
    quantise_channel<T>(chunk, head_size, d);
  } else {
    mean(d, mean_of_channel<T>(chunk, head_size, d));
  }
}

// Where the mean of the block before can be read at once.
template <class T>
__device__ void seal_in_context(const StoreArgs& p, const SealJob& job, int head) {
  if (job.id == 0) return;
  seal_block<T>(p, job, head, [&](int d, float mean) {
    store_mean(p, job, head, d, mean, load_mean(p, job, head, d));
  });
}

// One thread block per (row or job, KV head), after store_rows_kernel: blocks that earlier calls
// have begun, then those that new tokens alone fill.
template <class T>
__global__ void __launch_bounds__(2 * kMaxHeadSize) seal_rows_kernel(StoreArgs p) {
  wait_for_previous();
  let_next_begin();
  const int head = blockIdx.y, row = blockIdx.x, at = row - static_cast<int>(p.num_rows);
  if (at < 0) {
    const NewTokens tokens(p, row);
    if (!tokens.fill_begun()) return;
    return seal_in_context<T>(p, seal_job(p, tokens, row, tokens.computed / kBlockSize), head);
  }
  const SealJob job = find_job(p, at);
  if (head == 0 && threadIdx.x == 0) p.jobs[at] = job;
  if (job.id == 0) return;
  seal_block<T>(p, job, head, [&](int d, float mean) {
    p.block_mean[(int64_t{at} * p.cache.num_kv_heads + head) * p.cache.head_size + d] = mean;
  });
}

// One thread block per (row, KV head) where as many tokens are stored as there are rows: but for
// padding, each brings one. Seals the block that ends with it, too: all its other tokens were
// stored in earlier launches, or here.
template <class T>
__global__ void __launch_bounds__(2 * kMaxHeadSize) store_and_seal_rows_kernel(StoreArgs p) {
  wait_for_previous();
  let_next_begin();
  const int row = blockIdx.x, head = blockIdx.y, head_size = p.cache.head_size;
  const bool value = threadIdx.x >= head_size;
  const auto element = [&](int64_t token) {
    return new_row<T>(p, token, head, value)[threadIdx.x % head_size];
  };
  // Most often the row's token: read before it is known which one that is.
  const int64_t own_slot = p.slot_mapping[row];
  const T own = element(row);
  const NewTokens tokens(p, row);
  if (!tokens.valid) return;
  for (int position = tokens.computed; position < tokens.length; ++position) {
    const int64_t token = tokens.at(position);
    const int64_t slot = token == row ? own_slot : p.slot_mapping[token];
    if (!inside(p.cache, slot)) continue;
    T* to = reinterpret_cast<T*>(chunk_of(p.cache, slot / kBlockSize, head)) +
            slot % kBlockSize * (2 * head_size);
    to[threadIdx.x] = token == row ? own : element(token);
  }
  int index = tokens.computed / kBlockSize;
  if (index == tokens.length / kBlockSize) return;
  __syncthreads();  // the rows are read back
#pragma unroll 1
  for (; index < tokens.length / kBlockSize; ++index) {
    seal_in_context<T>(p, seal_job(p, tokens, row, index), head);
  }
}

}  // namespace

void launch_store_rows(const Device& device, const StoreArgs& p) {
  const int heads = p.cache.num_kv_heads, threads = 2 * p.cache.head_size;
  const bool half = p.cache.dtype == Dtype::kHalf;
  if (p.num_tokens == p.num_rows && !p.cache.bare) {
    const auto kernel =
        half ? store_and_seal_rows_kernel<__half> : store_and_seal_rows_kernel<__nv_bfloat16>;
    return launch(device, kernel, 1, dim3(p.num_rows, heads), threads, 0, p, true);
  }
  const auto bits = reinterpret_cast<uintptr_t>(p.key) | reinterpret_cast<uintptr_t>(p.value) |
                    p.key_stride | p.value_stride | p.key_head_stride | p.value_head_stride;
  const int words = heads * 2 * p.cache.head_size * p.cache.element_size / 16;
  const auto store = bits % 16 == 0 ? store_rows_kernel<uint4> : store_rows_kernel<uint16_t>;
  const int each = bits % 16 == 0 && words < 256 ? (words + 31) / 32 * 32 : 256;
  launch(device, store, 1, dim3(p.num_tokens), each, 0, p, true);
  if (p.cache.bare) return;
  const auto seal = half ? seal_rows_kernel<__half> : seal_rows_kernel<__nv_bfloat16>;
  launch(device, seal, 1, dim3(p.num_rows + p.max_jobs, heads), threads, 0, p, true);
  launch_prefix_means(device, p);
}

}  // namespace vllm_sparse::cuda
