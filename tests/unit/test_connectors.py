# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which KV connectors are served, which are refused, and what host memory is given."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.kv_offload.base import (  # noqa: E402
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec  # noqa: E402

from vllm_sparse import plugin  # noqa: E402
from vllm_sparse.config import SparseConfigError  # noqa: E402
from vllm_sparse.plugin import connectors  # noqa: E402
from vllm_sparse.plugin.offloading import (  # noqa: E402
    HostOffloadingWorker,
    OffloadingConnector,
)

plugin.register()
NATIVE = "--kv-offloading-size GiB"


def tiers(*types: str) -> dict:
    return {
        "spec_name": "TieringOffloadingSpec",
        "secondary_tiers": [{"type": name} for name in types],
    }


def config(
    transfer: dict | None = None,
    size=None,
    backend="native",
    sparse=None,
    speculation=None,
    **changes,
):
    """What connectors.py reads of a ``VllmConfig``."""
    if transfer is not None:
        transfer = KVTransferConfig(kv_role="kv_both", **transfer)
    cache = dict(
        kv_offloading_size=size,
        kv_offloading_backend=backend,
        enable_prefix_caching=True,
    )
    parallel = dict(pipeline_parallel_size=1)
    for part in (cache, parallel):
        part.update({k: v for k, v in changes.items() if k in part})
    sparq = AttentionBackendEnum["SPARQ"]
    return SimpleNamespace(
        kv_transfer_config=transfer,
        cache_config=SimpleNamespace(**cache),
        parallel_config=SimpleNamespace(**parallel),
        additional_config={"sparse": {"kv_format": "k8v4"} | (sparse or {})},
        speculative_config=speculation,
        attention_config=SimpleNamespace(backend=sparq, backend_per_kind=None),
    )


@pytest.mark.parametrize(
    "asked",
    [
        dict(size=1.0),
        dict(transfer=dict(kv_connector="OffloadingConnector")),
        dict(transfer=dict(kv_connector_extra_config={"block_size": 256}), size=1.0),
    ],
    ids=["size", "connector", "both"],
)
def test_offloading_has_our_classes(asked):
    vllm_config = config(**asked)
    for _ in range(2):  # vLLM checks its configuration several times
        connectors.configure(vllm_config)
    transfer = vllm_config.kv_transfer_config
    assert transfer.kv_connector_module_path == connectors.OFFLOADING
    extra = transfer.kv_connector_extra_config
    assert extra.get("spec_name") == "HostOffloadingSpec"
    assert extra.get("spec_module_path") == connectors.OFFLOADING


def test_files_are_told_apart_by_what_blocks_are():
    vllm_config = config(dict(kv_connector_extra_config=tiers("fs")), size=1.0)
    connectors.configure(vllm_config)
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    assert extra["spec_name"] == "HostTieringSpec"
    assert "'k8v4'" in extra[connectors.BLOCKS_KEY]


def test_answers_of_sparse_attention_are_not_taken_for_dense_ones():
    """They are part of the prompt of a follow-up turn, which is offloaded."""
    sparse, other, lossless, too, dense, rows = (
        connectors._blocks(config(sparse=options))
        for options in (
            {"top_k": 256},
            {"top_k": 512},
            {"top_k": 256, "lossless": True},
            {"top_k": 512, "lossless": True, "draft_tokens": 2},
            {"selector": "dense"},
            {"selector": "dense", "kv_format": "auto"},
        )
    )
    assert lossless == too == dense
    assert len({sparse, other, dense, rows}) == 4


def test_budgets_by_model_are_told_apart_by_their_numbers(monkeypatch):
    keys = {connectors._blocks(config(sparse={}))}
    for name, value in (("TOP_K", 0.25), ("TOP_P", 0.8)):
        monkeypatch.setattr(connectors, name, value)
        keys.add(connectors._blocks(config(sparse={})))
    assert len(keys) == 3


def test_drafts_of_a_model_are_not_offloaded():
    for method in ("eagle", "draft_model"):
        drafts = SimpleNamespace(method=method)
        with pytest.raises(SparseConfigError, match="beside drafts of a model"):
            connectors.configure(config(size=1.0, speculation=drafts))
    for drafts in (
        SimpleNamespace(method="ngram"),
        SimpleNamespace(method="draft_model", vllm_sparse_lossless=True),
    ):
        connectors.configure(config(size=1.0, speculation=drafts))


def test_the_callers_configuration_is_left_alone():
    given = config(dict(kv_connector="OffloadingConnector"))
    mine = given.kv_transfer_config
    connectors.configure(given)
    assert mine.kv_connector_module_path is None
    assert not mine.kv_connector_extra_config


def test_engines_without_a_connector_stay_without():
    vllm_config = config()
    connectors.configure(vllm_config)
    assert vllm_config.kv_transfer_config is None


OTHERS = [
    "ExampleConnector",
    "LMCacheConnectorV1",
    "LMCacheMPConnector",
    "MooncakeConnector",
    "MultiConnector",
    "NixlConnector",
]


