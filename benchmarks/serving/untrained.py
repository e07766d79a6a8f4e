# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""An untrained checkpoint of ``less`` for a shape, to measure speed with dummy weights.

python -m benchmarks.serving.untrained llama-3.1-8b FOLDER --window 1024
"""

import argparse
import json
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.serving.shapes import save_shape
from vllm_sparse import checkpoint
from vllm_sparse.cache.layout import BLOCK_SIZE
from vllm_sparse.methods.less import KIND, described
from vllm_sparse.train.less_layers import new_kernels

SCALE = 1e-4


def write(shape: str, folder: Path, hidden: int, sinks: int, window: int) -> None:
    """Random features, positive; scales so small that nothing overflows."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as model:
        config = AutoConfig.from_pretrained(save_shape(shape, Path(model)))
    layers = new_kernels(config, hidden, seed=0)
    for kernels in layers:
        kernels.s1.fill_(SCALE)  # new ones are for training, where s1 is a logarithm
    tensors = {
        f"layers.{layer}.{name}": tensor
        for layer, kernels in enumerate(layers)
        for name, tensor in vars(kernels).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / checkpoint.TENSORS)
    description = {
        "format": checkpoint.FORMAT,
        "kind": KIND,
        "base": {"name": f"{shape}, untrained", "sha256": ""},
        "config": described(config, hidden, sinks, window),
        "tensors_sha256": checkpoint.sha256(folder / checkpoint.TENSORS),
    }
    (folder / checkpoint.DESCRIPTION).write_text(json.dumps(description))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", help="shape[:layers] of shapes.py")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=BLOCK_SIZE)
    parser.add_argument("--window", type=int, default=2 * BLOCK_SIZE)
    args = parser.parse_args()
    write(args.shape, args.folder, args.hidden, args.sinks, args.window)


if __name__ == "__main__":
    main()
