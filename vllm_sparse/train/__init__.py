# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The training room: data, loop and checkpoints of what is trained around a model.

``python -m vllm_sparse.train --help``. Nothing of the package imports this, and nothing
here imports vLLM: a machine with PyTorch and transformers is enough.
"""
