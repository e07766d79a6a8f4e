# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The options under ``--additional-config '{"sparse": {...}}'``, parsed once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from .cache.formats import BARE, FORMATS, KvFormat, resolve_format
from .cache.layout import BLOCK_SIZE, state_bytes
from .option_rules import RULES, misplaced

NAMESPACE = "sparse"
# Options that only lossless speculation has.
DRAFT_OPTIONS = (
    "draft_tokens",
    "draft_adapt",
    "draft_above",
    "draft_sample_method",
    "draft_weights",
)

# "auto" of dense_below, by device type. On GPUs it depends on the batch: at 4,200
# tokens one request lost 4 % of a step and sixteen gained 13 % (docs/results.md).
DENSE_BELOW = {"cpu": 512, "cuda": 6144}
# With K by channel alone sparse decoding costs more than dense up to here: 16 rows on
# an H100 (docs/quantised_kv.md); one row: 56 for 36 us at 32K.
DENSE_BELOW_BY_CHANNEL = {"cpu": 512, "cuda": 49_152}

# "auto" of top_k, and top_p where budgets adapt by default.
TOP_K, TOP_P = 0.125, 0.9

# Options of a backend that differ from SparseConfig's defaults.
BACKEND_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "SPARQ": {},
    "TWILIGHT": {"top_p": TOP_P},
    "ANCHOR": {"selector": "anchor"},
    # Whole blocks: the first is held anyway.
    "LESS": {"selector": "less", "sink_tokens": 128, "local_window": 256},
    "STREAMING": {"selector": "streaming", "sink_tokens": 128, "local_window": 1024},
}


class SparseConfigError(ValueError):
    """An option of the ``sparse`` namespace is unknown or impossible."""


# Selectors that give blocks back.
EVICTING = ("streaming", "less", "anchor")


def default_rank(head_size: int) -> int:
    """Three eighths of the channels.

    The paper's quarter is right for keys of 16 bits. With 4-bit codes channels are
    cheap: at equal bytes more of them beat more tokens (docs/design.md).
    """
    return 3 * head_size // 8


