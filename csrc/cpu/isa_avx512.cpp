// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
#include "isa.h"

#if defined(__x86_64__)
// Compilers update their own macros after the pragma only in C or lately: say it by ours.
#define ISA_AVX512
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")
namespace vllm_sparse::avx512 {
constexpr const char* kIsaName = "avx512";
#include "kernels.inc"
}  // namespace vllm_sparse::avx512
#endif
