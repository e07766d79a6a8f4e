// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The launchers behind the checked entry points. None of them waits for the device.
#pragma once

#include "common.cuh"

namespace vllm_sparse::cuda {

struct StoreArgs : StoreParams {};

struct SealArgs : SealParams {
  float* block_mean;  // workspace [num_jobs, num_kv_heads, head_size]
};

struct SealRowsArgs : SealRowsParams {};

struct GatherArgs : GatherParams {
  int64_t max_blocks, num_out_tokens;
};

struct SelectArgs : SelectParams {
  int64_t max_blocks;  // columns of the block table
  uint8_t* workspace;  // [num_rows, num_kv_heads, max_blocks] records, or null
  int shared_records;  // records that fit into a thread block's shared memory
  int cluster;         // thread blocks of a (row, KV head)
};

struct AttendArgs : AttendParams {
  int64_t max_blocks;
  int64_t* tokens_read;  // or null
  int cluster;           // thread blocks of a (row, KV head)
};

// Fills in shared_records and cluster; returns the bytes of workspace that the launch needs.
int64_t plan_select(const Device& device, SelectArgs& args);

void launch_store(const Device& device, const StoreArgs& args);
void launch_seal(const Device& device, const SealArgs& args);
void launch_seal_rows(const Device& device, const SealRowsArgs& args);
void launch_gather(const Device& device, const GatherArgs& args);
void launch_select(const Device& device, const SelectArgs& args);
void launch_attend(const Device& device, AttendArgs args);

}  // namespace vllm_sparse::cuda
