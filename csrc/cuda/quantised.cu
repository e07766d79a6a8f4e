// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Storing new tokens in quantised blocks, and sealing those that they fill (KIVI, arXiv
// 2402.02750).
#include "codes.cuh"
#include "pipeline.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kThreads = 512;

__device__ inline __half clamped_half(float x) {
  return __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));
}

// A request's new tokens.
struct NewTokens {
  int start, count, computed, length;
  bool valid;

  __device__ NewTokens(const StoreQuantisedArgs& p, int row) {
    start = p.query_start_loc[row];
    count = p.query_start_loc[row + 1] - start;
    length = p.seq_lens[row];
    computed = length - count;
    const int64_t blocks = (int64_t{length} + kBlockSize - 1) / kBlockSize + p.codes.ahead;
    // Values are not checked on the host; a length of 0 is padding.
    valid = count > 0 && computed >= 0 && start >= 0 && blocks <= p.max_blocks &&
            int64_t{start} + count <= p.num_tokens;
  }
  // Drafts may be rejected: all of a few tokens are kept as rows.
  __device__ bool few(const StoreQuantisedArgs& p) const { return count <= p.codes.rows; }
  // The first block that they alone fill, and how many more.
  __device__ int first_full() const { return (computed + kBlockSize - 1) / kBlockSize; }
  __device__ int full_blocks() const {
    return valid ? max(0, length / kBlockSize - first_full()) : 0;
  }
};

// Half of a new token's row of one head.
template <class T>
__device__ inline const T* new_row(const StoreQuantisedArgs& p,
                                   int64_t token,
                                   int head,
                                   bool value) {
  const void* from = value ? p.value : p.key;
  const int64_t stride = value ? p.value_stride : p.key_stride;
  const int64_t head_stride = value ? p.value_head_stride : p.key_head_stride;
  return reinterpret_cast<const T*>(static_cast<const uint8_t*>(from) + token * stride +
                                    head * head_stride);
}

// fp16 numbers (scale, minimum) of a range, rounded before codes are taken.
struct Range {
  __half scale, minimum;
  float base, divisor;
  __device__ void round(float step, float low) {
    scale = __float2half_rn(fminf(step, 65504.0f));
    minimum = clamped_half(low);
    base = __half2float(minimum);
    divisor = __half2float(scale) > 0 ? __half2float(scale) : 1.0f;
  }
  __device__ float place(float x) const { return __fdiv_rn(__fsub_rn(x, base), divisor); }
};

// K of a block: a thread takes 16 tokens of a channel, which share a nibble of its words. The
// operations and their order are the reference's.
template <class T, int kBits, int kGroups>
__device__ void quantise_keys(const StoreQuantisedArgs& p, const T* const* rows, uint8_t* chunk) {
  constexpr int kParts = kBlockSize / kLanes, kChannels = kThreads / kParts;
  constexpr int kPlanes = kBits / 4, kEach = kParts / kGroups;  // parts of a group
  __shared__ float2 ends[kParts][kChannels];
  __shared__ uint32_t words[kPlanes][kChannels][kLanes + 1];
  const int part = threadIdx.x / kChannels, c = threadIdx.x % kChannels;
  for (int first = 0; first < p.cache.head_size; first += kChannels) {
    const int d = first + c, count = min(kChannels, p.cache.head_size - first);
    float k[kLanes], low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      k[i] = c < count ? to_float(rows[part * kLanes + i][d]) : 0;
      low = fminf(low, k[i]);
      high = fmaxf(high, k[i]);
    }
    __syncthreads();  // the words of the channels before are stored
    ends[part][c] = {low, high};
    for (int i = threadIdx.x; i < kPlanes * kChannels * (kLanes + 1); i += kThreads) {
      (&words[0][0][0])[i] = 0;
    }
    __syncthreads();
    const int group = part / kEach;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float2 other = ends[group * kEach + i][c];
      low = fminf(low, other.x);
      high = fmaxf(high, other.y);
    }
    Range range;
    if constexpr (kBits == 8) {
      const float step = __fdiv_rn(__fsub_rn(high, low), 255.0f);
      const float shift = __fsub_rn(__fmul_rn(step, 8.0f), __fmul_rn(step, 0.5f));
      range.round(__fmul_rn(step, 16.0f), __fadd_rn(low, shift));
      if (__half2float(range.scale) > 0) range.divisor *= 0.0625f;
    } else {
      range.round(__fdiv_rn(__fsub_rn(high, low), 15.0f), low);
    }
    if (c < count && part % kEach == 0) {
      reinterpret_cast<__half2*>(chunk + p.codes.params)[d * kGroups + group] =
          __halves2half2(range.scale, range.minimum);
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float x = range.place(k[i]);
      if constexpr (kBits == 8) {
        const uint32_t code =
            static_cast<uint32_t>(fminf(fmaxf(rintf(__fadd_rn(x, 7.5f)), 0.0f), 255.0f));
        atomicOr(&words[0][c][i], (code >> 4) << (4 * part));
        atomicOr(&words[1][c][i], (code & 15) << (4 * part));
      } else {
        const uint32_t code = static_cast<uint32_t>(fminf(fmaxf(rintf(x), 0.0f), 15.0f));
        atomicOr(&words[0][c][i], code << (4 * part));
      }
    }
    __syncthreads();
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      uint32_t* to = reinterpret_cast<uint32_t*>(chunk + (plane ? p.codes.low_codes : 0));
      for (int i = threadIdx.x; i < count * kLanes; i += kThreads) {
        to[first * kLanes + i] = words[plane][i / kLanes][i % kLanes];
      }
    }
  }
}

