# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The methods by name: a new one is a file and a line here. Imports nothing, as options
are checked before the methods are."""

# Option ``sparse.selector`` -> class.
SELECTORS = {
    "sparq": "vllm_sparse.methods.sparq:Sparq",
    "exact": "vllm_sparse.methods.compare.exact:Exact",
    "quest": "vllm_sparse.methods.compare.quest:Quest",
    "window": "vllm_sparse.methods.compare.window:Window",
    "streaming": "vllm_sparse.methods.streaming:Streaming",
    "less": "vllm_sparse.methods.less:Less",
    "anchor": "vllm_sparse.methods.anchor:Anchor",
    "dense": "vllm_sparse.methods.dense:Dense",
}
