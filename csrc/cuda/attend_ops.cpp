// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Checked entry points on the GPU: selection and attention.
// Shapes, types and devices are checked here; values lie on the device, where kernels skip or clamp
// what is out of range.
#include <optional>

#include "entry.h"

namespace vllm_sparse::cuda {

namespace {

void lists_on_device(const Tensor& indices,
                     const Tensor& counts,
                     const std::optional<Tensor>& kept_mass,
                     const Tensor& kv_cache) {
  same_device(indices, "indices", kv_cache);
  same_device(counts, "counts", kv_cache);
  if (kept_mass) same_device(*kept_mass, "kept_mass", kv_cache);
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
                       double top_p,
                       int64_t min_tokens,
                       const Tensor& indices,
                       const Tensor& counts,
                       const std::optional<Tensor>& kept_mass,
                       int64_t kv_format) {
  check_tensor(query, "query", 3);
  SelectArgs p;
  p.cache = aligned_cache(kv_cache, query.size(2), kv_format);
  p.codes = Codes::of(p.cache);
  same_device(query, "query", kv_cache);
  set_query(query, scale, soft_cap, p);
  p.seq_lens = rows_vector(seq_lens, "seq_lens", p.num_rows, kv_cache);
  p.budgets = rows_vector(budgets, "budgets", p.num_rows, kv_cache);
  p.block_table = block_table_of(block_table, p.num_rows, kv_cache);
  p.block_table_stride = block_table.stride(0);
  p.max_blocks = block_table.size(1);
  set_sparq_options(rank, local_window, sink_tokens, top_p, min_tokens, p);
  p.indices = check_lists(indices, "indices", 3, p.num_rows, p.cache);
  p.max_kept = indices.size(2);
  p.counts = check_lists(counts, "counts", 2, p.num_rows, p.cache);
  p.kept_mass = check_mass(kept_mass, query);
  lists_on_device(indices, counts, kept_mass, kv_cache);
  p.kept_histogram = nullptr;
  return p;
}

// The caller's workspace, or one that lives until the launch is queued.
struct Workspace {
  uint8_t* data;
  WorkspacePlan plan;
  std::optional<Tensor> own;

