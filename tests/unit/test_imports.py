# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Which files of the package import which, also within functions: arrows, no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import vllm_sparse
from vllm_sparse.selectors import SELECTORS

ROOT = Path(vllm_sparse.__file__).parent
# A file may import those of parts before its own; the longest name counts.
ORDER = [
    "selectors plugin.registry plugin.channel",
    "plugin.versions",
    "config option_rules cache checkpoint anchor_config",
    "ops kernels",
    "methods",
    "stats",
    "plugin.prompts plugin.token_ids",
    "step layer",
    "plugin worker",
    "tools",
    "train",
]
PLACE = {part: i for i, parts in enumerate(ORDER) for part in parts.split()}


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(
        ".__init__"
    )


FILES = {module(file): file for file in ROOT.rglob("*.py")}


def imports(name: str) -> set[str]:
    """Modules of the package that a file names in an import, wherever it stands."""
    file, found = FILES[name], set()
    if name == "methods":
        found |= {path.split(":")[0].partition(".")[2] for path in SELECTORS.values()}
    package = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in FILES else ".".join(base))
    return found & set(FILES) - {name, "", "__init__"}


def test_no_circle():
    TopologicalSorter({name: imports(name) for name in FILES}).prepare()


def place(name: str) -> int:
    parts = name.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((PLACE[n] for n in names if n in PLACE), len(ORDER))


def test_arrows_point_one_way():
    wrong = [
        (name, other)
        for name in FILES
        for other in imports(name)
        if place(name) < place(other)
    ]
    assert not wrong


def test_training_stands_alone():
    """Nothing needs it, and it needs no part that needs vLLM."""
    is_train = lambda name: name.split(".")[0] == "train"
    shared = (
        "checkpoint",
        "anchor_config",
        "cache.layout",
        "cache.lines",
        "methods.less",
    )
    crossing = [
        (name, other)
        for name in FILES
        for other in imports(name)
        if is_train(name) != is_train(other) and other not in shared
    ]
    assert not crossing
    train = [file.read_text() for name, file in FILES.items() if is_train(name)]
    assert len(train) > 10 and not any("import vllm" in text for text in train)