// Codes by token, in groups of channels, and where they go in a chunk.
struct TokenCodes {
  int bits, group, code_bytes, param_bytes;  // bytes of a token
  uint8_t *codes, *params;
};

// Half a warp takes a group of channels of a token.
template <class T>
__device__ void quantise_tokens(int head_size, const T* const* rows, const TokenCodes& out) {
  constexpr int kMost = kMaxHeadSize / 16;  // sixteens of channels of a group
  const int each = out.group / 16, groups = head_size / out.group;
  const int c = threadIdx.x % 16;
  const float most = out.bits == 8 ? 255.0f : 15.0f;
  for (int task = threadIdx.x / 16; task < kBlockSize * groups; task += kThreads / 16) {
    const int token = task / groups, group = task % groups;
    const int first = group * out.group;
    float x[kMost], low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= each) break;
      x[i] = to_float(rows[token][first + 16 * i + c]);
      low = fminf(low, x[i]);
      high = fmaxf(high, x[i]);
    }
    for (int i = 1; i < 16; i *= 2) {
      low = fminf(low, __shfl_xor_sync(kFullMask, low, i));
      high = fmaxf(high, __shfl_xor_sync(kFullMask, high, i));
    }
    Range range;
    range.round(__fdiv_rn(__fsub_rn(high, low), most), low);
    if (c == 0) {
      reinterpret_cast<__half2*>(out.params + token * out.param_bytes)[group] =
          __halves2half2(range.scale, range.minimum);
    }
    uint8_t* to = out.codes + token * out.code_bytes;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= each) break;
      const uint32_t code =
          static_cast<uint32_t>(fminf(fmaxf(rintf(range.place(x[i])), 0.0f), most));
      const uint32_t other = __shfl_down_sync(kFullMask, code, 8, 16);
      if (out.bits == 8) {
        to[first + 16 * i + c] = static_cast<uint8_t>(code);
      } else if (c < 8) {
        to[(first + 16 * i) / 2 + c] = static_cast<uint8_t>(code | other << 4);
      }
    }
  }
}

