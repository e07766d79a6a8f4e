// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
#include "isa.h"

#if defined(__x86_64__)
#define ISA_AVX2
#pragma GCC target("avx2,fma,f16c,popcnt")
namespace vllm_sparse::avx2 {
constexpr const char* kIsaName = "avx2";
#include "kernels.inc"
}  // namespace vllm_sparse::avx2
#endif
