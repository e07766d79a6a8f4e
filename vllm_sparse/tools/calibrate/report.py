# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What calibration prints and writes."""

import json
import platform
import time
from dataclasses import asdict

import torch

from ...config import NAMESPACE, SparseConfig
from .choose import Measurements, Outcome, alternatives

HEADER = (
    "| rank | top_p | dense layers | error, mean | worst layer | KV bytes read "
    "| kept, mean / p50 / p99 |\n|---|---|---|---|---|---|---|"
)


def line(point: Outcome) -> str:
    """One row of the table."""
    return (
        f"| {point.rank} | {point.top_p} | {point.dense_layers} | {point.error:.3f} "
        f"| {point.worst_error:.3f} (layer {point.worst_layer}) | {point.read:.1%} "
        f"| {point.kept:.0f} / {point.kept_p50:.0f} / {point.kept_p99:.0f} |"
    )


def table(found: Measurements, proposal: Outcome | None) -> str:
    """The proposal, then all that was tried."""
    lines = [] if proposal is None else ["proposed:", HEADER, line(proposal), ""]
    return "\n".join(lines + ["tried:", HEADER, *map(line, alternatives(found))])


def additional_config(proposal: Outcome) -> str:
    """JSON text for ``--additional-config``, checked as vLLM's start would."""
    config = {NAMESPACE: proposal.options}
    SparseConfig.from_additional_config(config)
    return json.dumps(config)


def full_report(
    header: dict, found: Measurements, proposal: Outcome, target: float
) -> dict:
    """The run as JSON: conditions, proposal, everything tried, shares kept."""
    index = found.index(proposal)
    return {
        "header": header | _conditions(),
        "target_error": target,
        "proposal": asdict(proposal),
        "tried": [asdict(point) for point in alternatives(found)],
        "seq_lens": [int(n) for n in found.seq_lens],
        "layers": found.layers,
        # At the proposed setting, by layer (and KV head), dense layers too.
        "error_by_layer": _rounded(found.error[:, :, index].mean(0)),
        "kept_share": _rounded(found.kept_share(index)),
    }


def _rounded(values: torch.Tensor) -> list:
    return (values * 1e4).round().div(1e4).tolist()


def _conditions() -> dict:
    import vllm

    versions = {
        "python": platform.python_version(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
    }
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), "versions": versions}