// Seals a block of a context: K or V, of which `old` tokens are rows of its tail and the others
// new. Calls mean(channel, mean of V over the block).
template <class T, class Mean>
__device__ void seal_block(const StoreQuantisedArgs& p,
                           const NewTokens& tokens,
                           int row,
                           int index,
                           int head,
                           bool value,
                           const Mean& mean) {
  __shared__ const T* rows[kBlockSize];
  const int32_t* table = p.block_table + row * p.block_table_stride;
  const int32_t id = table[index];
  // Block 0 is vLLM's null block, which pads tables and is never written.
  if (id <= 0 || id >= p.cache.num_blocks) return;
  const int size = p.cache.head_size;
  for (int t = threadIdx.x; t < kBlockSize; t += kThreads) {
    const int position = index * kBlockSize + t - tokens.computed;  // among the new ones
    rows[t] = position < 0 ? reinterpret_cast<const T*>(tail_row(p, table, head, index, t)) +
                                 (value ? size : 0)
                           : new_row<T>(p, tokens.start + int64_t{position}, head, value);
  }
  __syncthreads();
  uint8_t* chunk = chunk_of(p.cache, id, head);
  if (value) {
    quantise_tokens<T>(size,
                       rows,
                       {p.cache.value_bits,
                        p.cache.value_group,
                        p.codes.value_code_bytes,
                        p.codes.value_param_bytes,
                        chunk + p.codes.value_codes,
                        chunk + p.codes.value_params});
    if (!p.cache.has_mean) return;
    constexpr int kParts = 8, kTokens = kBlockSize / kParts;
    __shared__ float partial[kParts][kThreads / kParts];
    const int part = threadIdx.x / (kThreads / kParts), c = threadIdx.x % (kThreads / kParts);
    for (int first = 0; first < size; first += kThreads / kParts) {
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
  if (p.cache.key_rows) {
    uint8_t *to = chunk + p.codes.key_rows, *params = chunk + p.codes.key_row_params;
    quantise_tokens<T>(size, rows, {8, size, size, 4, to, params});
  }
  if (p.cache.key_bits == 8) {
    quantise_keys<T, 8, 1>(p, rows, chunk);
  } else if (p.cache.key_groups == 1) {
    quantise_keys<T, 4, 1>(p, rows, chunk);
  } else {
    quantise_keys<T, 4, 4>(p, rows, chunk);
  }
}

// Means up to the end of a block: `mean` is the block's own.
__device__ inline float store_mean(const StoreQuantisedArgs& p,
                                   const int32_t* table,
                                   int index,
                                   int head,
                                   int d,
                                   float mean,
                                   float before) {
  if (index > 0) mean = before + (mean - before) / static_cast<float>(index + 1);
  const __half rounded = clamped_half(mean);
  uint8_t* chunk = chunk_of(p.cache, table[index], head);
  reinterpret_cast<__half*>(chunk + p.codes.mean)[d] = rounded;
  return __half2float(rounded);
}
__device__ inline float load_mean(
    const StoreQuantisedArgs& p, const int32_t* table, int index, int head, int d) {
  if (index == 0) return 0;
  const uint8_t* chunk = chunk_of(p.cache, safe_block(p.cache, table[index - 1]), head);
  return __half2float(reinterpret_cast<const __half*>(chunk + p.codes.mean)[d]);
}

// New tokens from `position` on, as rows.
template <class T>
__device__ void store_tail(const StoreQuantisedArgs& p,
                           const NewTokens& tokens,
                           int row,
                           int position,
                           int head,
                           bool value) {
  const int size = p.cache.head_size;
  const int32_t* table = p.block_table + row * p.block_table_stride;
  for (int i = threadIdx.x; i < (tokens.length - position) * size; i += kThreads) {
    const int at = position + i / size, d = i % size;
    const int offset = at % kBlockSize;
    const int32_t id = table[tail_place(p.codes, at / kBlockSize, offset)];
    if (id < 0 || id >= p.cache.num_blocks) continue;
    T* to = reinterpret_cast<T*>(chunk_of(p.cache, id, head) +
                                 offset % p.codes.rows * p.cache.row_bytes());
    const int64_t token = tokens.start + int64_t{at} - tokens.computed;
    to[(value ? size : 0) + d] = new_row<T>(p, token, head, value)[d];
  }
}

// One thread block per (row, KV head, K or V): seals the block that has a tail, if it is filled,
// and stores the rows of requests with few new tokens. Such rows never lie where the tail does.
template <class T>
__global__ void __launch_bounds__(kThreads) store_kernel(StoreQuantisedArgs p) {
  wait_for_previous();
  let_next_begin();
  const int row = blockIdx.x, head = blockIdx.y;
  const bool value = blockIdx.z;
  const NewTokens tokens(p, row);
  if (!tokens.valid) return;
  const int index = tokens.computed / kBlockSize;
  if (tokens.computed % kBlockSize > 0 && index < tokens.length / kBlockSize) {
    // The block before this one was sealed in an earlier call: its mean can be read at once.
    const int32_t* table = p.block_table + row * p.block_table_stride;
    seal_block<T>(p, tokens, row, index, head, value, [&](int d, float mean) {
      store_mean(p, table, index, head, d, mean, load_mean(p, table, index, head, d));
    });
  }
  if (tokens.few(p)) store_tail<T>(p, tokens, row, tokens.computed, head, value);
}

// The row and place of the `job`-th block that new tokens alone fill; row -1: there are fewer.
__device__ int2 find_job(const StoreQuantisedArgs& p, int job) {
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
      const int found = __ffs(beyond) - 1;
      const int place = index + job - (end - full);
      return {first + found, __shfl_sync(kFullMask, place, found)};
    }
    before = __shfl_sync(kFullMask, end, 31);
  }
  return {-1, 0};
}

