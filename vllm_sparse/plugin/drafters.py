# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Draft models in vLLM's first model runner: which layers and builders are theirs.

vLLM makes a draft model's layers into the same context as the target's, groups them
with the target's where backend and blocks are alike, and gives the drafter builders of
its own. Nothing says so to a builder; so, in ``SpecDecodeBaseProposer``:

- ``load_model``: the draft model's layers are marked ``is_draft_layer``, as the V2
  runner (0.32) and both runners of 0.33 do by themselves;
- ``initialize_attn_backend``: the drafter's builders are told, when they know all their
  layers (vLLM adds layers to a group after it has made the group's builder);
- ``prepare_inputs_padded``, ``prepare_inputs``: the step's flags of requests in their
  prompts are passed on. vLLM leaves them out, and rows of prompts are dense here.

To go when vLLM's metadata for drafting carries ``is_prefilling``, and a builder is told
that it is a drafter's.
"""

from functools import wraps

MARK = "vllm_sparse"


def install() -> None:
    """Tell builders of ours in this process. Idempotent."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    wrappers = {
        "load_model": _mark_layers,
        "initialize_attn_backend": _tell_builders,
        "prepare_inputs_padded": _keep_flags,
        "prepare_inputs": _keep_flags,
    }
    for name, wrapper in wrappers.items():
        original = getattr(SpecDecodeBaseProposer, name)
        if not hasattr(original, MARK):
            ours = wraps(original)(wrapper(original))
            setattr(ours, MARK, True)
            setattr(SpecDecodeBaseProposer, name, ours)


def _mark_layers(original):
    def load_model(self, target_model) -> None:
        original(self, target_model)
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in self._draft_attn_layer_names:
            layers[name].is_draft_layer = True

    return load_model


def _tell_builders(original):
    def initialize_attn_backend(self, *args, **kwargs) -> None:
        from ..step.builder import SparseMetadataBuilder

        original(self, *args, **kwargs)
        for group in self.draft_attn_groups:
            for builder in group.metadata_builders:
                if isinstance(builder, SparseMetadataBuilder):
                    builder.serve_drafter(self.net_num_new_slots_per_request)

    return initialize_attn_backend


def _keep_flags(original):
    def prepare(self, common_attn_metadata, *args, **kwargs):
        ours, *others = original(self, common_attn_metadata, *args, **kwargs)
        ours.is_prefilling = common_attn_metadata.is_prefilling
        return ours, *others

    return prepare
