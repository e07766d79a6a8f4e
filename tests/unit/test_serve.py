# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``vllm-sparse serve``: vLLM's command gets the arguments, its status comes back."""

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from pydantic import BaseModel, field_validator  # noqa: E402
from vllm.entrypoints.cli.serve import ServeSubcommand  # noqa: E402

from vllm_sparse import __main__  # noqa: E402
from vllm_sparse.config import SparseConfigError  # noqa: E402

ROOT = Path(__file__).parents[2]


def serve(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["vllm-sparse", "serve", *arguments])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    return end.value.code


@pytest.fixture
def served(monkeypatch) -> list:
    """The arguments with which vLLM's command was called."""
    calls: list = []
    monkeypatch.setattr(ServeSubcommand, "cmd", calls.append)
    return calls


def test_arguments_are_those_of_vllm_serve(monkeypatch, served):
    status = serve(
        monkeypatch,
        *("MODEL", "--attention-backend", "sparq", "--max_model_len", "2k"),
        *("--additional-config.sparse.top_k", "0.25", "--port", "8123"),
        *("--attention-config.backend_per_kind.full_attention", "twilight"),
    )
    assert not status
    (args,) = served
    assert (args.model_tag, args.port, args.max_model_len) == ("MODEL", 8123, 2000)
    assert args.attention_backend == "sparq"
    assert args.additional_config == {"sparse": {"top_k": 0.25}}
    kinds = args.attention_config.backend_per_kind
    assert {kind: backend.name for kind, backend in kinds.items()} == {
        "full_attention": "TWILIGHT"
    }


def test_a_wrong_option_ends_it_with_vllms_message(monkeypatch, served, capsys):
    assert serve(monkeypatch, "MODEL", "--no-such-option") == 2
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err
    assert not served


def test_a_configuration_that_is_refused_says_why_and_no_more(monkeypatch):
    class Options(BaseModel):
        top_k: float

        @field_validator("top_k")
        @classmethod
        def check(cls, value):
            raise SparseConfigError("sparse.top_k = 2.0 is not allowed")

    def configured(args) -> None:
        Options(top_k=2.0)

    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(configured))
    assert serve(monkeypatch, "MODEL") == "sparse.top_k = 2.0 is not allowed"


def test_the_servers_exit_status_is_the_commands(monkeypatch):
    def ended(args) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(ended))
    assert serve(monkeypatch, "MODEL") == 3


def test_help_needs_no_distribution_named_vllm():
    """In a process of its own, as users start it."""
    command = [sys.executable, "-m", "vllm_sparse", "serve", "--help=attention-backend"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "--attention-backend" in done.stdout


def test_the_console_script_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (script,) = project["scripts"].items()
    assert EntryPoint(*script, "console_scripts").load() is __main__.main
