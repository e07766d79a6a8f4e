// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// What all kernels compute with: number conversions, reductions, thread-block clusters.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "params.h"

namespace vllm_sparse::cuda {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;

__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline __half from_float(float x, __half) { return __float2half_rn(x); }
__device__ inline __nv_bfloat16 from_float(float x, __nv_bfloat16) {
  return __float2bfloat16_rn(x);
}

__device__ inline __half clamped_half(float x) {
  return __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));
}

__device__ inline uint8_t* chunk_of(const KvCache& cache, int64_t block, int head) {
  return cache.data + block * cache.block_stride + head * cache.head_stride;
}

// Values cannot be checked before a launch: a bad block id reads block 0, not foreign memory.
__device__ inline int64_t safe_block(const KvCache& cache, int32_t id) {
  return id >= 0 && id < cache.num_blocks ? id : 0;
}

// Results below the smallest normal number are zero, which no caller can tell apart.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Off by a few units in the last place, like the one above and those below: a fraction of the
// instructions, which matters where each runs once.
__device__ inline float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float fast_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float warp_sum(float x) {
  for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(kFullMask, x, i);
  return x;
}

// The sum over this lane and those before it.
__device__ inline uint32_t warp_scan(uint32_t x) {
  const int lane = threadIdx.x % 32;
  for (int i = 1; i < 32; i *= 2) {
    const uint32_t y = __shfl_up_sync(kFullMask, x, i);
    if (lane >= i) x += y;
  }
  return x;
}

// The largest of a warp's numbers: integers that sort like them are reduced by one instruction.
__device__ inline float warp_max(float x) {
  const int bits = __float_as_int(x), sign = bits >> 31 & 0x7fffffff;
  const int top = __reduce_max_sync(kFullMask, bits ^ sign);
  return __int_as_float(top ^ (top >> 31 & 0x7fffffff));
}

// `size` thread blocks that read each other's shared memory; 1 where there are no clusters.
__device__ inline void cluster_sync(int size) {
#if __CUDA_ARCH__ >= 900
  if (size > 1) return cooperative_groups::this_cluster().sync();
#endif
  __syncthreads();
}

// Says that this thread block has come here, and goes on. Nothing is handed over, hence no fence:
// for others to know that it has begun, or is through with their shared memory before they end.
__device__ inline void cluster_arrive(int size) {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  if (size > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

// Likewise, and what was written before is handed over.
__device__ inline void cluster_release(int size) {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  if (size > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// Until all have called one of these.
__device__ inline void cluster_wait(int size) {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  if (size > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Another thread block's copy of something in shared memory.
template <class T>
__device__ inline T* cluster_at(T* shared, int rank, int size) {
#if __CUDA_ARCH__ >= 900
  if (size > 1) {
    using Plain = std::remove_const_t<T>;
    return cooperative_groups::this_cluster().map_shared_rank(const_cast<Plain*>(shared), rank);
  }
#endif
  return shared;
}

}  // namespace vllm_sparse::cuda
