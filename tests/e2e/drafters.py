# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Small targets and what drafts for them, and engines with them on the CPU."""

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

from .engines import EXTENSION, running
from .families import FAMILIES, TEXT, save_config

SPARSE = {"top_k": 0.2, "dense_below": 64, "local_window": 16, "sink_tokens": 4}
GLM = FAMILIES["GLM-4-MoE"]
# Method: the target, and what drafts for it (None: the target's checkpoint has it).
# Weights are a function of their names: the draft model is most of the target.
DRAFTERS = {
    "draft_model": ("Llama", ("LlamaForCausalLM", "llama", dict(num_hidden_layers=3))),
    "eagle": ("Llama", ("EagleLlamaForCausalLM", "llama", dict(num_hidden_layers=2))),
    "eagle3": (
        "Llama",
        (
            "LlamaForCausalLMEagle3",
            "llama",
            dict(num_hidden_layers=1, eagle_aux_hidden_state_layer_ids=[1, 2, 3]),
        ),
    ),
    "mtp": ("GLM-4-MoE", None),
}


def layer_backends(worker) -> dict[str, str]:
    """Of a worker's attention layers, the names of their backends."""
    layers = worker.vllm_config.compilation_config.static_forward_context
    return {
        name: layer.get_attn_backend().get_name()
        for name, layer in layers.items()
        if hasattr(layer, "impl")
    }


@contextmanager
def drafting(
    method: str | None,
    sparse: dict,
    target: str = "Llama",
    attention_backend: str = "sparq",
    draft_backend: str | None = None,
    draft_tokens: int = 3,
    **options,
):
    """An fp32 engine, three requests at a time.

    Args:
        method: one of ``DRAFTERS``; None: no speculation.
        target: without a method, a name of ``FAMILIES``.
    """
    settings = dict(
        load_format="by_name",
        skip_tokenizer_init=True,
        dtype="float32",
        attention_backend=attention_backend,
        additional_config={"sparse": sparse},
        worker_extension_cls=EXTENSION,
        max_num_seqs=3,
        max_model_len=1024,
        kv_cache_memory_bytes=2**27,
        disable_log_stats=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        drafter = None
        if method is not None:
            target, drafter = DRAFTERS[method]
            speculation = dict(method=method, num_speculative_tokens=draft_tokens)
            if draft_backend is not None:
                speculation["attention_backend"] = draft_backend
            settings["speculative_config"] = speculation
        model = save_config(target, Path(folder, "target"))
        if target == "GLM-4-MoE":
            path = model / "config.json"
            config = json.loads(path.read_text()) | dict(num_nextn_predict_layers=1)
            path.write_text(json.dumps(config))
        if drafter is not None:
            speculation["model"] = str(save_drafter(drafter, Path(folder, "drafter")))
        with running(model=str(model), **settings | options) as llm:
            llm.collective_rpc("reset_sparse_stats")
            yield llm


def save_drafter(drafter: tuple[str, str, dict], folder: Path) -> Path:
    """Write a draft model's ``config.json``."""
    from transformers import AutoConfig

    architecture, model_type, changes = drafter
    config = AutoConfig.for_model(model_type, **TEXT | changes).to_dict()
    config |= changes | {"architectures": [architecture]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def accepted_tokens(llm) -> int:
    """Drafts that this engine has accepted."""
    name = "vllm:spec_decode_num_accepted_tokens"
    return sum(m.value for m in llm.get_metrics() if m.name == name)
