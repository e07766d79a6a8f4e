// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Threads, scratch memory and the choice of instruction set.

#include "runtime.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace vllm_sparse {

int64_t num_threads() { return torch::stable::get_num_threads(); }

void run_tasks(int64_t num_tasks, void (*fn)(void* ctx, int64_t task), void* ctx) {
  const int64_t threads = num_threads();
  if (num_tasks <= 1 || threads <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) fn(ctx, task);
    return;
  }
  // Tasks differ in size (contexts do), so threads take the next one when they are free.
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
        fn(ctx, task);
      }
    }
  });
}

float* workspace(int slot, int64_t num_floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  constexpr int kSlots = 3;
  thread_local std::unique_ptr<float, Free> memory[kSlots];
  thread_local int64_t capacity[kSlots] = {};
  if (capacity[slot] < num_floats) {
    const int64_t floats = (num_floats + num_floats / 4 + 1023) / 1024 * 1024;
    float* p = static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float)));
    if (p == nullptr) throw std::bad_alloc();
    memory[slot].reset(p);
    capacity[slot] = floats;
  }
  return memory[slot].get();
}

namespace {

const Kernels* choose() {
  // Diagnostic override; the choice is otherwise the best set that the CPU has.
  const char* wanted = std::getenv("VLLM_SPARSE_CPU_ISA");
  const Kernels* available[3];
  int n = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    available[n++] = &avx512::kernels;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    available[n++] = &avx2::kernels;
  }
#endif
  available[n++] = &portable::kernels;
  if (wanted == nullptr) return available[0];
  std::string names;
  for (int i = 0; i < n; ++i) {
    if (std::strcmp(wanted, available[i]->name) == 0) return available[i];
    names += std::string(i ? ", " : "") + available[i]->name;
  }
  throw std::runtime_error(std::string("VLLM_SPARSE_CPU_ISA=") + wanted +
                           " is not available on this CPU; choose one of: " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

}  // namespace vllm_sparse
