// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// What the ops on the CPU call, and what their kernels do.
#pragma once

#include "../params.h"

namespace vllm_sparse {

// One instruction set's kernels.
struct Kernels {
  const char* name;
  void (*store)(const StoreParams&);
  void (*gather)(const GatherParams&);
  void (*select)(const SelectParams&);
  void (*attend)(const AttendParams&);
  void (*select_attend)(const SelectParams&, const AttendParams&);
};

// The best instruction set that this CPU has, chosen on the first call.
const Kernels& kernels();

// Runs fn(ctx, task) for every task in [0, num_tasks) on torch's threads, in any order.
void run_tasks(int64_t num_tasks, void (*fn)(void* ctx, int64_t task), void* ctx);

int64_t num_threads();

// 64-byte aligned memory that lives until the calling thread's next request for `slot`.
float* workspace(int slot, int64_t num_floats);

}  // namespace vllm_sparse
