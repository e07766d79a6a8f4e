// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Ops on the GPU: what writes blocks and copies rows out of them.
#include "entry/entry.h"

namespace vllm_sparse {

using namespace cuda;

void run_store(StoreParams& params, const Tensor& kv_cache) {
  StoreArgs p = {params};
  if (p.num_rows == 0 || p.num_tokens == 0) return;
  p.codes = Codes::of(p.cache);
  const CurrentDevice device(p.cache);
  p.max_jobs = static_cast<int>(p.num_tokens / kBlockSize);
  const int64_t heads = p.cache.num_kv_heads;
  const int64_t of_job = sizeof(SealJob) + 4 * heads * (1 + p.cache.head_size);
  std::optional<Tensor> workspace;
  if (p.max_jobs > 0) {
    workspace = workspace_like(kv_cache, of_job * p.max_jobs);
    p.jobs = static_cast<SealJob*>(workspace->data_ptr());
    p.order = reinterpret_cast<int*>(p.jobs + p.max_jobs);
    p.block_mean = reinterpret_cast<float*>(p.order + heads * p.max_jobs);
  }
  p.cache.quantised() ? launch_store_codes(device, p) : launch_store_rows(device, p);
}

void run_gather(const GatherParams& params) {
  const GatherArgs p = {params, Codes::of(params.cache)};
  const CurrentDevice device(p.cache);
  p.cache.quantised() ? launch_gather_codes(device, p) : launch_gather_rows(device, p);
}

}  // namespace vllm_sparse
