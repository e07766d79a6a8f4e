# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``anchors.json``: written, read, refused."""

import json

import pytest

from vllm_sparse.anchor_config import FILE, AnchorConfig

CONFIG = AnchorConfig((3, 9), False, {5: 2}, {"steps": 7})


def test_what_is_written_is_read(tmp_path):
    CONFIG.write(tmp_path)
    assert AnchorConfig.from_json(json.loads((tmp_path / FILE).read_text())) == CONFIG


@pytest.mark.parametrize("name", ["format", "block_size", "line_group", "near_blocks"])
def test_other_rules_are_refused(name):
    with pytest.raises(ValueError, match=f"has {name} 64, this version serves"):
        AnchorConfig.from_json(CONFIG.to_json() | {name: 64})


def test_a_layer_attends_to_lower_ones_only():
    with pytest.raises(ValueError, match="must be a lower one"):
        AnchorConfig((3,), lower_layers={2: 2})