@dataclass(frozen=True)
class SparseConfig:
    """How decode rows choose the tokens they attend to.

    All counts are tokens of one KV head in one layer, for one query position.
    """

    # Method that chooses tokens. "exact" (oracle), "quest" and "window" are slow, plain
    # versions for comparison; "dense" keeps everything.
    selector: str = "sparq"
    # Channels of K read to score tokens (r in SparQ). None: 3/8 of head_size.
    rank: int | None = None
    # Tokens attended exactly, with sinks, window and unsealed tail counted in.
    # An int is a count; a float in (0, 1] is that fraction of the context. "auto":
    # TOP_K, or top_p = TOP_P where a model norms queries and keys (``for_model``).
    top_k: int | float | str = "auto"
    # Adaptive budgets (Twilight): keep the fewest tokens that leave at most 1 - top_p
    # of the estimated attention mass outside, summed over the query heads of a KV head.
    # None: what top_k says. With top_p, top_k does not count, but the next two do; like
    # top_k they include sinks, window and tail.
    top_p: float | None = None
    min_tokens: int = 128
    # An int is a count; a float in (0, 1] is that fraction of the context, but no less
    # than min_tokens.
    max_tokens: int | float = 1.0
    # The most recent tokens, always attended.
    local_window: int = 32
    # The first tokens of the context, always attended.
    sink_tokens: int = 4
    # What selector "streaming" does with prompts: "exact" attends to all of a prompt
    # and gives its blocks back when it is through, "streaming" attends to sinks and
    # window and gives them back all along, so that memory is flat from the start.
    prefill: str = "exact"
    # Folder of what selector "less" has learnt (docs/streaming.md).
    checkpoint: str | None = None
    # The first layers of the model, kept dense.
    dense_layers: int = 0
    # Contexts shorter than this many tokens are attended densely. "auto": what was
    # measured for the device.
    dense_below: int | str = "auto"
    # SparQ's (1 - alpha) * mean(V) term. "auto": on for MHA, off for GQA and MQA.
    mean_value: bool | str = "auto"
    # How the cache keeps K and V: "auto" is the model's dtype; "int8", "int4", "k4v8"
    # and "k8v4" quantise full blocks (docs/quantised_kv.md).
    kv_format: str = "auto"
    # Channels of V that share a scale in quantised formats. None: 64 with 8 bits, 32
    # with 4.
    kv_group_size: int | None = None
    # Lossless self-speculation (docs/lossless.md): steps draft tokens with the options
    # above, and one dense pass verifies them. Answers are those of dense attention.
    lossless: bool = False
    # The most tokens that a request drafts at a time.
    draft_tokens: int = 4
    # Draft as many as pay by measured acceptance; false: always draft_tokens.
    draft_adapt: bool = True
    # Contexts shorter than this many tokens draft nothing. "auto": what was measured
    # for the device.
    draft_above: int | str = "auto"
    # Drafts are sampled as the request asks ("probabilistic"), or always the likeliest
    # token ("greedy", which needs no memory for draft probabilities).
    draft_sample_method: str = "probabilistic"
    # What draft steps compute with: the "target"'s own weights, or "fp8" copies of its
    # linear layers' (GPUs, half as much memory again).
    draft_weights: str = "target"
    # Kernels that serve the ops. "auto": what fits the device (ops/dispatch.py).
    kernels: str = "auto"

    @classmethod
    def from_additional_config(
        cls, additional_config: Any, defaults: Mapping[str, Any] = MappingProxyType({})
    ) -> "SparseConfig":
        """Parse vLLM's ``additional_config``; other namespaces are left alone.

        Args:
            defaults: options of the chosen backend that differ from this class's.

        Raises:
            SparseConfigError: naming the key, what is allowed, and an example.
        """
        if not isinstance(additional_config, Mapping):
            return cls(**defaults)
        known = [f.name for f in fields(cls)]
        beside = misplaced(additional_config, known, BACKEND_DEFAULTS, NAMESPACE)
        if beside is not None:
            raise SparseConfigError(beside)
        options = additional_config.get(NAMESPACE, {})
        if not isinstance(options, Mapping):
            raise SparseConfigError(
                f"additional_config.{NAMESPACE} must be a mapping of options, got "
                f"{options!r}. Example: --additional-config "
                f'\'{{"{NAMESPACE}": {{"kv_format": "k8v4"}}}}\''
            )
        for key in options:
            if key not in known:
                close = get_close_matches(str(key), known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise SparseConfigError(
                    f"unknown option {NAMESPACE}.{key}.{hint} "
                    f"Options: {', '.join(known)}."
                )
        config = cls(**{**defaults, **options})
        chosen, usual = config.selector, defaults.get("selector")
        if chosen != usual and "anchor" in (chosen, usual):
            raise SparseConfigError(
                f"{NAMESPACE}.selector = {chosen!r} is not served by this "
                "backend: 'anchor' belongs to --attention-backend anchor, which serves "
                "no other. Leave it out"
            )
        adapts_by_itself = "top_p" in defaults and "top_p" not in options
        if adapts_by_itself and config.selector in ("window", "dense"):
            raise SparseConfigError(
                f"{NAMESPACE}.selector = {config.selector!r} does not estimate "
                "attention, and budgets that adapt (--attention-backend twilight) "
                "follow an estimate: choose --attention-backend sparq for it, or leave "
                f"{NAMESPACE}.selector out"
            )
        config._validate()
        if config.top_p is not None and config.top_k != "auto":
            raise SparseConfigError(
                f"{NAMESPACE}.top_k is a fixed budget, and {NAMESPACE}.top_p = "
                f"{config.top_p} adapts it: leave top_k out, bound the adaptive budget "
                "with min_tokens and max_tokens, or choose --attention-backend sparq "
                f"without top_p. Example: --additional-config.{NAMESPACE}.max_tokens "
                "2048"
            )
        return config

    def _validate_streaming(self) -> None:
        """What sinks and a window that give blocks back need, and what has no meaning
        beside them."""
        for name, least in (("sink_tokens", 0), ("local_window", BLOCK_SIZE)):
            tokens = getattr(self, name)
            if tokens % BLOCK_SIZE or tokens < least:
                example = max(least, -(-tokens // BLOCK_SIZE) * BLOCK_SIZE)
                raise SparseConfigError(
                    f"{NAMESPACE}.{name} = {tokens} must be a multiple of {BLOCK_SIZE}"
                    f"{' above 0' if least else ''}, as whole blocks are given back. "
                    f"Example: --additional-config.{NAMESPACE}.{name} {example}"
                )
        if (self.checkpoint is None) == (self.selector == "less"):
            raise SparseConfigError(
                f"{NAMESPACE}.checkpoint is what --attention-backend less has learnt: "
                "give a folder that `python -m vllm_sparse.train less` has made, or "
                "choose --attention-backend streaming without one. Example: "
                f"--additional-config.{NAMESPACE}.checkpoint FOLDER"
            )
        self._refuse_others(
            "sink_tokens",
            "local_window",
            "prefill",
            "checkpoint",
            why="sinks and a window are kept (streaming)",
        )

    def _refuse_others(self, *meant: str, why: str) -> None:
        """Raise for options that have no meaning beside the selector's own."""
        defaults = SparseConfig()
        for field in fields(self):
            name = field.name
            if name in ("selector", "kernels", *meant):
                continue
            if getattr(self, name) != getattr(defaults, name):
                raise SparseConfigError(
                    f"{NAMESPACE}.{name} = {getattr(self, name)!r} does nothing where "
                    f"only {why}, or is not served there: leave it out"
                )

    def _validate(self) -> None:
        for name, (is_valid, allowed, example) in RULES.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise SparseConfigError(
                    f"{NAMESPACE}.{name} = {value!r} is not allowed; it must be "
                    f"{allowed}. Example: --additional-config.{NAMESPACE}.{name} "
                    f"{example}"
                )
        if self.selector == "anchor":
            why = "a text's lines say what is kept (anchors)"
            return self._refuse_others(why=why)
        if self.selector in EVICTING:
            return self._validate_streaming()
        if self.checkpoint is not None:
            raise SparseConfigError(
                f"{NAMESPACE}.checkpoint is for states of what has left (less): leave "
                "it out, or choose --attention-backend less"
            )
        if self.prefill != "exact":
            raise SparseConfigError(
                f"{NAMESPACE}.prefill is for sinks and a window alone: leave it out, "
                "or choose --attention-backend streaming"
            )
        name = "top_k" if self.top_p is None else "max_tokens"
        most = getattr(self, name)
        forced = self.local_window + self.sink_tokens
        if isinstance(most, int) and most < forced:
            raise SparseConfigError(
                f"{NAMESPACE}.{name} = {most} is smaller than local_window + "
                f"sink_tokens = {forced}, which are always attended. Example: "
                f"--additional-config.{NAMESPACE}.{name} {max(256, 2 * forced)}"
            )
        if FORMATS[self.kv_format].quantised and self.kernels == "triton":
            raise SparseConfigError(
                f"{NAMESPACE}.kv_format = {self.kv_format!r} has no Triton kernels. "
                f"Example: --additional-config.{NAMESPACE}.kernels cpu"
            )
        if self.kv_group_size is not None and not FORMATS[self.kv_format].quantised:
            raise SparseConfigError(
                f"{NAMESPACE}.kv_group_size needs a quantised {NAMESPACE}.kv_format. "
                f"Example: --additional-config.{NAMESPACE}.kv_format int4"
            )
        if not self.lossless:
            for name in DRAFT_OPTIONS:
                if getattr(self, name) != getattr(SparseConfig, name):
                    raise SparseConfigError(
                        f"{NAMESPACE}.{name} is for lossless speculation, and "
                        f"{NAMESPACE}.lossless is false: leave it out, or add "
                        f"--additional-config.{NAMESPACE}.lossless true"
                    )
        elif self.selector == "dense":
            raise SparseConfigError(
                f"{NAMESPACE}.lossless drafts with sparse attention, and "
                f"{NAMESPACE}.selector = 'dense' attends to everything: leave one of "
                "them out"
            )
        if self.top_p is None:
            defaults = SparseConfig()
            for name in ("min_tokens", "max_tokens"):
                if getattr(self, name) != getattr(defaults, name):
                    raise SparseConfigError(
                        f"{NAMESPACE}.{name} bounds adaptive budgets: set "
                        f"{NAMESPACE}.top_p beside it, also where budgets adapt by "
                        "themselves, or choose --attention-backend twilight. Example: "
                        f"--additional-config.{NAMESPACE}.top_p 0.9"
                    )
            return
        if self.selector in ("window", "dense"):
            raise SparseConfigError(
                f"{NAMESPACE}.top_p needs an estimate of attention, which selector = "
                f"{self.selector!r} does not make. Example: "
                f"--additional-config.{NAMESPACE}.selector sparq"
            )
        if isinstance(most, int) and most < self.min_tokens:
            raise SparseConfigError(
                f"{NAMESPACE}.max_tokens = {most} is smaller than "
                f"{NAMESPACE}.min_tokens = {self.min_tokens}. Example: "
                f"--additional-config.{NAMESPACE}.max_tokens {2 * self.min_tokens}"
            )

    def guesses(self, head_size: int) -> bool:
        """Whether some of the channels choose tokens for answers, and nothing given
        adapts how many: fixed budgets may lose facts then (docs/adaptive.md)."""
        return (
            self.selector == "sparq"
            and self.top_p is None
            and self.top_k != 1.0
            and (self.rank or 0) < head_size
            and not self.lossless
        )

    def for_model(self, normed: bool, head_size: int) -> "SparseConfig":
        """With the budgets that a model gets where ``top_k`` leaves them open: they
        adapt where SparQ guesses from channels that are normed.

        Args:
            normed: layers that choose tokens norm their queries and keys (QK-norm).
        """
        if self.top_k != "auto":
            return self
        top_p = TOP_P if normed and self.guesses(head_size) else self.top_p
        return replace(self, top_k=TOP_K, top_p=top_p)

    def resolve(
        self,
        head_size: int,
        num_queries_per_kv: int,
        device_type: str = "cpu",
        normed: bool = False,
    ) -> "SparseConfig":
        """Fill in what depends on the layer's shape, the device and the model, whose
        ``normed`` is as of :meth:`for_model`.

        Raises:
            SparseConfigError: when ``rank`` exceeds ``head_size``.
        """
        rank = default_rank(head_size) if self.rank is None else self.rank
        if rank > head_size:
            raise SparseConfigError(
                f"{NAMESPACE}.rank = {rank} exceeds the model's head size {head_size}; "
                f"it must lie between 1 and {head_size}. Example: "
                f"--additional-config.{NAMESPACE}.rank {default_rank(head_size)}"
            )
        fmt = self.format(head_size, num_queries_per_kv)
        dense_below = self.dense_below
        if dense_below == "auto":
            by_channel = fmt.quantised and not fmt.key_rows
            measured = DENSE_BELOW_BY_CHANNEL if by_channel else DENSE_BELOW
            dense_below = measured[device_type]
        return replace(
            self.for_model(normed, head_size),
            rank=rank,
            mean_value=self._mean(num_queries_per_kv),
            dense_below=dense_below,
        )

    def _mean(self, num_queries_per_kv: int) -> bool:
        if self.mean_value == "auto":
            return num_queries_per_kv == 1
        return self.mean_value

    def format(self, head_size: int, num_queries_per_kv: int) -> KvFormat:
        """How a layer's cache keeps K and V.

        Raises:
            SparseConfigError: when ``kv_group_size`` does not divide the head size.
        """
        if self.selector == "streaming":
            return BARE
        if self.selector == "anchor":
            return replace(BARE, state_bytes=BLOCK_SIZE)  # marks: step/lines.py
        if self.selector == "less":
            return replace(BARE, state_bytes=state_bytes(head_size))
        try:
            return resolve_format(
                self.kv_format,
                self.kv_group_size,
                head_size,
                self._mean(num_queries_per_kv),
            )
        except ValueError as error:
            raise SparseConfigError(
                f"{NAMESPACE}.kv_group_size = {self.kv_group_size}: {error}. Example: "
                f"--additional-config.{NAMESPACE}.kv_group_size 16"
            ) from None
