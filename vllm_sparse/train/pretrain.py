# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``pretrain``: a small Qwen3 that retrieves, from random weights or out of a Llama.

For what no small model at hand has: QK-norm at head size 128. Windows grow over the
run; half of them are facts to look up and passages to copy. OUT gets ``model/`` (bf16,
served by stock vLLM), ``run.json`` (losses, evaluations, the model's hash) and
``state.pt`` to go on from: give the same command again, after --minutes or an
interruption.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .. import checkpoint
from .corpus import Corpus
from .evaluate import evaluate
from .forward import (
    attention_kernels,
    chunk_losses,
    hidden_states,
    load_model,
    placed,
    token_losses,
)
from .loop import Optimisation, train
from .merge import edit_json
from .mixture import Batch, Curriculum
from .options import add_kernels, check_cudnn, parse, parser_of, print_state
from .qk_norm import widened
from .wordings import Wordings

NEEDS = """needs, for the defaults (60 million parameters, 260 million tokens): a GPU of
40 GB, 4 GB of host memory, and 20 minutes of an H200. On a CPU toy sizes only."""


def out_of_llama(args: argparse.Namespace, corpus: Corpus, device: torch.device):
    """``args.llama`` as a Qwen3, fp32."""
    rng = np.random.default_rng(args.seed)
    streams, length = ("train-code", "train-prose"), min(args.lengths)
    ids = np.stack([corpus.window(stream, length, rng) for stream in streams])
    llama = load_model(args.llama, device)
    model = widened(llama, torch.from_numpy(ids).to(device))
    model.config.max_position_embeddings = max(args.lengths)
    return model


def build(args: argparse.Namespace, tokenizer, device: torch.device):
    """A Qwen3 of the asked shape with random weights, fp32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_size,
        max_position_embeddings=max(args.lengths),
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config._attn_implementation = "sdpa"
    return placed(Qwen3ForCausalLM(config).float(), device)


class Batches(Dataset):
    """Steps' batches by number, for workers that make them ahead."""

    def __init__(self, curriculum: Curriculum):
        self.curriculum = curriculum

    def __len__(self) -> int:
        return self.curriculum.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        batch = self.curriculum.batch(step)
        return batch.ids, batch.positions, batch.weights


class Pretraining:
    """The trainee: all of a model's weights, products in bf16 on GPUs."""

    def __init__(
        self,
        model,
        curriculum: Curriculum,
        micro_tokens: int,
        workers: int,
        tests,
        cudnn: bool = False,
    ):
        self.model, self.curriculum = model, curriculum
        self.micro_tokens, self.workers, self.tests = micro_tokens, workers, tests
        self.cudnn = cudnn
        self.chunk_losses = chunk_losses
        self.device = next(model.parameters()).device
        self._ahead: Iterator[list[torch.Tensor]] = iter(())
        self._next = -1

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.model.named_parameters())

    def bf16(self) -> torch.autocast:
        cuda = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=cuda)

    def batch(self, step: int) -> Batch:
        """The step's; workers make those of the steps behind it meanwhile."""
        if step != self._next:
            loader = DataLoader(
                Batches(self.curriculum),
                batch_size=None,
                sampler=range(step, self.curriculum.steps),
                num_workers=self.workers,
                prefetch_factor=4 if self.workers else None,
            )
            self._ahead = iter(loader)
        self._next = step + 1
        return Batch(*next(self._ahead))

    def losses(self, step: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Weighted mean of the step's cross-entropy, in micro-batches."""
        batch = self.batch(step)
        total = batch.weights[:, 1:].sum().item()
        for part in batch.split(max(1, self.micro_tokens // batch.ids.shape[1])):
            part = part.to(self.device)
            with self.bf16():
                with attention_kernels(self.cudnn):
                    hidden = hidden_states(self.model, part.ids, part.positions)
                losses = token_losses(
                    hidden[:, :-1].flatten(0, 1),
                    self.model.lm_head.weight,
                    part.ids[:, 1:].flatten(),
                    losses=self.chunk_losses,
                )
            weighted = losses * part.weights[:, 1:].flatten()
            yield weighted.sum() / total, part.ids.numel()

    def evaluate(self) -> dict:
        with self.bf16():
            return self.tests()


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(
        "pretrain",
        __doc__,
        NEEDS,
        steps=4000,
        learning_rate=1.5e-3,
        warmup=200,
        save_every=500,
        evaluate_every=1000,
        evaluate_samples=20,
    )
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True, help="folder: the text's")
    add("--llama", type=Path, help="folder of a Llama to begin with; it has the shape")
    add("--layers", type=int, default=10)
    add("--hidden", type=int, default=512, help="size of hidden states")
    add("--intermediate", type=int, default=1408, help="size within MLPs")
    add("--heads", type=int, default=8, help="of queries")
    add("--kv-heads", type=int, default=2)
    add("--head-size", type=int, default=128)
    add("--rope-theta", type=float, default=1e6, help="RoPE's base")
    grow = "tokens of windows, stage by stage; the last is the model's context"
    add("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help=grow)
    shares = "of the steps, by stage; they add up to 1"
    add("--shares", type=float, nargs="+", default=[0.5, 0.3, 0.2], help=shares)
    add("--batch-tokens", type=int, default=65536, help="of a step")
    add("--micro-tokens", type=int, default=32768, help="computed at a time")
    add("--synthetic", type=float, default=0.5, help="of windows: made on the spot")
    add("--answer-weight", type=float, default=10.0, help="of synthetic answers")
    add("--weight-decay", type=float, default=0.1, help="of matrices")
    add("--workers", type=int, default=4, help="processes that make batches")
    add_kernels(parser)
    tested = [512, 2048, 8192]
    add("--evaluate-lengths", type=int, nargs="+", default=tested, help="tokens")
    why = "shapes random weights; --llama brings a shape of its own: leave one out"
    args = parse(parser, argv, SHAPE.split(), lambda args: args.llama, why)
    check_cudnn(parser, args)
    if len(args.shares) != len(args.lengths) or not math.isclose(sum(args.shares), 1):
        parser.error("--shares takes a number for each of --lengths; they add up to 1")
    if max(args.evaluate_lengths) > max(args.lengths):
        parser.error("--evaluate-lengths beyond the longest of --lengths")
    return args


CURRICULUM = "batch_tokens steps synthetic code seed lengths shares"
SHAPE = "layers hidden intermediate heads kv_heads head_size rope_theta"


def main(argv: list[str]) -> None:
    """The command."""
    started = time.monotonic()
    args = arguments_of(argv)
    from transformers import AutoTokenizer

    torch.manual_seed(args.seed)
    corpus = Corpus(args.data, args.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    device = torch.device(args.device)
    if args.llama:
        model = out_of_llama(args, corpus, device)
    else:
        model = build(args, tokenizer, device)
    made = Wordings.of(tokenizer, answer_weight=args.answer_weight)
    chosen = {name: getattr(args, name) for name in CURRICULUM.split()}
    lengths, samples = sorted(args.evaluate_lengths), args.evaluate_samples
    trainee = Pretraining(
        model,
        Curriculum(corpus, made, **chosen),
        args.micro_tokens,
        args.workers,
        lambda: evaluate(model, corpus, made, lengths, samples, samples),
        args.cudnn,
    )
    if args.compile:
        for layer in model.model.layers:
            layer.compile()
        trainee.chunk_losses = torch.compile(chunk_losses)
    shape = {name: getattr(args, name) for name in SHAPE.split()}
    if args.llama:
        shape = {"llama_sha256": checkpoint.base_hash(args.llama)}
    recipe = chosen | shape | {"answer_weight": args.answer_weight}
    report = train(
        trainee,
        Optimisation(args.steps, args.learning_rate, args.warmup, args.weight_decay),
        args.out,
        recipe | {"data_sha256": corpus.digest},
        args.minutes - (time.monotonic() - started) / 60,
        args.save_every,
        args.evaluate_every,
    )
    write(model, args.tokenizer, args.out)
    print_state(args.out / "model", report, args.steps)


TOKENIZER_FILES = ("tokenizer", "special_tokens", "vocab", "merges", "chat_template")


def write(model, tokenizer: Path, out: Path) -> None:
    """The model as stock vLLM serves it, and its hash in ``run.json``."""
    folder = out / "model"
    served = type(model)(model.config)
    served.load_state_dict(model.state_dict())
    served.to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.iterdir():  # as they are: packed text knows their hash
        if file.name.startswith(TOKENIZER_FILES):
            shutil.copy(file, folder)
    length = {"model_max_length": model.config.max_position_embeddings}
    edit_json(folder / "tokenizer_config.json", lambda content: content | length)
    report = json.loads((out / "run.json").read_text())
    report["parameters"] = sum(p.numel() for p in model.parameters())
    report["model_sha256"] = checkpoint.base_hash(folder)
    (out / "run.json").write_text(json.dumps(report) + "\n")
