// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The decode kernel over quantised blocks that hold K by token.
#include "decode/kernel.cuh"

namespace vllm_sparse::cuda {

DecodeKernel decode_kernel_of_codes(const DecodeArgs& p) { return decode_kernel_of<true>(p); }

}  // namespace vllm_sparse::cuda
