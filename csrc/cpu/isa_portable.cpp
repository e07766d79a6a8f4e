// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
#include "isa.h"

namespace vllm_sparse::portable {
#include "kernels.inc"
const Kernels kernels = {"portable", store, gather, select, attend, select_attend};
}  // namespace vllm_sparse::portable
