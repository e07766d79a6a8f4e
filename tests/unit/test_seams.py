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
    "vllm.model_executor.layers.rotary_embedding:_ROPE_DICT": "...",
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
        "page_size_padded tokens_per_state"
    ),
    "vllm.v1.kv_cache_interface:FullAttentionSpec": "non_causal",
    "vllm.v1.kv_cache_interface:ChunkedLocalAttentionSpec": "attention_chunk_size",
    "vllm.v1.kv_cache_interface:KVCacheConfig.needs_kv_cache_zeroing": "...",
    # plugin/arena.py, line_blocks.py, token_ids.py
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": "sliding_window",
    "vllm.v1.kv_cache_interface:replace_as": "spec target_cls drop",
    "vllm.v1.core.single_type_kv_cache_manager:"
    "SlidingWindowManager._remove_blocks_in_range": (
        "request_id first_block last_block"
    ),
    "vllm.transformers_utils.config:get_hf_file_to_dict": "file_name model revision",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase": "...",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata": (
        "num_tokens num_reqs"
    ),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn": (
        "input_batch"
    ),
    "vllm.v1.worker.gpu.input_batch:InputBatch": "input_ids",
    # connectors, offloading
    "vllm.config:KVTransferConfig": (
        "kv_connector kv_connector_module_path kv_connector_extra_config"
    ),
    "vllm.config.cache:CacheConfig": (
        "kv_offloading_size kv_offloading_backend enable_prefix_caching"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector:"
    "OffloadingConnector.get_num_new_matched_tokens": "request num_computed_tokens",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector:"
    "OffloadingConnector.__init__": "vllm_config role kv_cache_config",
    "vllm.v1.kv_offload.cpu.spec:CPUOffloadingSpec.get_worker": "kv_caches",
    "vllm.v1.kv_offload.tiering.spec:TieringOffloadingSpec.get_worker": "kv_caches",
    "vllm.v1.kv_offload.base:OffloadingWorker.submit_store": "job_id src_spec dst_spec",
    "vllm.v1.kv_offload.base:OffloadingWorker.submit_load": "job_id src_spec dst_spec",
    "vllm.v1.kv_offload.base:OffloadingWorker.get_finished": "",
    "vllm.v1.kv_offload.base:OffloadingWorker.wait": "job_ids",
    "vllm.v1.kv_offload.base:OffloadingWorker.shutdown": "",
    "vllm.v1.kv_offload.base:TransferResult": (
        "job_id success transfer_size transfer_time"
    ),
    "vllm.v1.kv_offload.base:CanonicalKVCaches": "tensors group_data_refs",
    "vllm.v1.kv_offload.base:GPULoadStoreSpec.__init__": (
        "block_ids group_sizes block_indices"
    ),
    "vllm.v1.kv_offload.config:OffloadingConfig": "model parallel extra_config",
    "vllm.v1.kv_offload.config:OffloadingModelConfig": "dtype",
    "vllm.v1.kv_offload.cpu.shared_offload_region:SharedOffloadRegion.__init__": (
        "engine_id num_chunks rank kv_bytes_per_chunk cpu_page_size"
    ),
    "vllm.v1.kv_offload.cpu.shared_offload_region:"
    "SharedOffloadRegion.create_next_worker_view": "tensor_page_size",
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
    # plugin/evicting.py
    "vllm.v1.core.single_type_kv_cache_manager:"
    "FullAttentionManager.remove_skipped_blocks": (
        "request_id processed_computed_tokens num_prompt_tokens"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:"
    "FullAttentionManager._remove_blocks_in_range": "request_id first_block last_block",
    "vllm.v1.core.single_type_kv_cache_manager:"
    "FullAttentionManager.__init__": "max_admission_blocks_per_request",
    "vllm.v1.core.single_type_kv_cache_manager:"
    "FullAttentionManager.cache_blocks": "request num_tokens",
    "vllm.v1.core.single_type_kv_cache_manager:"
    "FullAttentionManager.pop_blocks_for_free": "request_id",
    "vllm.v1.core.single_type_kv_cache_manager:"
    "FullAttentionManager.find_longest_cache_hit": (
        "block_hashes max_length kv_cache_group_ids block_pool kv_cache_spec "
        "drop_eagle_block alignment_tokens"
    ),
    "vllm.v1.core.kv_cache_utils:resolve_block_hashes": (
        "block_hashes hash_block_size block_size"
    ),
    "vllm.v1.core.block_pool:BlockPool.get_cached_block": (
        "block_hash kv_cache_group_ids"
    ),
    "vllm.v1.request:Request.__init__": "resumable",
    "vllm.config:VllmConfig.max_in_flight_tokens": "...",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner._zero_block_ids": "block_ids",
    # sampling on CPUs
    "vllm.platforms.interface:Platform.register_triton_kernel_overrides": "",
    "vllm.utils.cpu_triton_utils:_expand_kernel_impl": (
        "output input_val cu_num_tokens replace_from replace_to"
    ),
    "vllm.utils.cpu_triton_utils:_rejection_random_sample_kernel_impl": (
        "output_token_ids cu_num_draft_tokens draft_token_ids draft_probs target_probs "
        "bonus_token_ids recovered_token_ids uniform_probs"
    ),
    "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only": "logits k",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.sample_tokens": "grammar_output",
    "vllm.config:SpeculativeConfig": (
        "attention_backend rejection_sample_method target_model_config"
    ),
    # sampling parameters beside drafts
    "vllm.sampling_params:SamplingParams._validate_spec_decode": "speculative_config",
    "vllm.exceptions:VLLMValidationError": "...",
    "vllm.v1.sample.logits_processor:LogitsProcessors.__init__": "logitsprocs",
    "vllm.v1.sample.logits_processor:LogitBiasLogitsProcessor.apply": "logits",
    "vllm.v1.sample.logits_processor:MinPLogitsProcessor.apply": "logits",
    "vllm.v1.sample.logits_processor:MinTokensLogitsProcessor.apply_with_spec_decode": (
        "logits num_draft_tokens"
    ),
    "vllm.v1.sample.rejection_sampler:RejectionSampler.forward": (
        "metadata draft_probs logits sampling_metadata"
    ),
    "vllm.v1.sample.rejection_sampler:RejectionSampler.apply_logits_processors": (
        "logits sampling_metadata metadata"
    ),
    "vllm.v1.sample.metadata:SamplingMetadata": (
        "logitsprocs temperature spec_token_ids thinking_budget_state_holder"
    ),
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": "num_draft_tokens",
    # draft models
    "vllm.config:SpeculativeConfig.use_eagle": "",
    "vllm.config:SpeculativeConfig.uses_draft_model": "",
    "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.load_model": (
        "target_model"
    ),
    "vllm.v1.spec_decode.llm_base_proposer:"
    "SpecDecodeBaseProposer.initialize_attn_backend": "kv_cache_config",
    "vllm.v1.spec_decode.llm_base_proposer:"
    "SpecDecodeBaseProposer.prepare_inputs_padded": "common_attn_metadata",
    "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.prepare_inputs": (
        "common_attn_metadata"
    ),
    "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.update_state": (
        "output_token_ids spec_token_ids repeat_indices"
    ),
    "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.apply_to_logits": (
        "logits predict_bonus_token spec_token_ids"
    ),
    "vllm.v1.sample.thinking_budget_state:"
    "ThinkingBudgetStateHolder._update_think_state": "state",
    "vllm.v1.worker.cpu_worker:CPUWorker.initialize_from_config": "kv_cache_config",
    # figures
    "vllm.v1.engine.core:EngineCore.__init__": "vllm_config",
    "vllm.v1.core.sched.scheduler:Scheduler.make_stats": "...",
    "vllm.v1.core.sched.scheduler:Scheduler.has_unfinished_requests": "",
    "vllm.v1.metrics.loggers:StatLoggerManager.__init__": "vllm_config",
    "vllm.v1.metrics.loggers:PrometheusStatLogger": "...",
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase": "...",
    "vllm.v1.metrics.stats:SchedulerStats": "num_kv_fetch_reqs_by_stage",
    # serve
    "vllm.entrypoints.cli.serve:ServeSubcommand.name": "...",
    "vllm.entrypoints.cli.serve:ServeSubcommand.subparser_init": "subparsers",
    "vllm.entrypoints.cli.serve:ServeSubcommand.validate": "args",
    "vllm.entrypoints.cli.serve:ServeSubcommand.cmd": "args",
    "vllm.logger:configure_logging_from_args": "args",
    "vllm.utils.argparse_utils:FlexibleArgumentParser.parse_args": "args",
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


def test_the_cpu_runner_still_keeps_generators_where_we_hide_them():
    text = (Path(vllm.__file__).parent / "v1/worker/gpu_model_runner.py").read_text()
    assert "self.discard_request_mask.np[:num_reqs]" in text
    # Else the change can go.
    assert "gen.set_offset(gen.get_offset() - 4)" in text
    batch = (Path(vllm.__file__).parent / "v1/worker/gpu_input_batch.py").read_text()
    assert "self.generators: dict[int, torch.Generator] = {}" in batch
    assert "generators=self.generators," in batch  # the sampler's are the same
    kernels = (Path(vllm.__file__).parent / "platforms/cpu.py").read_text()
    for name in ("_expand_kernel_impl", "_rejection_random_sample_kernel_impl"):
        assert f"cpu_tl.{name}" in kernels  # taken from the module at each start


def test_what_drafters_are_told_is_still_missing():
    """Attributes of objects that no test of names sees, and whether a change can go."""
    folder = Path(vllm.__file__).parent / "v1/spec_decode"
    proposer = (folder / "llm_base_proposer.py").read_text()
    for name in ("_draft_attn_layer_names", "draft_attn_groups"):
        assert f"self.{name}" in proposer
    assert "self.net_num_new_slots_per_request = " in proposer
    assert "is_prefilling" not in proposer  # else its flags need not be kept
    assert (
        "seq_lens_cpu_upper_bound"
        not in (
            (folder / "utils.py")
            .read_text()
            .partition("def extend_all_queries_by_N")[2]
        )
    )  # else host_lens can trust the bound again


def test_what_lossless_engines_put_in_place_is_still_used():
    folder = Path(vllm.__file__).parent
    batch = (folder / "v1/worker/gpu_input_batch.py").read_text()
    for name in ("logitsprocs", "thinking_budget_state_holder"):
        assert f"{name}=self.{name}," in batch  # of the sampler's metadata
    runner = (folder / "v1/worker/gpu_model_runner.py").read_text()
    assert "self.rejection_sampler(" in runner
    assert "self.sampler(" in runner
    processors = (folder / "v1/sample/logits_processor/__init__.py").read_text()
    from vllm_sparse.plugin.speculation.v1_parameters import WARNING

    assert f'"{WARNING}"' in processors
    builtin = (folder / "v1/sample/logits_processor/builtin.py").read_text()
    for name in ("self.biases", "self.min_p_count", "self.min_p:", "self.min_toks"):
        assert name in builtin
    # GPUs: all rows of a step are sampled alike, in the order of V2's list.
    verifier = (folder / "v1/worker/gpu/spec_decode/rejection_sampler.py").read_text()
    assert "self.sampler.apply_sampling_params(" in verifier
    sampler = (folder / "v1/worker/gpu/sample/sampler.py").read_text()
    assert "self.sampling_states.apply_min_p(logits, expanded_idx_mapping" in sampler
