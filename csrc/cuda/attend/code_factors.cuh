// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Factors of the products with codes: how they are shifted into fp16's range, and parameters.
#pragma once

#include "common/instructions.cuh"

namespace vllm_sparse::cuda {

constexpr int kAttendShift = 4;  // queries are 2^kAttendShift too large: few products are denormal
// Probabilities are 2^kWeightShift too large, as are their sums, until they are stored.
constexpr float kWeightShift = 4;

__device__ inline uint32_t load_word(uint32_t from) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}

// N words, 4 N bytes aligned.
template <int N>
__device__ inline void load_words(uint32_t (&r)[N], uint32_t from) {
  if constexpr (N == 4) {
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  } else {
    load_pair(r, from);
  }
}

// Scales in the lower and minima in the upper halves of two words.
__device__ inline uint32_t both_scales(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
__device__ inline uint32_t both_minima(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }

}  // namespace vllm_sparse::cuda
