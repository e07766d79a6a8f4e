# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""One attention layer, whatever the device: options, shapes, storing, sealing."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadata, AttentionType

from .. import ops
from ..cache.formats import choose_format
from ..cache.layout import BlockLayout
from ..config import SparseConfig, SparseConfigError
from ..methods import SELECTORS, LayerShape, Selector
from ..plugin.versions import init_logger

logger = init_logger(__name__)
M = TypeVar("M", bound=AttentionMetadata)


class SparseAttentionImpl(AttentionImpl[M], Generic[M]):
    """Serves one decoder layer with full attention."""

    # The backend's name, and its options that differ from SparseConfig's defaults.
    backend: ClassVar[str] = "sparq"
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **unsupported,
    ) -> None:
        if alibi_slopes is not None:
            unsupported["alibi_slopes"] = alibi_slopes
        if sliding_window is not None:
            unsupported["sliding_window"] = sliding_window
        unsupported = {k: v for k, v in unsupported.items() if v is not None}
        if unsupported:
            raise NotImplementedError(
                f"--attention-backend {self.backend} does not support "
                f"{sorted(unsupported)} of "
                "this model's attention; leave --attention-backend out"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        vllm_config = get_current_vllm_config()
        options = SparseConfig.from_additional_config(
            vllm_config.additional_config, self.defaults
        )
        self.fmt = options.format(head_size, num_heads // num_kv_heads)
        self._check_format(vllm_config)
        choose_format(self.fmt, head_size, num_kv_heads)
        self.shape = LayerShape(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            dtype=vllm_config.model_config.dtype,
            scale=self.scale,
            soft_cap=float(logits_soft_cap or 0.0),
            fmt=self.fmt,
        )
        self.configure(options)
        device = torch.device(current_platform.device_type)
        if device.type == "cuda":  # tensors name their device by number
            device = torch.device("cuda", torch.cuda.current_device())
        kernels = ops.use(self.config.kernels, device)
        if self.fmt.quantised and kernels == "triton":
            raise SparseConfigError(
                f"sparse.kv_format = {self.fmt.name!r} has no Triton kernels, and the "
                "CUDA library does not serve this GPU: leave it out"
            )
        logger.info_once(
            "Sparse attention: %s, %s", self.config, self.describe(kernels)
        )

    def _check_format(self, vllm_config) -> None:
        """Raise where a quantised cache could not be right."""
        if not self.fmt.quantised:
            return
        chosen = f"sparse.kv_format = {self.fmt.name!r}"
        if self.kv_sharing_target_layer_name is not None:
            raise NotImplementedError(
                f"{chosen} does not serve models whose layers share a cache: leave it "
                "out"
            )
        layout = BlockLayout(
            self.head_size, vllm_config.model_config.dtype.itemsize, self.fmt
        )
        # The longest context that prefills in one step, with the step's tokens.
        self.scratch_tokens = (
            vllm_config.model_config.max_model_len
            + vllm_config.scheduler_config.max_num_batched_tokens
        )
        # Draft models leave tokens without a slot, which tails do not know.
        speculation = getattr(vllm_config.speculative_config, "method", "ngram")
        if speculation not in ("ngram", "suffix"):
            raise SparseConfigError(
                f"{chosen} works with the speculative method ngram only, not with "
                f"{speculation!r}: choose ngram, or leave kv_format out"
            )
        drafts = vllm_config.num_speculative_tokens
        if drafts >= layout.rows_per_block:
            raise SparseConfigError(
                f"{chosen} verifies at most {layout.rows_per_block - 1} draft tokens "
                f"a step, num_speculative_tokens is {drafts}: lower it"
            )

    @abstractmethod
    def describe(self, kernels: str) -> str:
        """Which kernels serve the layer, for the log; raises where none can."""

    def configure(self, config: SparseConfig) -> None:
        """Take other options: at construction, or between requests in evaluation.

        Raises:
            SparseConfigError: when they do not fit the layer; nothing is changed then.
        """
        self.config = self.check(config)
        self.selector: Selector | None = None
        if self.config.selector != "dense":
            self.selector = SELECTORS[self.config.selector](self.config, self.shape)
        self._dense_layer: bool | None = None

    def check(self, config: SparseConfig) -> SparseConfig:
        """``config`` resolved for the layer.

        Raises:
            SparseConfigError: when it does not fit the layer's shape or device.
        """
        return config.resolve(
            self.head_size,
            self.shape.num_queries_per_kv,
            current_platform.device_type,
        )

    def selector_of(self, layer: torch.nn.Module) -> Selector | None:
        """The layer's selector; None where the layer is dense."""
        if self._dense_layer is None:
            first = self.config.dense_layers
            self._dense_layer = (
                first > 0 and extract_layer_index(layer.layer_name) < first
            )
        return None if self._dense_layer else self.selector

    @property
    def owns_cache(self) -> bool:
        """False where the layer reads another layer's cache: it must not seal."""
        return self.kv_sharing_target_layer_name is None

    def refuse_output_scales(self, *scales: torch.Tensor | None) -> None:
        if any(scale is not None for scale in scales):
            raise NotImplementedError(
                f"--attention-backend {self.backend} does not support fused output "
                "quantisation; turn it off with -cc.pass_config.fuse_attn_quant=false"
            )