@pytest.mark.parametrize("name", OTHERS)
def test_other_connectors_are_refused_by_name(name):
    with pytest.raises(SparseConfigError) as error:
        connectors.configure(config(dict(kv_connector=name)))
    assert str(error.value) == (
        f"--attention-backend sparq cannot serve this engine: the KV connector {name} "
        "is not served, remove --kv-transfer-config (to keep blocks in host memory: "
        f"{NATIVE})"
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(size=1.0, backend="lmcache"), "use --kv-offloading-backend native"),
        (
            dict(size=1.0, enable_prefix_caching=False),
            "remove --no-enable-prefix-caching",
        ),
        (dict(size=1.0, pipeline_parallel_size=2), "pipeline parallelism"),
        (
            dict(
                transfer=dict(
                    kv_connector="OffloadingConnector", kv_connector_module_path="mine"
                )
            ),
            "remove kv_connector_module_path from --kv-transfer-config",
        ),
        (
            dict(
                transfer=dict(kv_connector_extra_config={"spec_name": "Mine"}), size=1.0
            ),
            "Mine is not served, remove spec_name from kv_connector_extra_config",
        ),
        (
            dict(transfer=dict(kv_connector_extra_config=tiers("fs", "obj")), size=1.0),
            "tier obj is not served, remove it from secondary_tiers",
        ),
        (
            dict(
                transfer=dict(kv_connector_extra_config={"canonical_layout": True}),
                size=1.0,
            ),
            "canonical_layout takes blocks apart",
        ),
    ],
    ids=["lmcache", "no-cache", "pipeline", "class", "spec", "tier", "canonical"],
)
def test_offloading_that_is_not_tested_is_refused(asked, said):
    with pytest.raises(SparseConfigError, match=said):
        connectors.configure(config(**asked))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("TieringOffloadingSpec", "served on CPUs only, remove spec_name"),
        ("HostOffloadingSpec", "offloading with HostOffloadingSpec is not served"),
    ],
)
def test_gpus_have_vllms_own_copies_and_other_devices_none(spec, said, monkeypatch):
    monkeypatch.setattr(connectors, "_device_type", lambda: "xpu")
    with pytest.raises(SparseConfigError, match="cuda only, remove --kv-offloading-"):
        connectors.configure(config(size=1.0))
    chosen = dict(kv_connector="OffloadingConnector")
    with pytest.raises(SparseConfigError, match="cuda only, remove --kv-transfer-conf"):
        connectors.configure(config(chosen))
    monkeypatch.setattr(connectors, "_device_type", lambda: "cuda")
    vllm_config = config(size=1.0)
    connectors.configure(vllm_config)
    transfer = vllm_config.kv_transfer_config
    assert transfer.kv_connector_module_path == connectors.OFFLOADING
    assert "spec_name" not in transfer.kv_connector_extra_config
    extra = {"spec_name": spec}
    with pytest.raises(SparseConfigError, match=said):
        connectors.configure(config(dict(kv_connector_extra_config=extra), size=1.0))


def test_vllms_simple_offloading_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    with pytest.raises(SparseConfigError, match="unset VLLM_USE_SIMPLE_KV_OFFLOAD"):
        connectors.configure(config(size=1.0))


class SlidingWindowSpec:
    """Stands for the cache of layers that are not ours."""


@pytest.mark.parametrize("others", [1, 2])
def test_offloading_of_caches_that_are_not_ours_alone_is_refused(others):
    groups = [SimpleNamespace(kv_cache_spec=SlidingWindowSpec()) for _ in range(others)]
    with pytest.raises(SparseConfigError, match="this one has SlidingWindowSpec"):
        OffloadingConnector(None, None, SimpleNamespace(kv_cache_groups=groups))


@pytest.mark.parametrize("per_chunk", [1, 3])
def test_pages_come_back_as_they_were(per_chunk):
    """Two layers of one group, blocks out of order, first and last chunk in part."""
    blocks, page = 16, 40
    caches = [torch.randint(-128, 128, (blocks, page), dtype=torch.int8) for _ in "ab"]
    before = [cache.clone() for cache in caches]
    tensors = [CanonicalKVCacheTensor(cache, page) for cache in caches]
    refs = [[CanonicalKVCacheRef(i, page) for i in range(2)]]
    host = [torch.empty((6, per_chunk * page), dtype=torch.int8) for _ in caches]
    worker = HostOffloadingWorker(CanonicalKVCaches(tensors, refs), host, per_chunk)

    def cached(ids, first):
        return GPULoadStoreSpec(ids, group_sizes=[len(ids)], block_indices=[first])

    whole = [9, 3, 14, 0, 7, 11]
    chunks = [5, 2] if per_chunk == 3 else [5, 2, 0, 1, 4, 3]
    assert worker.submit_store(0, cached(whole, 0), CPULoadStoreSpec(chunks))
    for cache in caches:
        cache.fill_(0)
    # All but the first and the last block, into other blocks.
    there = [1, 2, 4, 5]
    wanted = chunks if per_chunk == 3 else chunks[1:5]
    assert worker.submit_load(1, CPULoadStoreSpec(wanted), cached(there, 1))
    worker.wait({0, 1})
    store, load = worker.get_finished()
    assert (store.job_id, store.transfer_size) == (0, 2 * 6 * page)
    assert (load.job_id, load.transfer_size) == (1, 2 * 4 * page)
    assert store.success and load.success and not worker.get_finished()
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[there], old[whole[1:5]])
        assert not cache[[0, 3, *range(6, blocks)]].any()


@pytest.mark.parametrize(
    ("backend", "sparse"),
    [
        ("STREAMING", {}),
        ("LESS", {"checkpoint": "some/folder"}),
        ("SPARQ", {"selector": "streaming", "sink_tokens": 0, "local_window": 128}),
    ],
)
def test_blocks_that_are_given_back_are_not_offloaded(backend, sparse):
    vllm_config = config(size=1.0)
    vllm_config.additional_config = {"sparse": sparse}
    vllm_config.attention_config.backend = SimpleNamespace(name=backend)
    with pytest.raises(SparseConfigError, match="that are given back are not offload"):
        connectors.configure(vllm_config)
