// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Checked entry points on the GPU. Shapes, types and devices are checked here; values lie on the
// device, where kernels skip or clamp what is out of range.
#define VLLM_SPARSE_DEVICE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../checks.h"
#include "kernels.h"

#ifndef USE_CUDA  // a torch without CUDA can build this library, too
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace vllm_sparse::cuda {

namespace {

using torch::stable::accelerator::DeviceGuard;

Device current_device(int32_t index) {
  Device device;
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &stream) == 0, "no CUDA stream");
  device.stream = static_cast<cudaStream_t>(stream);
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  check(cudaDeviceGetAttribute(&device.num_sms, cudaDevAttrMultiProcessorCount, index));
  check(cudaDeviceGetAttribute(&device.max_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  device.clusters = major >= 9;
  return device;
}

Tensor workspace_like(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// Kernels move K and V 16 bytes at a time.
KvCache aligned_cache(const Tensor& kv_cache, int64_t head_size) {
  const KvCache cache = kv_cache_view(kv_cache, head_size);
  STD_TORCH_CHECK(
      (reinterpret_cast<uintptr_t>(cache.data) | cache.block_stride | cache.head_stride) % 16 == 0,
      "kv_cache must be aligned to 16 bytes");
  return cache;
}

void same_device(const Tensor& t, const char* name, const Tensor& kv_cache) {
  STD_TORCH_CHECK(
      t.get_device_index() == kv_cache.get_device_index(), name, " must be on kv_cache's device");
}

const int32_t* rows_vector(const Tensor& t, const char* name, int64_t rows, const Tensor& cache) {
  same_device(t, name, cache);
  return int_vector(t, name, rows, "rows");
}

const int32_t* block_table_of(const Tensor& t, int64_t num_rows, const Tensor& kv_cache) {
  check_tensor(t, "block_table", 2);
  check_dtype(t, "block_table", ScalarType::Int, "int32");
  check_size(t, "block_table", 0, num_rows, "rows");
  same_device(t, "block_table", kv_cache);
  return static_cast<const int32_t*>(t.data_ptr());
}

// indices, counts: [num_rows, num_kv_heads, ...] int32.
int32_t* list_of(const Tensor& t,
                 const char* name,
                 int64_t dims,
                 int64_t num_rows,
                 const KvCache& cache,
                 const Tensor& kv_cache) {
  check_tensor(t, name, dims);
  check_dtype(t, name, ScalarType::Int, "int32");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  check_size(t, name, 0, num_rows, "rows");
  check_size(t, name, 1, cache.num_kv_heads, "num_kv_heads");
  same_device(t, name, kv_cache);
  return static_cast<int32_t*>(t.data_ptr());
}

float* mass_of(const std::optional<Tensor>& t, const Tensor& query, const Tensor& kv_cache) {
  if (!t) return nullptr;
  check_tensor(*t, "kept_mass", 2);
  check_dtype(*t, "kept_mass", ScalarType::Float, "float32");
  STD_TORCH_CHECK(t->is_contiguous(), "kept_mass must be contiguous");
  check_size(*t, "kept_mass", 0, query.size(0), "rows");
  check_size(*t, "kept_mass", 1, query.size(1), "num_heads");
  same_device(*t, "kept_mass", kv_cache);
  return static_cast<float*>(t->data_ptr());
}

SelectArgs select_args(const Tensor& query,
                       const Tensor& kv_cache,
                       const Tensor& block_table,
                       const Tensor& seq_lens,
                       const Tensor& budgets,
                       int64_t rank,
                       int64_t local_window,
                       int64_t sink_tokens,
                       double scale,
                       double soft_cap,
                       const Tensor& indices,
                       const Tensor& counts,
                       const std::optional<Tensor>& kept_mass) {
  check_tensor(query, "query", 3);
  SelectArgs p;
  p.cache = aligned_cache(kv_cache, query.size(2));
  same_device(query, "query", kv_cache);
  p.query_stride = check_heads(query, "query", p.cache);
  p.group = query_group(query, p.cache);
  p.query = query.data_ptr();
  p.num_rows = query.size(0);
  p.seq_lens = rows_vector(seq_lens, "seq_lens", p.num_rows, kv_cache);
  p.budgets = rows_vector(budgets, "budgets", p.num_rows, kv_cache);
  p.block_table = block_table_of(block_table, p.num_rows, kv_cache);
  p.block_table_stride = block_table.stride(0);
  p.max_blocks = block_table.size(1);
  STD_TORCH_CHECK(rank >= 1 && rank <= p.cache.head_size,
                  "rank must lie between 1 and head_size = ",
                  p.cache.head_size,
                  ", got ",
                  rank);
  STD_TORCH_CHECK(local_window >= 1, "local_window must be at least 1, got ", local_window);
  STD_TORCH_CHECK(sink_tokens >= 0, "sink_tokens must not be negative, got ", sink_tokens);
  p.rank = static_cast<int>(rank);
  p.local_window = static_cast<int>(local_window);
  p.sink_tokens = static_cast<int>(sink_tokens);
  p.scale = static_cast<float>(scale);
  p.soft_cap = static_cast<float>(soft_cap);
  p.indices = list_of(indices, "indices", 3, p.num_rows, p.cache, kv_cache);
  p.max_kept = indices.size(2);
  p.counts = list_of(counts, "counts", 2, p.num_rows, p.cache, kv_cache);
  p.kept_mass = mass_of(kept_mass, query, kv_cache);
  return p;
}

void run_select(const Device& device, SelectArgs& p, const Tensor& query) {
  if (p.num_rows == 0 || p.max_blocks == 0) return;
  const int64_t bytes = plan_select(device, p);
  const Tensor workspace = workspace_like(query, bytes);
  p.workspace = static_cast<uint8_t*>(workspace.data_ptr());
  launch_select(device, p);
}

void set_outputs(const Tensor& query,
                 const Tensor& kv_cache,
                 const Tensor& out,
                 const std::optional<Tensor>& tokens_read,
                 AttendArgs& p) {
  p.out_stride = check_heads(out, "out", p.cache);
  check_size(out, "out", 0, p.num_rows, "rows");
  check_size(out, "out", 1, query.size(1), "num_heads");
  same_device(out, "out", kv_cache);
  p.out = out.data_ptr();
  p.tokens_read = nullptr;
  if (!tokens_read) return;
  check_tensor(*tokens_read, "tokens_read", 1);
  check_dtype(*tokens_read, "tokens_read", ScalarType::Long, "int64");
  check_size(*tokens_read, "tokens_read", 0, 1, "one counter");
  same_device(*tokens_read, "tokens_read", kv_cache);
  p.tokens_read = static_cast<int64_t*>(tokens_read->data_ptr());
}

}  // namespace

void store_kv(const Tensor& key,
              const Tensor& value,
              Tensor& kv_cache,
              const Tensor& slot_mapping) {
  check_tensor(key, "key", 3);
  StoreArgs p;
  p.cache = aligned_cache(kv_cache, key.size(2));
  for (const auto& [tensor, name] : {std::pair{&key, "key"}, std::pair{&value, "value"}}) {
    check_tensor(*tensor, name, 3);
    STD_TORCH_CHECK(
        model_dtype(*tensor, name) == p.cache.dtype, name, " must have kv_cache's dtype");
    check_size(*tensor, name, 1, p.cache.num_kv_heads, "num_kv_heads");
    check_size(*tensor, name, 2, p.cache.head_size, "head_size");
    same_device(*tensor, name, kv_cache);
  }
  check_tensor(slot_mapping, "slot_mapping", 1);
  check_dtype(slot_mapping, "slot_mapping", ScalarType::Long, "int64");
  same_device(slot_mapping, "slot_mapping", kv_cache);
  p.num_tokens = slot_mapping.size(0);  // key and value may be padded beyond it
  STD_TORCH_CHECK(key.size(0) >= p.num_tokens && value.size(0) >= p.num_tokens,
                  "key and value must hold at least slot_mapping's ",
                  p.num_tokens,
                  " tokens");
  p.key = key.data_ptr();
  p.value = value.data_ptr();
  p.key_stride = key.stride(0) * p.cache.element_size;
  p.value_stride = value.stride(0) * p.cache.element_size;
  p.key_head_stride = key.stride(1) * p.cache.element_size;
  p.value_head_stride = value.stride(1) * p.cache.element_size;
  p.slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr());
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

void gather_kv(const Tensor& kv_cache,
               const Tensor& block_table,
               const Tensor& seq_lens,
               const Tensor& out_start,
               Tensor& key,
               Tensor& value) {
  check_tensor(key, "key", 3);
  GatherArgs p;
  p.cache = aligned_cache(kv_cache, key.size(2));
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
  launch_gather(current_device(index), p);
}

void sparq_select(const Tensor& query,
                  const Tensor& kv_cache,
                  const Tensor& block_table,
                  const Tensor& seq_lens,
                  const Tensor& budgets,
                  int64_t rank,
                  int64_t local_window,
                  int64_t sink_tokens,
                  double scale,
                  double soft_cap,
                  Tensor& indices,
                  Tensor& counts,
                  std::optional<Tensor> kept_mass) {
  SelectArgs p = select_args(query,
                             kv_cache,
                             block_table,
                             seq_lens,
                             budgets,
                             rank,
                             local_window,
                             sink_tokens,
                             scale,
                             soft_cap,
                             indices,
                             counts,
                             kept_mass);
  const int32_t index = kv_cache.get_device_index();
  const DeviceGuard guard(index);
  run_select(current_device(index), p, query);
}

void sparq_attend(const Tensor& query,
                  const Tensor& kv_cache,
                  const Tensor& block_table,
                  const Tensor& seq_lens,
                  const Tensor& budgets,
                  int64_t rank,
                  int64_t local_window,
                  int64_t sink_tokens,
                  double scale,
                  double soft_cap,
                  Tensor& indices,
                  Tensor& counts,
                  std::optional<Tensor> kept_mass,
                  Tensor& out,
                  std::optional<Tensor> tokens_read) {
  SelectArgs s = select_args(query,
                             kv_cache,
                             block_table,
                             seq_lens,
                             budgets,
                             rank,
                             local_window,
                             sink_tokens,
                             scale,
                             soft_cap,
                             indices,
                             counts,
                             kept_mass);
  AttendArgs p;
  p.cache = s.cache;
  p.query = s.query;
  p.query_stride = s.query_stride;
  p.block_table = s.block_table;
  p.block_table_stride = s.block_table_stride;
  p.max_blocks = s.max_blocks;
  p.seq_lens = s.seq_lens;
  p.indices = s.indices;
  p.max_kept = s.max_kept;
  p.counts = s.counts;
  p.kept_mass = s.kept_mass;
  p.num_rows = s.num_rows;
  p.group = s.group;
  p.scale = s.scale;
  p.soft_cap = s.soft_cap;
  set_outputs(query, kv_cache, out, tokens_read, p);
  if (p.num_rows == 0 || p.max_blocks == 0) return;
  const int32_t index = kv_cache.get_device_index();
  const DeviceGuard guard(index);
  const Device device = current_device(index);
  run_select(device, s, query);
  launch_attend(device, p);
}

void attend(const Tensor& query,
            const Tensor& kv_cache,
            const Tensor& block_table,
            const Tensor& seq_lens,
            std::optional<Tensor> indices,
            std::optional<Tensor> counts,
            std::optional<Tensor> kept_mass,
            double scale,
            double soft_cap,
            Tensor& out,
            std::optional<Tensor> tokens_read) {
  check_tensor(query, "query", 3);
  AttendArgs p;
  p.cache = aligned_cache(kv_cache, query.size(2));
  same_device(query, "query", kv_cache);
  p.query_stride = check_heads(query, "query", p.cache);
  p.group = query_group(query, p.cache);
  p.query = query.data_ptr();
  p.num_rows = query.size(0);
  p.seq_lens = rows_vector(seq_lens, "seq_lens", p.num_rows, kv_cache);
  p.block_table = block_table_of(block_table, p.num_rows, kv_cache);
  p.block_table_stride = block_table.stride(0);
  p.max_blocks = block_table.size(1);
  p.scale = static_cast<float>(scale);
  p.soft_cap = static_cast<float>(soft_cap);
  STD_TORCH_CHECK(indices.has_value() == counts.has_value(),
                  "indices and counts must be given together");
  p.indices = nullptr;
  p.counts = nullptr;
  p.max_kept = 0;
  if (indices) {
    p.indices = list_of(*indices, "indices", 3, p.num_rows, p.cache, kv_cache);
    p.counts = list_of(*counts, "counts", 2, p.num_rows, p.cache, kv_cache);
    p.max_kept = indices->size(2);
  }
  p.kept_mass = mass_of(kept_mass, query, kv_cache);
  set_outputs(query, kv_cache, out, tokens_read, p);
  if (p.num_rows == 0 || p.max_blocks == 0) return;
  const int32_t index = kv_cache.get_device_index();
  const DeviceGuard guard(index);
  launch_attend(current_device(index), p);
}

}  // namespace vllm_sparse::cuda

STABLE_TORCH_LIBRARY_IMPL(vllm_sparse, CUDA, m) {
  m.impl("store_kv", TORCH_BOX(&vllm_sparse::cuda::store_kv));
  m.impl("seal_blocks", TORCH_BOX(&vllm_sparse::cuda::seal_blocks));
  m.impl("gather_kv", TORCH_BOX(&vllm_sparse::cuda::gather_kv));
  m.impl("sparq_select", TORCH_BOX(&vllm_sparse::cuda::sparq_select));
  m.impl("sparq_attend", TORCH_BOX(&vllm_sparse::cuda::sparq_attend));
  m.impl("attend", TORCH_BOX(&vllm_sparse::cuda::attend));
}
