# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Two builds of the library in turns, each by its own tree's benchmark.

    python -m benchmarks.kernels.compare_builds OLD_FOLDER NEW_FOLDER \\
        --command "benchmarks.kernels.decode_attention --peers --cases 16x32768" \\
        --output compare.json

Every folder is a tree with its library built in place. The command, a module and its
options, runs as old, new, old, new, ... on the same machine, and must save JSON with
``--output`` in the way of ``decode_attention``; ``--old-command`` where the old tree's
is another. A figure is the median over the runs; what both have by the name of the case
and of the call is compared.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks.environment import save
from benchmarks.kernels.decode_attention import ADAPTIVE, CALLS

Times = dict[tuple[str, str], float]  # microseconds by case and call


def read(result: dict) -> Times:
    """Of one run; a case of older CPU results is a dictionary."""
    times = {}
    for row in result.get("rows") or result["results"]:
        case = row["case"]
        if isinstance(case, dict):
            case = f"{case['batch']}x{case['seq_len']}"
        for call in dict.fromkeys((*CALLS, *ADAPTIVE)):
            if call in row:
                times[case, call] = row[call]
    return times


def run(folder: Path, command: str, commit: str | None) -> dict:
    """What the command saves.

    Raises:
        SystemExit: it failed.
    """
    path = [str(folder.resolve()), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    if commit:
        environment["VLLM_SPARSE_COMMIT"] = commit
    with tempfile.TemporaryDirectory() as where:
        output = Path(where) / "result.json"
        words = [sys.executable, "-m", *shlex.split(command), "--output", str(output)]
        done = subprocess.run(
            words,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{folder}: {command}\n{done.stdout[-3000:]}")
        return json.loads(output.read_text())


def compare(old: list[Times], new: list[Times]) -> list[dict]:
    """Medians of what both builds have, and new / old: of the medians, and the least
    and the largest of two runs that followed each other."""
    rows = []
    for case, call in old[0]:
        if (case, call) not in new[0]:
            continue
        before, after = ([times[case, call] for times in runs] for runs in (old, new))
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        row = {"case": case, "call": call}
        row |= {"old": statistics.median(before), "new": statistics.median(after)}
        row |= {"new_over_old": row["new"] / row["old"]}
        row |= {"least": min(ratios), "largest": max(ratios)}
        rows.append(row | {"all_old": before, "all_new": after})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("old", type=Path)
    add("new", type=Path)
    add("--command", default="benchmarks.kernels.decode_attention --peers")
    add("--old-command", help="default: as --command")
    add("--commits", nargs=2, default=(None, None), help="where trees have no git")
    add("--rounds", type=int, default=5, help="runs of each build")
    add("--output", type=Path)
    args = parser.parse_args()
    commands = (args.old_command or args.command, args.command)
    builds = list(zip((args.old, args.new), commands, args.commits, strict=True))
    runs: list[list[dict]] = [[], []]
    rows = []
    with tqdm(total=2 * args.rounds, disable=None) as bar:
        for _ in range(args.rounds):
            for found, build in zip(runs, builds, strict=True):
                found.append(run(*build))
                bar.update()
            rows = compare(*([read(result) for result in found] for found in runs))
            # Of old and new: device, versions, commit, conditions.
            builds_are = [
                {k: v for k, v in found[0].items() if k not in ("rows", "results")}
                for found in runs
            ]
            save(args, [{"builds": builds_are, "rows": rows}])
    if not rows:
        raise SystemExit("the builds have no case and call in common")
    print("| case | call | old us | new us | new / old | least to largest |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        spread = f"{r['least']:.3f} to {r['largest']:.3f}"
        print(
            f"| {r['case']} | {r['call']} | {r['old']:.1f} | {r['new']:.1f} "
            f"| {r['new_over_old']:.3f} | {spread} |"
        )


if __name__ == "__main__":
    main()
