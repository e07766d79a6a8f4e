// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Asynchronous copies, matrix products and dependent launches: thin names for instructions.
#pragma once

#include "common/primitives.cuh"

namespace vllm_sparse::cuda {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Sixteen bytes that are not needed again: what other kernels share stays in the L2 instead.
__device__ inline void copy_async_16(uint32_t to, const void* from) {
#if __CUDA_ARCH__ == 900
  constexpr uint64_t kEvictFirst = 0x12f0000000000000;  // as createpolicy makes it
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to),
               "l"(from),
               "l"(kEvictFirst)
               : "memory");
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#endif
}

// Four bytes of which `bytes` (4 or 0) are read and the others become zero.
__device__ inline void copy_async_4(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// Sixteen bytes, of which `bytes` (16 or 0) are read and the others become zero.
__device__ inline void copy_async_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// Bytes that neighbours share a sector with: 4, 8 or 16.
template <int N>
__device__ inline void copy_async_params(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(N) : "memory");
}

// A line of the L2.
__device__ inline void prefetch_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups are under way.
template <int N>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ inline void load_pair(uint32_t (&r)[2], uint32_t from) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
}

__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// d = a * b + c, [16, 16] times [16, 8].
template <class T>
__device__ inline void mma(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
#define VLLM_SPARSE_MMA(type)                                          \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type           \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                 \
      : "r"(a[0]),                                                     \
        "r"(a[1]),                                                     \
        "r"(a[2]),                                                     \
        "r"(a[3]),                                                     \
        "r"(b0),                                                       \
        "r"(b1),                                                       \
        "f"(c[0]),                                                     \
        "f"(c[1]),                                                     \
        "f"(c[2]),                                                     \
        "f"(c[3]))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    VLLM_SPARSE_MMA("bf16");
  } else {
    VLLM_SPARSE_MMA("f16");
  }
#undef VLLM_SPARSE_MMA
}

// Until the kernels before this one in the stream are complete and their results visible.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may begin once every thread block of this one has said so. Before it reads what
// this kernel writes, it waits.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline __half2 as_half2(uint32_t x) { return reinterpret_cast<const __half2&>(x); }
__device__ inline uint32_t as_word(__half2 x) { return reinterpret_cast<const uint32_t&>(x); }

__device__ inline __half2 exp2_half2(__half2 x) {
  uint32_t y;
  asm("ex2.approx.f16x2 %0, %1;" : "=r"(y) : "r"(as_word(x)));
  return as_half2(y);
}

}  // namespace vllm_sparse::cuda
