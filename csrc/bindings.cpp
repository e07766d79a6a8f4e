// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Every op of the library. vllm_sparse/ops/__init__.py documents them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY(vllm_sparse, m) {
  m.def("store_kv(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()");
  m.def(
      "seal_blocks(Tensor(a!) kv_cache, Tensor block_ids, Tensor prev_block_ids, "
      "Tensor block_index, int head_size) -> ()");
  m.def(
      "seal_rows(Tensor(a!) kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor query_start_loc, int head_size) -> ()");
  m.def(
      "store_rows(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, "
      "Tensor block_table, Tensor seq_lens) -> ()");
  m.def(
      "store_quantised(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor block_table, "
      "Tensor seq_lens, Tensor query_start_loc, int kv_format) -> ()");
  m.def(
      "gather_kv(Tensor kv_cache, Tensor block_table, Tensor seq_lens, Tensor out_start, "
      "Tensor(a!) key, Tensor(b!) value, int kv_format=0) -> ()");
  m.def(
      "sparq_select(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor budgets, int rank, int local_window, int sink_tokens, float scale, "
      "float soft_cap, float top_p, int min_tokens, Tensor(a!) indices, Tensor(b!) counts, "
      "Tensor(c!)? kept_mass, Tensor(d!)? workspace=None, int kv_format=0) -> ()");
  m.def(
      "sparq_attend(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor budgets, int rank, int local_window, int sink_tokens, float scale, "
      "float soft_cap, float top_p, int min_tokens, Tensor(a!) indices, Tensor(b!) counts, "
      "Tensor(c!)? kept_mass, Tensor(d!) out, Tensor(e!)? tokens_read, "
      "Tensor(f!)? kept_histogram=None, Tensor(g!)? workspace=None, int kv_format=0) -> ()");
  m.def(
      "attend(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor? indices, Tensor? counts, Tensor? kept_mass, float scale, float soft_cap, "
      "Tensor(a!) out, Tensor(b!)? tokens_read, Tensor(c!)? workspace=None, int kv_format=0) -> "
      "()");
  m.def(
      "workspace_bytes(int num_rows, int num_kv_heads, int group, int max_blocks, "
      "int head_size, bool adapts, int device_index) -> int");
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_sparse, CPU, m) {
  m.impl("store_kv", TORCH_BOX(&vllm_sparse::cpu::store_kv));
  m.impl("seal_blocks", TORCH_BOX(&vllm_sparse::cpu::seal_blocks));
  m.impl("seal_rows", TORCH_BOX(&vllm_sparse::cpu::seal_rows));
  m.impl("store_rows", TORCH_BOX(&vllm_sparse::cpu::store_rows));
  m.impl("store_quantised", TORCH_BOX(&vllm_sparse::cpu::store_quantised));
  m.impl("gather_kv", TORCH_BOX(&vllm_sparse::cpu::gather_kv));
  m.impl("sparq_select", TORCH_BOX(&vllm_sparse::cpu::sparq_select));
  m.impl("sparq_attend", TORCH_BOX(&vllm_sparse::cpu::sparq_attend));
  m.impl("attend", TORCH_BOX(&vllm_sparse::cpu::attend));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_sparse, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&vllm_sparse::cpu::cpu_isa));
}

// Importable only so that Python can find the file; the ops live in torch.ops.vllm_sparse.
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
