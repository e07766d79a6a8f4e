# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which options a running engine can change."""

from dataclasses import fields

from ..config import DRAFT_OPTIONS, EVICTING, SparseConfig, SparseConfigError
from .layers import resolved


def check_options(builder, config: SparseConfig) -> None:
    """Raise if the builder's engine cannot take these options.

    Raises:
        SparseConfigError: naming what is fixed.
    """
    new, old = resolved(config, builder), builder.config
    fixed = ["kernels", "kv_format", "kv_group_size", "lossless", *DRAFT_OPTIONS]
    if {new.selector, old.selector} & {*EVICTING}:
        fixed += ["selector", "sink_tokens", "local_window", "prefill", "checkpoint"]
    shape = builder.shape
    if new.format(shape.head_size, shape.num_queries_per_kv) != shape.fmt:
        fixed.append("mean_value")  # means have their place in quantised blocks
    for name in fixed:
        if getattr(new, name) != getattr(old, name):
            raise SparseConfigError(
                f"sparse.{name} = {getattr(new, name)!r} cannot replace "
                f"{getattr(old, name)!r} in a running engine: start another"
            )
    compilation = builder.vllm_config.compilation_config
    if builder.buffers and compilation.cudagraph_mode.has_full_cudagraphs():
        _check_graphs(builder, new)


def _check_graphs(builder, new: SparseConfig) -> None:
    old, free = builder.config, ("top_k", "max_tokens", "dense_below")
    fixed = [f.name for f in fields(old) if f.name not in free]
    changed = [n for n in fixed if getattr(new, n) != getattr(old, n)]
    if changed:
        given = ", ".join(f"sparse.{n} = {getattr(new, n)!r}" for n in changed)
        held = ", ".join(repr(getattr(old, n)) for n in changed)
        raise SparseConfigError(
            f"{given} cannot replace {held} in a running engine whose CUDA graphs "
            f"hold all options but {', '.join(free)}: start another, or this one with "
            "enforce_eager"
        )
    kept = max(int(table.max()) for table in builder.budgets(new).values())
    if kept > builder.buffers.max_kept:
        name = "top_k" if new.top_p is None else "max_tokens"
        raise SparseConfigError(
            f"the new options keep up to {kept} tokens, but CUDA graphs were "
            f"captured for {builder.buffers.max_kept}: start the engine with the "
            f"larger {name}, or with enforce_eager"
        )
