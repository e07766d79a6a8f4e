// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Tells torch and Python of the library.
#include <Python.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(vllm_sparse, m) {
  for (const auto& op : vllm_sparse::kOps) m.def(op.schema);
}

// Importable only so that Python can find the file; the ops live in torch.ops.vllm_sparse.
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