// After store_kernel, as tails lie in the chunks of blocks that are sealed here: blocks that new
// tokens alone fill, then the last rows of requests with many new tokens.
template <class T>
__global__ void __launch_bounds__(kThreads) store_many_kernel(StoreQuantisedArgs p) {
  wait_for_previous();
  let_next_begin();
  const int head = blockIdx.y, job = blockIdx.x;
  const bool value = blockIdx.z;
  if (job >= p.max_jobs) {
    const int row = job - p.max_jobs;
    const NewTokens tokens(p, row);
    if (!tokens.valid || tokens.few(p)) return;
    const int last = (tokens.length - 1) / kBlockSize * kBlockSize;
    return store_tail<T>(p, tokens, row, max(tokens.computed, last), head, value);
  }
  const int2 found = find_job(p, job);
  if (value && head == 0 && threadIdx.x == 0) p.jobs[job] = found;
  if (found.x < 0) return;
  const NewTokens tokens(p, found.x);
  seal_block<T>(p, tokens, found.x, found.y, head, value, [&](int d, float mean) {
    p.block_mean[(int64_t{job} * p.cache.num_kv_heads + head) * p.cache.head_size + d] = mean;
  });
}

// One thread block per KV head takes the jobs in the order of their places: a prefix that one
// request stores may be shared by the next.
__global__ void store_means_kernel(StoreQuantisedArgs p) {
  wait_for_previous();
  let_next_begin();
  const int head = blockIdx.x, size = p.cache.head_size;
  int* order = p.order + int64_t{head} * p.max_jobs;
  for (int j = threadIdx.x; j < p.max_jobs; j += blockDim.x) {
    const int2 mine = p.jobs[j];
    int rank = 0;
    for (int k = 0; k < p.max_jobs; ++k) {
      const int2 other = p.jobs[k];
      const bool sooner = other.y < mine.y || (other.y == mine.y && k < j);
      rank += (other.x < 0) == (mine.x < 0) ? sooner : other.x >= 0;
    }
    order[rank] = j;
  }
  __syncthreads();
  int last_id = -1;
  float last = 0;
  const int d = threadIdx.x;
  if (d >= size) return;
  for (int k = 0; k < p.max_jobs; ++k) {
    const int j = order[k];
    const int2 job = p.jobs[j];
    if (job.x < 0) return;
    const int32_t* table = p.block_table + job.x * p.block_table_stride;
    const int32_t id = table[job.y];
    if (id <= 0 || id >= p.cache.num_blocks) continue;
    const float mean = p.block_mean[(int64_t{j} * p.cache.num_kv_heads + head) * size + d];
    const bool known = job.y > 0 && table[job.y - 1] == last_id;
    last = store_mean(
        p, table, job.y, head, d, mean, known ? last : load_mean(p, table, job.y, head, d));
    last_id = id;
  }
}

template <class T>
void launch_typed(const Device& device, const StoreQuantisedArgs& p) {
  const int heads = p.cache.num_kv_heads;
  launch(device, store_kernel<T>, 1, dim3(p.num_rows, heads, 2), kThreads, 0, p, true);
  if (p.num_tokens <= p.codes.rows) return;
  const dim3 grid(p.max_jobs + p.num_rows, heads, 2);
  launch(device, store_many_kernel<T>, 1, grid, kThreads, 0, p, true);
  if (p.max_jobs == 0 || !p.cache.has_mean) return;
  const int threads = (p.cache.head_size + 31) / 32 * 32;
  launch(device, store_means_kernel, 1, dim3(heads), threads, 0, p, true);
}

}  // namespace

void launch_store_quantised(const Device& device, const StoreQuantisedArgs& p) {
  if (p.num_rows == 0 || p.num_tokens == 0) return;
  switch (p.cache.dtype) {
    case Dtype::kHalf: return launch_typed<__half>(device, p);
    case Dtype::kBFloat16: return launch_typed<__nv_bfloat16>(device, p);
    default: launch_typed<float>(device, p);
  }
}

}  // namespace vllm_sparse::cuda
