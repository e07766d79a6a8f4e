# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The table of model families in docs/compatibility.md, from what the tests said.

pytest -m "slow or not slow" tests/e2e/test_families.py --junitxml families.xml
python -m scripts.family_table families.xml     # keeps the results, writes the table
python -m scripts.family_table                  # the table alone
"""

import argparse
import json
import re
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "families_cpu.json"
DOCS = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- families -->\n", "<!-- /families -->\n"
# Test -> column; what tells tests of one function apart comes after the family's name.
COLUMNS = {
    "test_a_full_budget_gives_stock_vllms_tokens": "full budget",
    "test_sparse_answers_are_the_same_in_company-sparq": "sparq",
    "test_sparse_answers_are_the_same_in_company-twilight": "twilight",
    "test_quantised_blocks_are_the_same_in_company": "k8v4",
    "test_refused_by_engine_and_doctor_alike": "refused",
}
SAID = {"passed": "yes", "failed": "**no**", "skipped": "–", None: "–"}


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """Family -> column -> passed, failed or skipped, of pytest's JUnit report."""
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[(.+?)(-sparq|-twilight)?\]", case.get("name", ""))
        if match is None:
            continue
        test, family, variant = match.groups()
        column = COLUMNS.get(test + (variant or ""))
        if column is None:
            continue
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        if "skipped" in kinds:
            outcome = "skipped"
        found.setdefault(family, {})[column] = outcome
    return found


def table(results: dict) -> str:
    """Markdown, refused families last."""
    columns = [name for name in COLUMNS.values() if name != "refused"]
    lines = [f"| family | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    families = sorted(results, key=lambda name: ("refused" in results[name], name))
    for family in families:
        said = [SAID[results[family].get(column)] for column in columns]
        if results[family].get("refused") == "passed":
            said = ["refused"] * len(columns)
        lines.append(f"| {family} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", nargs="?", type=Path, help="JUnit XML of pytest")
    args = parser.parse_args()
    if args.report is not None:
        from benchmarks.environment import describe

        kept = {"header": describe(), "families": outcomes(args.report)}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    results = json.loads(RESULTS.read_text())["families"]
    DOCS.write_text(before + BEGIN + table(results) + END + after)


if __name__ == "__main__":
    main()
