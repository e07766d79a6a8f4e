// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The decode kernel over rows of K and V.
#include "decode/kernel.cuh"

namespace vllm_sparse::cuda {

DecodeKernel decode_kernel_of_rows(const DecodeArgs& p) { return decode_kernel_of<false>(p); }

}  // namespace vllm_sparse::cuda
