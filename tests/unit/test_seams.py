# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What this package relies on in vLLM, name by name: the contract with a release.

A release that moves a name or drops an argument fails here within seconds, by name. New
fields are looked at where vLLM asks questions of a backend (test_plugin.py).
"""

import inspect
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import vllm  # noqa: E402

from vllm_sparse.plugin import prompts  # noqa: E402

# "module:attribute": the arguments or, of a dataclass, fields that we name. "...": it
# must exist, no more.
SEAMS = {
    # plugin, platform
    "vllm.v1.attention.backends.registry:register_backend": "backend class_path",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.get_class": "",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.get_path": "",
    "vllm.platforms:cpu_platform_plugin": "",
    "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls": (
        "selected_backend attn_selector_config"
    ),
    "vllm.platforms.interface:Platform.check_and_update_config": "vllm_config",
    "vllm.platforms.interface:Platform.update_block_size_for_backend": "vllm_config",
    "vllm.platforms.interface:Platform.get_device_capability": "",
    "vllm.utils.import_utils:resolve_obj_by_qualname": "",
    "vllm.config.attention:AttentionConfig": "backend backend_per_kind",
    "vllm.config:VllmConfig": (
        "attention_config additional_config cache_config compilation_config "
        "model_config parallel_config scheduler_config speculative_config"
    ),
    # backend, builder, layer
    "vllm.v1.attention.backend:AttentionBackend.customize_spec": "spec",
    "vllm.v1.attention.backend:AttentionBackend.supports_kv_connector": "",
    "vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_layouts": "",
    "vllm.v1.attention.backend:AttentionBackend.get_supported_kernel_block_sizes": "",
    "vllm.v1.attention.backend:AttentionBackend."
    "supports_device_cpu_query_lens_mismatch": "",
    "vllm.v1.attention.backend:AttentionImpl": "...",
    "vllm.v1.attention.backend:AttentionImplBase": "...",
    "vllm.v1.attention.backend:MultipleOf": "...",
    "vllm.v1.attention.backends.cpu_attn:_get_attn_isa": "...",
    "vllm.v1.kv_cache_interface:KVCacheLayout.LBHNC": "...",
    "vllm.platforms.interface:DeviceCapability.as_version_str": "",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__": (
        "kv_cache_spec layer_names vllm_config device"
    ),
    "vllm.v1.attention.backend:"
    "AttentionMetadataBuilder._init_reorder_batch_threshold": (
        "reorder_batch_threshold supports_spec_as_decode"
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build": (
        "common_prefix_len common_attn_metadata fast_build"
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build_for_cudagraph_capture": (
        "common_attn_metadata"
    ),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens "
        "max_query_len max_seq_len block_table_tensor slot_mapping causal "
        "seq_lens_cpu_upper_bound is_prefilling"
    ),
    "vllm.v1.attention.backend:AttentionCGSupport.UNIFORM_BATCH": "...",
    "vllm.v1.attention.backends.utils:split_decodes_and_prefills": (
        "common_attn_metadata decode_threshold"
    ),
    "vllm.v1.attention.backends.utils:get_num_attention_heads_from_layers": "...",
    "vllm.model_executor.layers.attention.attention:Attention.get_kv_cache_spec": (
        "vllm_config"
    ),
    "vllm.model_executor.models.utils:extract_layer_index": "...",
    "vllm.v1.attention.backends.fa_utils:get_flash_attn_version": (
        "head_size requires_softcap"
    ),
    "vllm._custom_ops:cpu_attn_get_scheduler_metadata": (
        "num_reqs num_heads num_kv_heads head_dim seq_lens dtype query_start_loc "
        "causal sliding_window_size isa enable_kv_split"
    ),
    "vllm._custom_ops:cpu_attn_reshape_and_cache": "key value slot_mapping isa",
    "vllm._custom_ops:cpu_attention_with_kv_cache": (
        "query key_cache value_cache output query_start_loc seq_lens scale causal "
        "sliding_window block_table softcap scheduler_metadata"
    ),
    # blocks
    "vllm.v1.kv_cache_interface:AttentionSpec": (
        "block_size num_kv_heads head_size dtype kv_quant_mode state_content_bytes "
        "page_size_padded"
    ),
    "vllm.v1.kv_cache_interface:FullAttentionSpec": "non_causal",
    "vllm.v1.kv_cache_interface:ChunkedLocalAttentionSpec": "attention_chunk_size",
    "vllm.v1.kv_cache_interface:KVCacheConfig.needs_kv_cache_zeroing": "...",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register": (
        "uniform_type_base_spec"
    ),
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered": "",
    "vllm.v1.core.single_type_kv_cache_manager:"
    "FullAttentionManager.get_num_blocks_to_allocate": (
        "request_id num_tokens new_computed_blocks total_computed_tokens "
        "num_local_computed_tokens num_tokens_main_model"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:"
    "FullAttentionManager.allocate_new_blocks": (
        "request_id num_tokens num_tokens_main_model"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:"
    "FullAttentionManager._cache_partial_tail_block": "request num_tokens",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner._zero_block_ids": "block_ids",
    # figures
    "vllm.v1.engine.core:EngineCore.__init__": "vllm_config",
    "vllm.v1.core.sched.scheduler:Scheduler.make_stats": "...",
    "vllm.v1.core.sched.scheduler:Scheduler.has_unfinished_requests": "",
    "vllm.v1.metrics.loggers:StatLoggerManager.__init__": "vllm_config",
    "vllm.v1.metrics.loggers:PrometheusStatLogger": "...",
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase": "...",
    "vllm.v1.metrics.stats:SchedulerStats": "num_kv_fetch_reqs_by_stage",
    # doctor
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "",
    "vllm.engine.arg_utils:EngineArgs.create_model_config": "",
    "vllm.model_executor.model_loader.utils:initialize_model": "vllm_config",
    "vllm.distributed:init_distributed_environment": (
        "world_size rank distributed_init_method local_rank backend"
    ),
    "vllm.distributed:initialize_model_parallel": "",
    "vllm.distributed:parallel_state": "...",
    "vllm.config:set_current_vllm_config": "vllm_config",
    "vllm.config:get_current_vllm_config": "",
    "vllm.envs:VLLM_CPU_ATTN_SPLIT_KV": "...",
    "vllm.distributed:cleanup_dist_env_and_memory": "",
}


@pytest.mark.parametrize("seam", SEAMS)
def test_vllm_still_has(seam):
    module, _, path = seam.partition(":")
    found = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    needed = set(SEAMS[seam].split()) - {"..."}
    if not needed:
        return
    if inspect.isclass(found):
        has = {field.name for field in fields(found)}
    else:
        has = set(inspect.signature(found).parameters)
    assert needed <= has, f"{seam} lacks {sorted(needed - has)}"


def test_the_gpu_runner_still_keeps_a_prompts_flags():
    """Read, not imported: the modules want a GPU build's packages."""
    folder = Path(vllm.__file__).parent / "v1/worker/gpu"
    for module, name in prompts.STATES.items():
        text = (folder / f"model_states/{module}.py").read_text()
        assert f"class {name}" in text
        assert re.search(r"def prepare_attn\(\s*self,\s*input_batch: InputBatch,", text)
    hybrid = (folder / "model_states/mamba_hybrid.py").read_text()
    assert "prefill_runs_as_decode_np" in hybrid  # else the change can go
    assert "is_prefilling_np" in (folder / "input_batch.py").read_text()
