// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// What the checked entry points on the GPU share: devices, streams, views of the cache.
#pragma once

#define VLLM_SPARSE_DEVICE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "kernels.h"

#ifndef USE_CUDA  // a torch without CUDA can build this library, too
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace vllm_sparse::cuda {

using torch::stable::accelerator::DeviceGuard;

inline Device device_properties(int32_t index) {
  Device device = {};
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  check(cudaDeviceGetAttribute(&device.num_sms, cudaDevAttrMultiProcessorCount, index));
  check(cudaDeviceGetAttribute(&device.max_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  device.clusters = major >= 9;
  device.large_clusters = major == 9 || major == 10;
  return device;
}

inline Device current_device(int32_t index) {
  Device device = device_properties(index);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &stream) == 0, "no CUDA stream");
  device.stream = static_cast<cudaStream_t>(stream);
  return device;
}

inline Tensor workspace_like(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// Kernels move K and V 16 bytes at a time.
inline KvCache aligned_cache(const Tensor& kv_cache, int64_t head_size, int64_t format = 0) {
  const KvCache cache = kv_cache_view(kv_cache, head_size, format);
  STD_TORCH_CHECK(
      (reinterpret_cast<uintptr_t>(cache.data) | cache.block_stride | cache.head_stride) % 16 == 0,
      "kv_cache must be aligned to 16 bytes");
  return cache;
}

inline void same_device(const Tensor& t, const char* name, const Tensor& kv_cache) {
  STD_TORCH_CHECK(
      t.get_device_index() == kv_cache.get_device_index(), name, " must be on kv_cache's device");
}

inline const int32_t* rows_vector(const Tensor& t,
                                  const char* name,
                                  int64_t rows,
                                  const Tensor& cache) {
  same_device(t, name, cache);
  return int_vector(t, name, rows, "rows");
}

inline const int32_t* block_table_of(const Tensor& t, int64_t num_rows, const Tensor& kv_cache) {
  check_tensor(t, "block_table", 2);
  check_dtype(t, "block_table", ScalarType::Int, "int32");
  check_size(t, "block_table", 0, num_rows, "rows");
  same_device(t, "block_table", kv_cache);
  return static_cast<const int32_t*>(t.data_ptr());
}

}  // namespace vllm_sparse::cuda
