// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ's channels of one (row, KV head), and its queries restricted to them.
#pragma once

#include "scores.cuh"

namespace vllm_sparse::cuda {

constexpr int kScoreThreads = 256;
constexpr int kScoreWarps = kScoreThreads / 32;
constexpr int kStepChannels = 32;  // channels of one step of the products
// fp16 queries carry this factor, so that products with codes, which enter as fp16 denormals, leave
// as fp16 numbers: logits times 2^(kQueryShift - 24).
constexpr int kQueryShift = 9;

__host__ __device__ inline int pad_to(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct Channels {
  float* magnitude;    // shared [kMaxHeadSize]
  int* channel;        // shared [padded rank] ascending; padding repeats a channel
  uint32_t* selected;  // shared [kMaxHeadSize / 32] bits
  __half* query;       // shared [padded group][padded rank], 0 in padding
  float (*logits)[4][kBlockSize];  // shared, of tokens that are not sealed
  int padded_rank, padded_group;
};

// Called by all threads of a block of kScoreThreads; its results may be read at once.
template <class T>
__device__ void prepare_channels(const SelectArgs& p, const Channels& s, int64_t row, int head) {
  const int size = p.cache.head_size, lane = threadIdx.x % 32;
  const T* query = reinterpret_cast<const T*>(static_cast<const uint8_t*>(p.query) +
                                              row * p.query_stride) +
                   int64_t{head} * p.group * size;
  if (threadIdx.x < size) {
    float sum = 0;
#pragma unroll 4
    for (int g = 0; g < p.group; ++g) sum += fabsf(to_float(query[g * size + threadIdx.x]));
    s.magnitude[threadIdx.x] = sum >= 0 ? sum : 0;  // NaN compares with nothing
  }
  if (threadIdx.x < kMaxHeadSize / 32) s.selected[threadIdx.x] = 0;
  __syncthreads();
  // Rank by counting who is larger; neighbouring threads share a channel.
  const int parts = size <= 64 ? 4 : size <= 128 ? 2 : 1;
  const int d = threadIdx.x / parts, part = threadIdx.x % parts;
  int place = 0;
  if (d < size) {
    const float mine = s.magnitude[d];
#pragma unroll 4
    for (int e = 4 * part; e < size; e += 4 * parts) {
      const float4 m = *reinterpret_cast<const float4*>(s.magnitude + e);
      place += (m.x > mine || (m.x == mine && e < d)) + (m.y > mine || (m.y == mine && e + 1 < d)) +
               (m.z > mine || (m.z == mine && e + 2 < d)) +
               (m.w > mine || (m.w == mine && e + 3 < d));
    }
  }
  for (int i = 1; i < parts; i *= 2) place += __shfl_xor_sync(kFullMask, place, i);
  const bool mine = d < size && part == 0 && place < p.rank;
  if (mine) atomicOr(&s.selected[d / 32], 1u << d % 32);
  __syncthreads();
  if (mine) {
    int before = __popc(s.selected[d / 32] & ((1u << d % 32) - 1));
    for (int w = 0; w < d / 32; ++w) before += __popc(s.selected[w]);
    s.channel[before] = d;
  }
  for (int c = p.rank + threadIdx.x; c < s.padded_rank; c += kScoreThreads) s.channel[c] = 0;
  __syncthreads();
  for (int g = threadIdx.x / 32; g < s.padded_group; g += kScoreWarps) {
    float all = 0, read = 0;
    for (int e = lane; e < size && g < p.group; e += 32) {
      const float x = fabsf(to_float(query[g * size + e]));
      all += x;
      if (s.selected[e / 32] >> e % 32 & 1) read += x;
    }
    all = warp_sum(all);
    read = warp_sum(read);
    const float unit = p.soft_cap > 0 ? 1 << kQueryShift : kLog2e * (1 << kQueryShift);
    const float factor = read > 0 ? unit * p.scale * sqrtf(all / read) : 0.0f;
    for (int c = lane; c < s.padded_rank; c += 32) {
      const float x =
          g < p.group && c < p.rank ? factor * to_float(query[g * size + s.channel[c]]) : 0.0f;
      s.query[g * s.padded_rank + c] = __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));
    }
  }
  __syncthreads();
}

}  // namespace vllm_sparse::cuda