  Workspace(const Device& device,
            const SelectArgs& p,
            bool selects,
            const std::optional<Tensor>& given,
            const Tensor& kv_cache)
      : plan(plan_workspace(device, p, selects)) {
    if (given) {
      check_tensor(*given, "workspace", 1);
      check_dtype(*given, "workspace", ScalarType::Byte, "uint8");
      same_device(*given, "workspace", kv_cache);
      STD_TORCH_CHECK(given->size(0) >= plan.bytes,
                      "workspace has ",
                      given->size(0),
                      " bytes, this call needs ",
                      plan.bytes);
      data = static_cast<uint8_t*>(given->data_ptr());
      STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0,
                      "workspace must be aligned to 16 bytes");
    } else {
      own = workspace_like(kv_cache, plan.bytes);
      data = static_cast<uint8_t*>(own->data_ptr());
      check(cudaMemsetAsync(data, 0, kArrivalBytes, device.stream));
    }
  }
  void use(SelectArgs& p) const {
    p.prepared = data + plan.prepared;
    p.stats = reinterpret_cast<float2*>(data + plan.stats);
    p.scores = data + plan.scores;
    p.keys = reinterpret_cast<uint16_t*>(data + plan.keys);
  }
  void use(AttendArgs& p) const {
    p.listed = data + plan.scores;  // scores are not needed any more
    p.arrivals = reinterpret_cast<uint32_t*>(data);
    p.partials = reinterpret_cast<float*>(data + plan.partials);
  }
  void use(DecodeArgs& p) const {
    p.shared = reinterpret_cast<SharedParts*>(data + kMaxGrid * 4);
    p.part_results = reinterpret_cast<float*>(data + plan.part_results);
  }
};

void run_select(const Device& device, SelectArgs& p, const Workspace& workspace) {
  workspace.use(p);
  launch_channels(device, p);
  launch_score(device, p);
  launch_select(device, p);
}

void attend_by_format(const Device& device, const AttendArgs& p) {
  if (!p.cache.quantised()) return launch_attend(device, p);
  if (code_rows_cover(device, p)) return launch_attend_code_rows(device, p);
  blocks_cover(device, p) ? launch_attend_blocks(device, p) : launch_attend_codes(device, p);
}

void check_mean(const AttendArgs& p) {
  STD_TORCH_CHECK(p.kept_mass == nullptr || p.cache.has_mean,
                  "kept_mass needs blocks that hold the mean of V");
}

void outputs_on_device(const Tensor& query,
                       const Tensor& kv_cache,
                       const Tensor& out,
                       const std::optional<Tensor>& tokens_read,
                       AttendArgs& p) {
  p.tokens_read = set_outputs(query, out, tokens_read, p);
  same_device(out, "out", kv_cache);
  if (tokens_read) same_device(*tokens_read, "tokens_read", kv_cache);
}

}  // namespace

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
                  double top_p,
                  int64_t min_tokens,
                  Tensor& indices,
                  Tensor& counts,
                  std::optional<Tensor> kept_mass,
                  std::optional<Tensor> workspace,
                  int64_t kv_format) {
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
                             top_p,
                             min_tokens,
                             indices,
                             counts,
                             kept_mass,
                             kv_format);
  if (p.num_rows == 0 || p.max_blocks == 0) return;
  const int32_t index = kv_cache.get_device_index();
  const DeviceGuard guard(index);
  const Device device = current_device(index);
  plan_select(device, p);
  run_select(device, p, Workspace(device, p, true, workspace, kv_cache));
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
                  double top_p,
                  int64_t min_tokens,
                  Tensor& indices,
                  Tensor& counts,
                  std::optional<Tensor> kept_mass,
                  Tensor& out,
                  std::optional<Tensor> tokens_read,
                  std::optional<Tensor> kept_histogram,
                  std::optional<Tensor> workspace,
                  int64_t kv_format) {
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
                             top_p,
                             min_tokens,
                             indices,
                             counts,
                             kept_mass,
                             kv_format);
  AttendArgs p;
  attend_after(s, p);
  check_mean(p);
  p.codes = s.codes;
  p.max_blocks = s.max_blocks;
  // Lists that adapt have the lengths that selection writes.
  p.budgets = s.top_p < 1 ? nullptr : s.budgets;
  p.local_window = s.local_window;
  p.sink_tokens = s.sink_tokens;
  outputs_on_device(query, kv_cache, out, tokens_read, p);
  s.kept_histogram = check_histogram(kept_histogram, s.cache);
  if (kept_histogram) same_device(*kept_histogram, "kept_histogram", kv_cache);
  if (p.num_rows == 0 || p.max_blocks == 0) return;
  const int32_t index = kv_cache.get_device_index();
  const DeviceGuard guard(index);
  const Device device = current_device(index);
  plan_select(device, s);
  const Workspace shared(device, s, true, workspace, kv_cache);
  if (decode_covers(device, s)) {
    shared.use(s);
    DecodeArgs d = {s, p.out, p.out_stride, p.tokens_read};
    shared.use(d);
    return launch_decode(device, d);
  }
  run_select(device, s, shared);
  shared.use(p);
  attend_by_format(device, p);
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
            std::optional<Tensor> tokens_read,
            std::optional<Tensor> workspace,
            int64_t kv_format) {
  check_tensor(query, "query", 3);
  AttendArgs p;
  p.cache = aligned_cache(kv_cache, query.size(2), kv_format);
  p.codes = Codes::of(p.cache);
  same_device(query, "query", kv_cache);
  set_query(query, scale, soft_cap, p);
  p.seq_lens = rows_vector(seq_lens, "seq_lens", p.num_rows, kv_cache);
  p.block_table = block_table_of(block_table, p.num_rows, kv_cache);
  p.block_table_stride = block_table.stride(0);
  p.max_blocks = block_table.size(1);
  STD_TORCH_CHECK(indices.has_value() == counts.has_value(),
                  "indices and counts must be given together");
  p.indices = nullptr;
  p.counts = nullptr;
  p.budgets = nullptr;
  p.max_kept = 0;
  if (indices) {
    p.indices = check_lists(*indices, "indices", 3, p.num_rows, p.cache);
    p.counts = check_lists(*counts, "counts", 2, p.num_rows, p.cache);
    p.max_kept = indices->size(2);
    lists_on_device(*indices, *counts, kept_mass, kv_cache);
  }
  p.kept_mass = check_mass(kept_mass, query);
  check_mean(p);
  outputs_on_device(query, kv_cache, out, tokens_read, p);
  if (p.num_rows == 0 || p.max_blocks == 0) return;
  const int32_t index = kv_cache.get_device_index();
  const DeviceGuard guard(index);
  const Device device = current_device(index);
  SelectArgs shape = {};
  shape.cache = p.cache;
  shape.group = p.group;
  const bool by_blocks = p.cache.quantised() && !p.cache.key_rows && indices.has_value();
  if (by_blocks) {
    shape.num_rows = p.num_rows;
    shape.max_blocks = p.max_blocks;
    shape.top_p = 1;
    plan_select(device, shape);
  }
  const Workspace partials(device, shape, by_blocks, workspace, kv_cache);
  partials.use(p);
  attend_by_format(device, p);
}

int64_t workspace_bytes(int64_t num_rows,
                        int64_t num_kv_heads,
                        int64_t group,
                        int64_t max_blocks,
                        int64_t head_size,
                        bool adapts,
                        int64_t device_index) {
  SelectArgs p = {};
  p.top_p = adapts ? 0.5f : 1.0f;
  p.num_rows = num_rows;
  p.group = static_cast<int>(group);
  p.max_blocks = max_blocks;
  p.cache.num_kv_heads = static_cast<int>(num_kv_heads);
  p.cache.head_size = static_cast<int>(head_size);
  Device device = device_properties(static_cast<int32_t>(device_index));
  plan_select(device, p);
  return plan_workspace(device, p, true).bytes;
}

}  // namespace vllm_sparse::cuda

STABLE_TORCH_LIBRARY_IMPL(vllm_sparse, CUDA, m) {
  m.impl("sparq_select", TORCH_BOX(&vllm_sparse::cuda::sparq_select));
  m.impl("sparq_attend", TORCH_BOX(&vllm_sparse::cuda::sparq_attend));
  m.impl("attend", TORCH_BOX(&vllm_sparse::cuda::attend));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_sparse, CompositeExplicitAutograd, m) {
  m.impl("workspace_bytes", TORCH_BOX(&vllm_sparse::cuda::workspace_bytes));
}
