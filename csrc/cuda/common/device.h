// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// A device as launches see it.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>

namespace vllm_sparse::cuda {

constexpr int kMaxCluster = 8;  // the largest size every Hopper and Blackwell part schedules

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next check would find this error again
  throw std::runtime_error(cudaGetErrorString(error));
}

// How many thread blocks share a (row, KV head): as many as fit on the device at once. Each has
// a cost of its own, so that more of them pay only while multiprocessors are idle.
inline int cluster_size(bool clusters, int num_sms, int64_t items) {
  int size = 1;
  while (clusters && size < kMaxCluster && 2 * size * items <= 2 * num_sms) size *= 2;
  return size;
}

struct Device {
  int index;
  cudaStream_t stream;
  bool clusters;            // and dependent launches
  bool large_clusters;      // of 16 thread blocks
  int num_sms, max_shared;  // shared memory that one thread block may have
};

}  // namespace vllm_sparse::cuda
