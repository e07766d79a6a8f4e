# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the live figures add to a decode step.

    python -m benchmarks.serving.live_cost --model FOLDER_WITH_CONFIG_JSON \\
        --cases 1x8000 16x8000 --output benchmarks/results/live_cost_NAME.json

One engine in this process, measured in turns with the rows of every step counted and
the workers asked as always (every two seconds), asked as often as can be (every second
step), and neither. What kernels count by themselves (tokens kept) is part of all three.
Weights are dummies.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from benchmarks.serving.decode import Timed, make_prompts
from benchmarks.serving.results import save


def switches(reporter) -> dict[str, Callable[[], None]]:
    """By name of what is measured: what switches the engine to it."""
    from vllm_sparse.stats.counters import DeviceCounter

    # An engine that falls idle asks at once, after what is timed.
    add, interval = DeviceCounter.add, reporter._interval

    def switch(counting: bool, seconds: float) -> Callable[[], None]:
        def apply() -> None:
            DeviceCounter.add = add if counting else lambda *args: None
            reporter._interval = seconds
            reporter._working = counting

        return apply

    return {
        "off": switch(False, interval),
        "on": switch(True, interval),
        "every second step": switch(True, 0.0),
    }


def measure(args: argparse.Namespace) -> None:
    """Every case, saved after each repeat: a run that is cut off leaves the rest."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        raise SystemExit("rows are counted otherwise on CPUs: this needs a GPU")
    cases = [tuple(map(int, case.split("x"))) for case in args.cases]
    engine = Timed(
        "sparq",
        model=str(args.model),
        load_format="dummy",
        max_model_len=args.max_model_len,
        max_num_seqs=max(batch for batch, _ in cases),
        gpu_memory_utilization=args.gpu_memory_utilization,
        additional_config={"sparse": json.loads(args.sparse)},
        compilation_config=json.loads(args.compilation_config),
        disable_log_stats=False,
    )
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    modes = switches(scheduler.make_stats.__self__)
    rows: list[dict] = []
    print("| batch | context | live figures | ms a step | vs off |")
    print("|---|---|---|---|---|", flush=True)
    bar = tqdm(total=len(cases) * args.repeats, disable=None)
    for batch, length in cases:
        prompts = make_prompts(batch, length, seed=length + batch)
        engine.seconds(prompts, 1)
        engine.steps(prompts, 16)
        times: dict[str, list[float]] = {name: [] for name in modes}
        for repeat in range(args.repeats):
            # Every mode is first in turn, as a GPU gets slower while it gets warm.
            names = list(modes)
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                modes[name]()
                times[name].append(statistics.fmean(engine.steps(prompts, args.tokens)))
            bar.update()
            found = summary(batch, length, times)
            save(args, rows + found)
        rows += found
        for r in found:
            tqdm.write(
                f"| {batch} | {length} | {r['figures']} | {r['ms']:.3f} "
                f"| {100 * r['vs_off']:+.2f} % |"
            )
    bar.close()


def summary(batch: int, length: int, times: dict[str, list[float]]) -> list[dict]:
    """A row for every mode."""
    medians = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    return [
        {
            "batch": batch,
            "context": length,
            "figures": name,
            "ms": ms,
            "vs_off": ms / medians["off"] - 1,
            "all_ms": [t * 1e3 for t in times[name]],
        }
        for name, ms in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--sparse", default='{"dense_below": 0}', help="options of sparq, as JSON")
    add("--model", type=Path, required=True)
    add("--cases", nargs="+", default=["1x8000", "16x8000"], help="batch x context")
    add("--tokens", type=int, default=600, help="decode steps timed")
    add("--repeats", type=int, default=6)
    add("--max-model-len", type=int, default=32768)
    add("--gpu-memory-utilization", type=float, default=0.9)
    add(
        "--compilation-config",
        default='{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}',
    )
    add("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # The engine must be in this process, where it can be switched.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    measure(args)


if __name__ == "__main__":
    main()
