// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Launching kernels.
#pragma once

#include "common/device.h"

namespace vllm_sparse::cuda {

inline cudaLaunchAttribute cluster_attribute(int size) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  return attribute;
}

// grid.x counts clusters. A kernel may start before the one ahead of it in the stream is through
// (`overlap`) if it calls wait_for_previous.
template <class Params>
void launch(const Device& device,
            void (*kernel)(Params),
            int cluster,
            dim3 grid,
            int threads,
            size_t shared_bytes,
            const Params& params,
            bool overlap = false) {
  if (shared_bytes > 16 * 1024) {  // with what the kernel declares, perhaps beyond 48 KiB
    check(cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    // Or two thread blocks of a multiprocessor may not get what both of them need.
    check(cudaFuncSetAttribute(
        kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x * cluster, grid.y, grid.z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = device.stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (cluster > 1) attributes[config.numAttrs++] = cluster_attribute(cluster);
  if (overlap && device.clusters) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace vllm_sparse::cuda
