// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
#pragma once

#include "../params.h"

namespace vllm_sparse {

// The best instruction set that this CPU has, chosen on the first call.
const Kernels& kernels();

}  // namespace vllm_sparse
