// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
#include "isa.h"

namespace vllm_sparse::portable {
constexpr const char* kIsaName = "portable";
#include "kernels.inc"
}  // namespace vllm_sparse::portable
