// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ's channels of every (row, KV head), ahead of scoring.
#include "common/launch.cuh"
#include "select/channels.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kThreads = 512;

template <class T>
__global__ void __launch_bounds__(kThreads) channels_kernel(SelectArgs p) {
  wait_for_previous();
  let_next_begin();
  const int item = blockIdx.x, row = item / p.cache.num_kv_heads;
  const int head = item - row * p.cache.num_kv_heads;
  if (plan_row(p, row).all) return;
  const T* query =
      reinterpret_cast<const T*>(static_cast<const uint8_t*>(p.query) + row * p.query_stride);
  query += int64_t{head} * p.group * p.cache.head_size;
  choose_channels<T, kThreads, kMaxHeadSize>(p, query, PreparedItem(p, item));
}

}  // namespace

void launch_channels(const Device& device, const SelectArgs& p) {
  const dim3 grid(p.num_rows * p.cache.num_kv_heads);
  const auto kernel =
      p.cache.dtype == Dtype::kHalf ? channels_kernel<__half> : channels_kernel<__nv_bfloat16>;
  launch(device, kernel, 1, grid, kThreads, 0, p, true);
}

}  // namespace vllm_sparse::cuda
