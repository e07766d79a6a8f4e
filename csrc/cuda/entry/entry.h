// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// What the entry points on the GPU share. Shapes, types and devices are checked there; values lie
// on the device, where kernels skip or clamp what is out of range.
#pragma once

#define VLLM_SPARSE_DEVICE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/kernels.h"
#include "ops.h"

#ifndef USE_CUDA  // a torch without CUDA can build this library, too
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace vllm_sparse::cuda {

inline Device device_properties(int32_t index) {
  Device device = {};
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  check(cudaDeviceGetAttribute(&device.num_sms, cudaDevAttrMultiProcessorCount, index));
  check(cudaDeviceGetAttribute(&device.max_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  device.index = index;
  device.clusters = major >= 9;
  device.large_clusters = major == 9 || major == 10;
  return device;
}

// The cache's device is the current one as long as this lives.
struct CurrentDevice : Device {
  torch::stable::accelerator::DeviceGuard guard;

  explicit CurrentDevice(const KvCache& cache)
      : Device(device_properties(cache.device_index)), guard(cache.device_index) {
    void* current = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &current) == 0, "no CUDA stream");
    stream = static_cast<cudaStream_t>(current);
  }
};

inline Tensor workspace_like(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace vllm_sparse::cuda
