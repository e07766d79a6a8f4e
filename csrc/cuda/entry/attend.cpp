// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Ops on the GPU: selection and attention.
#include "entry/entry.h"

namespace vllm_sparse {

using namespace cuda;

namespace {

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
      data = packed<uint8_t>(*given, "workspace", p.cache, {{-1}});
      STD_TORCH_CHECK(given->size(0) >= plan.bytes,
                      "workspace has ",
                      given->size(0),
                      " bytes, this call needs ",
                      plan.bytes);
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
    p.block_lists = data + plan.scores;  // scores are not needed any more
    p.arrivals = reinterpret_cast<uint32_t*>(data);
    p.partials = reinterpret_cast<float*>(data + plan.partials);
  }
  void use(DecodeArgs& p) const {
    p.shared = reinterpret_cast<SharedParts*>(data + kMaxGrid * 4);
    p.part_results = reinterpret_cast<float*>(data + plan.part_results);
  }
};

void attend_by_format(const Device& device, const AttendArgs& p) {
  if (!p.cache.quantised()) return launch_attend_rows(device, p);
  if (attend_code_rows_covers(device, p)) return launch_attend_code_rows(device, p);
  attend_code_blocks_covers(device, p) ? launch_attend_code_blocks(device, p)
                                       : launch_attend_codes(device, p);
}

}  // namespace

void run_sparq(const SelectParams& select,
               const AttendParams* attend,
               const std::optional<Tensor>& workspace,
               const Tensor& kv_cache) {
  SelectArgs s = {select, Codes::of(select.cache)};
  if (s.max_blocks == 0) return;
  const CurrentDevice device(s.cache);
  plan_select(device, s);
  const Workspace shared(device, s, true, workspace, kv_cache);
  shared.use(s);
  if (attend && decode_covers(device, s)) {
    DecodeArgs d = {s, attend->out, attend->out_stride};
    shared.use(d);
    return launch_decode(device, d);
  }
  STD_TORCH_CHECK(s.max_blocks <= most_blocks(s),
                  "block_table has ",
                  s.max_blocks,
                  " columns, selection on this GPU serves at most ",
                  most_blocks(s));
  launch_channels(device, s);
  launch_score(device, s);
  launch_select(device, s);
  if (!attend) return;
  AttendArgs p = {*attend, s.codes};
  // Lists that adapt have the lengths that selection writes.
  p.budgets = s.top_p < 1 ? nullptr : s.budgets;
  p.local_window = s.local_window;
  p.sink_tokens = s.sink_tokens;
  shared.use(p);
  attend_by_format(device, p);
}

void run_attend(const AttendParams& params,
                const std::optional<Tensor>& workspace,
                const Tensor& kv_cache) {
  AttendArgs p = {params, Codes::of(params.cache)};
  if (p.max_blocks == 0) return;
  const CurrentDevice device(p.cache);
  SelectArgs shape = {};
  shape.cache = p.cache;
  shape.group = p.group;
  const bool by_blocks = p.cache.quantised() && !p.cache.key_rows && p.indices != nullptr;
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
  const Device device = device_properties(static_cast<int32_t>(device_index));
  plan_select(device, p);
  return plan_workspace(device, p, true).bytes;
}

}  // namespace vllm_sparse

STABLE_TORCH_LIBRARY_IMPL(vllm_sparse, CUDA, m) { vllm_sparse::implement_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(vllm_sparse, CompositeExplicitAutograd, m) {
  m.impl("workspace_bytes", TORCH_BOX(&vllm_sparse::workspace_bytes));
}
