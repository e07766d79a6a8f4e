# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Share of the context that every layer and KV head keeps, as a heat map."""

import importlib.util
from pathlib import Path

from .choose import Measurements, Outcome
from .run import CalibrationError


def require_matplotlib() -> None:
    """Raises CalibrationError without it; called before the long part."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CalibrationError(
            '--plot needs matplotlib, which the extra "bench" brings: pip install '
            "--no-build-isolation -e '.[bench]', or leave --plot out"
        )


def plot_kept(found: Measurements, proposal: Outcome, path: Path) -> None:
    """Layers to the right, KV heads downwards; a line where dense layers end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    index = found.index(proposal)
    share = found.kept_share(index).T.numpy()
    heads, layers = share.shape
    size = (2.5 + 0.25 * layers, 1.6 + 0.28 * heads)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(share * 100, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    figure.colorbar(image, label="kept, %")
    axes.set_xticks(range(0, layers, 2), found.layers[::2], fontsize=8)
    axes.set_yticks(range(heads))
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head")
    axes.set_title(
        f"tokens kept of the context, rank {proposal.rank}, top_p {proposal.top_p}",
        fontsize=10,
    )
    dense = sum(layer < proposal.dense_layers for layer in found.layers)
    if dense:
        axes.axvline(dense - 0.5, color="red")
    figure.savefig(path, dpi=100)
    plt.close(figure)
