// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Checked entry points on the GPU: what writes blocks and copies rows out of them.
// Shapes, types and devices are checked here; values lie on the device, where kernels skip or clamp
// what is out of range.
#include <optional>

#include "entry.h"

namespace vllm_sparse::cuda {

void store_kv(const Tensor& key,
              const Tensor& value,
              Tensor& kv_cache,
              const Tensor& slot_mapping) {
  check_tensor(key, "key", 3);
  StoreArgs p;
  p.cache = aligned_cache(kv_cache, key.size(2));
  set_store(key, value, slot_mapping, p);
  same_device(key, "key", kv_cache);
  same_device(value, "value", kv_cache);
  same_device(slot_mapping, "slot_mapping", kv_cache);
  const int32_t index = kv_cache.get_device_index();
  const DeviceGuard guard(index);
  launch_store(current_device(index), p);
}

void seal_blocks(Tensor& kv_cache,
                 const Tensor& block_ids,
                 const Tensor& prev_block_ids,
                 const Tensor& block_index,
                 int64_t head_size) {
  SealArgs p;
  p.cache = aligned_cache(kv_cache, head_size);
  p.num_jobs = block_ids.dim() == 1 ? block_ids.size(0) : -1;
  p.block_ids = int_vector(block_ids, "block_ids", -1, "");
  p.prev_block_ids = int_vector(prev_block_ids, "prev_block_ids", p.num_jobs, "blocks to seal");
  p.block_index = int_vector(block_index, "block_index", p.num_jobs, "blocks to seal");
  same_device(block_ids, "block_ids", kv_cache);
  same_device(prev_block_ids, "prev_block_ids", kv_cache);
  same_device(block_index, "block_index", kv_cache);
  if (p.num_jobs == 0) return;
  const int32_t index = kv_cache.get_device_index();
  const DeviceGuard guard(index);
  const Tensor workspace =
      workspace_like(kv_cache, 4 * p.num_jobs * p.cache.num_kv_heads * head_size);
  p.block_mean = static_cast<float*>(workspace.data_ptr());
  launch_seal(current_device(index), p);
}

void store_rows(const Tensor& key,
                const Tensor& value,
                Tensor& kv_cache,
                const Tensor& slot_mapping,
                const Tensor& block_table,
                const Tensor& seq_lens) {
  check_tensor(key, "key", 3);
  StoreRowsArgs p;
  p.cache = aligned_cache(kv_cache, key.size(2));
  set_store(key, value, slot_mapping, p);
  set_contexts(block_table, seq_lens, p.num_tokens, p);
  same_device(key, "key", kv_cache);
  same_device(value, "value", kv_cache);
  same_device(slot_mapping, "slot_mapping", kv_cache);
  same_device(block_table, "block_table", kv_cache);
  same_device(seq_lens, "seq_lens", kv_cache);
  const int32_t index = kv_cache.get_device_index();
  const DeviceGuard guard(index);
  launch_store_rows(current_device(index), p);
}

void seal_rows(Tensor& kv_cache,
               const Tensor& block_table,
               const Tensor& seq_lens,
               const Tensor& query_start_loc,
               int64_t head_size) {
  SealRowsArgs p{
      seal_rows_params(aligned_cache(kv_cache, head_size), block_table, seq_lens, query_start_loc)};
  same_device(block_table, "block_table", kv_cache);
  same_device(seq_lens, "seq_lens", kv_cache);
  same_device(query_start_loc, "query_start_loc", kv_cache);
  const int32_t index = kv_cache.get_device_index();
  const DeviceGuard guard(index);
  launch_seal_rows(current_device(index), p);
}

void store_quantised(const Tensor& key,
                     const Tensor& value,
                     Tensor& kv_cache,
                     const Tensor& block_table,
                     const Tensor& seq_lens,
                     const Tensor& query_start_loc,
                     int64_t kv_format) {
  check_tensor(key, "key", 3);
  STD_TORCH_CHECK(kv_format != 0, "store_quantised needs a quantised format");
  StoreQuantisedArgs p;
  p.cache = aligned_cache(kv_cache, key.size(2), kv_format);
  p.codes = Codes::of(p.cache);
  set_contexts(block_table, seq_lens, -1, p);
  p.num_rows = seq_lens.size(0);
  p.query_start_loc = int_vector(query_start_loc, "query_start_loc", p.num_rows + 1, "rows + 1");
  p.num_tokens = key.size(0) < value.size(0) ? key.size(0) : value.size(0);
  set_new_tokens(key, value, p.num_tokens, p);
  same_device(key, "key", kv_cache);
  same_device(value, "value", kv_cache);
  same_device(block_table, "block_table", kv_cache);
  same_device(seq_lens, "seq_lens", kv_cache);
  same_device(query_start_loc, "query_start_loc", kv_cache);
  const int32_t index = kv_cache.get_device_index();
  const DeviceGuard guard(index);
  // All but the tail that a request begins with is new.
  p.max_jobs = static_cast<int>(p.num_tokens / kBlockSize);
  const int64_t heads = p.cache.num_kv_heads;
  const int64_t of_means = 4 * heads * p.cache.head_size * p.max_jobs;
  std::optional<Tensor> workspace;
  if (p.max_jobs > 0) {
    workspace = workspace_like(kv_cache, of_means + (8 + 4 * heads) * p.max_jobs);
    p.block_mean = static_cast<float*>(workspace->data_ptr());
    p.jobs = reinterpret_cast<int2*>(p.block_mean + of_means / 4);
    p.order = reinterpret_cast<int*>(p.jobs + p.max_jobs);
  }
  launch_store_quantised(current_device(index), p);
}

void gather_kv(const Tensor& kv_cache,
               const Tensor& block_table,
               const Tensor& seq_lens,
               const Tensor& out_start,
               Tensor& key,
               Tensor& value,
               int64_t kv_format) {
  check_tensor(key, "key", 3);
  GatherArgs p;
  p.cache = aligned_cache(kv_cache, key.size(2), kv_format);
  p.codes = Codes::of(p.cache);
  p.num_rows = seq_lens.dim() == 1 ? seq_lens.size(0) : -1;
  p.seq_lens = rows_vector(seq_lens, "seq_lens", -1, kv_cache);
  p.block_table = block_table_of(block_table, p.num_rows, kv_cache);
  p.block_table_stride = block_table.stride(0);
  p.max_blocks = block_table.size(1);
  check_tensor(out_start, "out_start", 1);
  check_dtype(out_start, "out_start", ScalarType::Long, "int64");
  check_size(out_start, "out_start", 0, p.num_rows, "rows");
  same_device(out_start, "out_start", kv_cache);
  p.out_start = static_cast<const int64_t*>(out_start.data_ptr());
  check_heads(key, "key", p.cache);
  check_heads(value, "value", p.cache);
  STD_TORCH_CHECK(key.is_contiguous() && value.is_contiguous(), "key and value must be contiguous");
  check_size(key, "key", 1, p.cache.num_kv_heads, "num_kv_heads");
  check_size(value, "value", 1, p.cache.num_kv_heads, "num_kv_heads");
  check_size(value, "value", 0, key.size(0), "key's tokens");
  same_device(key, "key", kv_cache);
  same_device(value, "value", kv_cache);
  p.num_out_tokens = key.size(0);
  p.key = key.data_ptr();
  p.value = value.data_ptr();
  const int32_t index = kv_cache.get_device_index();
  const DeviceGuard guard(index);
  p.cache.quantised() ? launch_gather_codes(current_device(index), p)
                      : launch_gather(current_device(index), p);
}

}  // namespace vllm_sparse::cuda

STABLE_TORCH_LIBRARY_IMPL(vllm_sparse, CUDA, m) {
  m.impl("store_kv", TORCH_BOX(&vllm_sparse::cuda::store_kv));
  m.impl("seal_blocks", TORCH_BOX(&vllm_sparse::cuda::seal_blocks));
  m.impl("store_rows", TORCH_BOX(&vllm_sparse::cuda::store_rows));
  m.impl("seal_rows", TORCH_BOX(&vllm_sparse::cuda::seal_rows));
  m.impl("store_quantised", TORCH_BOX(&vllm_sparse::cuda::store_quantised));
  m.impl("gather_kv", TORCH_BOX(&vllm_sparse::cuda::gather_kv));
}
