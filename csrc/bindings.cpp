// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Schemas of the ops. vllm_sparse/ops/__init__.py documents them; ops.h has their C++ side.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(vllm_sparse, m) {
  m.def(
      "store(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, "
      "Tensor block_table, Tensor seq_lens, Tensor query_start_loc, int kv_format=0) -> ()");
  m.def(
      "gather_kv(Tensor kv_cache, Tensor block_table, Tensor seq_lens, Tensor out_start, "
      "Tensor(a!) key, Tensor(b!) value, int kv_format=0) -> ()");
  m.def(
      "sparq_attend(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor budgets, int[] sizes, float[] numbers, Tensor(a!) indices, Tensor(b!) counts, "
      "Tensor(c!)? kept_mass, Tensor(d!)? out, Tensor(e!)? kept_histogram=None, "
      "Tensor(f!)? workspace=None, int kv_format=0) -> ()");
  m.def(
      "attend(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor? indices, Tensor? counts, Tensor? kept_mass, float scale, float soft_cap, "
      "Tensor(a!) out, Tensor(b!)? workspace=None, int kv_format=0) -> ()");
  m.def(
      "workspace_bytes(int num_rows, int num_kv_heads, int group, int max_blocks, "
      "int head_size, bool adapts, int device_index) -> int");
  m.def("cpu_isa() -> str");
}

// Importable only so that Python can find the file; the ops live in torch.ops.vllm_sparse.
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
