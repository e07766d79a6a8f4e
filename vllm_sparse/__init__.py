# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Sparse attention backends for stock vLLM. Importing this loads nothing heavy."""

__version__ = "0.1.0"
