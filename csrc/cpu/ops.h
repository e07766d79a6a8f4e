// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

namespace vllm_sparse::cpu {

using torch::stable::Tensor;

void store_kv(const Tensor& key, const Tensor& value, Tensor& kv_cache, const Tensor& slot_mapping);
void seal_blocks(Tensor& kv_cache,
                 const Tensor& block_ids,
                 const Tensor& prev_block_ids,
                 const Tensor& block_index,
                 int64_t head_size);
void seal_rows(Tensor& kv_cache,
               const Tensor& block_table,
               const Tensor& seq_lens,
               const Tensor& query_start_loc,
               int64_t head_size);

void store_rows(const Tensor& key,
                const Tensor& value,
                Tensor& kv_cache,
                const Tensor& slot_mapping,
                const Tensor& block_table,
                const Tensor& seq_lens);

void store_quantised(const Tensor& key,
                     const Tensor& value,
                     Tensor& kv_cache,
                     const Tensor& block_table,
                     const Tensor& seq_lens,
                     const Tensor& query_start_loc,
                     int64_t kv_format);
void gather_kv(const Tensor& kv_cache,
               const Tensor& block_table,
               const Tensor& seq_lens,
               const Tensor& out_start,
               Tensor& key,
               Tensor& value,
               int64_t kv_format);
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
                  int64_t kv_format);
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
                  int64_t kv_format);
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
            int64_t kv_format);
std::string cpu_isa();

}  // namespace vllm_sparse::cpu
