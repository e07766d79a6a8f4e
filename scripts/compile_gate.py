# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Compile every CUDA source for every architecture and refuse register spills.

    python scripts/compile_gate.py [--archs 90a 100] [--jobs 2]

Needs nvcc, no GPU and no torch; without nvcc it says so and passes. What was compiled
once is remembered in build/compile_gate until a source, a flag or nvcc changes.
Exits with 1 after a compile error or when a kernel spills more than ACCEPTED_SPILLS.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts.nvcc import CSRC, CUDA_ARCHS, NVCC_FLAGS, find_nvcc, gencode  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SOURCES = CSRC / "cuda"
CACHE = ROOT / "build" / "compile_gate"

# Kernels of every decode step: none may spill beyond what is listed below.
HOT = (
    "store_rows_kernel",
    "store_and_seal_rows_kernel",
    "seal_rows_kernel",
    "store_codes_kernel",
    "channels_kernel",
    "score_kernel",
    "select_kernel",
    "block_lists_kernel",
    "attend_rows_kernel",
    "attend_code_rows_kernel",
    "attend_code_blocks_kernel",
    "attend_codes_kernel",
    "decode_kernel",
)
# (kernel, instance) -> bytes of spill stores and loads that are accepted on any
# architecture. Shrink these; do not add to them without a measurement.
ACCEPTED_SPILLS = {
    ("select_kernel", ""): 64,
    ("score_kernel", "Lb0ELb0ELi0"): 116,
    ("score_kernel", "Lb0ELb1ELi0"): 116,
    ("score_kernel", "Lb0ELb0ELi1"): 124,  # 10.0 alone
    ("score_kernel", "Lb0ELb1ELi1"): 124,
    # The slow kernel that attends to quantised blocks; 8.0 alone.
    ("attend_codes_kernel", "13__nv_bfloat16"): 80,
    ("attend_codes_kernel", "6__half"): 80,
    ("attend_rows_kernel", "13__nv_bfloat16Li128ELi16ELb0"): 16,
    ("attend_rows_kernel", "13__nv_bfloat16Li256ELi16ELb0"): 912,
    ("attend_rows_kernel", "6__halfLi128ELi16ELb0"): 16,
    ("attend_rows_kernel", "6__halfLi256ELi16ELb0"): 912,
    ("attend_rows_kernel", "13__nv_bfloat16Li256ELi8ELb0"): 136,
    ("attend_rows_kernel", "6__halfLi256ELi8ELb0"): 136,
    ("decode_kernel", "13__nv_bfloat16Li128ELb1ELb0ELb0"): 32,
    ("decode_kernel", "13__nv_bfloat16Li128ELb1ELb1ELb0"): 28,
    ("decode_kernel", "13__nv_bfloat16Li128ELb0ELb1ELb0"): 8,
    ("decode_kernel", "6__halfLi128ELb1ELb0ELb0"): 32,
    ("decode_kernel", "6__halfLi128ELb1ELb1ELb0"): 28,
    ("decode_kernel", "6__halfLi128ELb0ELb1ELb0"): 8,
}


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one instance of a kernel."""

    name: str  # without namespaces, parameters and template arguments
    instance: str  # template arguments, mangled
    registers: int
    spill_bytes: int  # stores and loads


@dataclass(frozen=True)
class Result:
    source: str
    arch: str
    seconds: float  # 0 when remembered
    error: str
    kernels: list[Kernel]


def split_symbol(symbol: str) -> tuple[str, str]:
    """Name and template arguments of a mangled kernel (Itanium C++ ABI)."""
    nested = re.match(r"_ZN?K?", symbol)
    if nested is None:
        return symbol, ""
    at, name = nested.end(), symbol
    while length := re.match(r"\d+", symbol[at:]):
        at += length.end()
        name = symbol[at : at + int(length[0])]
        at += int(length[0])
    arguments = re.match(r"I(.*?)E+v", symbol[at:])
    return name, arguments[1] if arguments else ""


def parse_ptxas(log: str) -> list[Kernel]:
    """Kernels in the output of ``ptxas -v``."""
    kernels = []
    for part in log.split("Compiling entry function '")[1:]:
        name, instance = split_symbol(part[: part.index("'")])
        # Only the first lines of a part are the kernel's own; functions may follow.
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if spills is None or registers is None:
            raise ValueError(f"cannot read what ptxas says of {name}:\n{part}")
        spilled = int(spills[1]) + int(spills[2])
        kernels.append(Kernel(name, instance, int(registers[1]), spilled))
    return kernels


def command(nvcc: str, source: Path, arch: str, output: str) -> list[str]:
    flags = [*NVCC_FLAGS, gencode(arch), "-Xptxas=-v"]
    return [nvcc, *flags, "-c", str(source), "-o", output]


def label(source: Path) -> str:
    return "/".join(source.parts[-2:])


def cache_path(nvcc: str, version: str, source: Path, arch: str) -> Path:
    """Where the result is remembered: a hash of everything that decides it."""
    digest = hashlib.sha256()
    digest.update(repr([version, command(nvcc, Path(source.name), arch, "")]).encode())
    headers = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh")]
    for path in [source, *sorted(headers)]:
        digest.update(path.name.encode() + path.read_bytes())
    stem = label(source).replace("/", "-")
    return CACHE / f"{stem}-{arch}-{digest.hexdigest()[:16]}.json"


def compile_one(nvcc: str, version: str, source: Path, arch: str) -> Result:
    remembered = cache_path(nvcc, version, source, arch)
    if remembered.exists():
        kernels = [Kernel(**k) for k in json.loads(remembered.read_text())]
        return Result(label(source), arch, 0.0, "", kernels)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            command(nvcc, source, arch, f"{folder}/out.o"),
            capture_output=True,
            text=True,
        )
    seconds = time.monotonic() - start
    log = run.stdout + run.stderr
    if run.returncode:
        return Result(label(source), arch, seconds, log.strip(), [])
    kernels = parse_ptxas(log)
    CACHE.mkdir(parents=True, exist_ok=True)
    for outdated in CACHE.glob(remembered.name[:-21] + "*.json"):
        outdated.unlink()
    partial = remembered.with_suffix(".partial")
    partial.write_text(json.dumps([asdict(k) for k in kernels], indent=1))
    partial.replace(remembered)
    return Result(label(source), arch, seconds, "", kernels)


def offenders(results: list[Result]) -> list[tuple[Result, Kernel, int]]:
    """Instances of hot kernels that spill more than is accepted."""
    found = []
    for result in results:
        for kernel in result.kernels:
            allowed = ACCEPTED_SPILLS.get((kernel.name, kernel.instance), 0)
            if kernel.name in HOT and kernel.spill_bytes > allowed:
                found.append((result, kernel, allowed))
    return found


def summary(result: Result) -> str:
    if result.error:
        return "does not compile"
    if not result.kernels:
        return "no kernels"
    worst = max(result.kernels, key=lambda k: k.spill_bytes)
    spills = (
        f"{worst.spill_bytes} bytes ({worst.name})" if worst.spill_bytes else "none"
    )
    registers = max(k.registers for k in result.kernels)
    count = len(result.kernels)
    return f"{count} kernels, at most {registers} registers, worst spills: {spills}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=CUDA_ARCHS)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("compile gate skipped: there is no nvcc (CUDA_HOME, PATH)")
        return 0
    version = subprocess.run(
        [nvcc, "--version"], capture_output=True, text=True, check=True
    ).stdout
    # The largest first, so that none runs alone at the end.
    sources = sorted(SOURCES.rglob("*.cu"), key=lambda p: -p.stat().st_size)
    work = [(source, arch) for source in sources for arch in options.archs]
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(compile_one, nvcc, version, *item) for item in work]
        for future in as_completed(futures):
            result = future.result()
            results.append(result)
            took = f"{result.seconds:4.0f} s" if result.seconds else "cached"
            place = f"[{len(results):2}/{len(work)}]"
            where = f"{result.source} sm_{result.arch}"
            print(f"{place} {where:32} {took:>6}  {summary(result)}", flush=True)

    failed = [result for result in results if result.error]
    for result in failed:
        print(
            f"\n{result.source} for sm_{result.arch} does not compile:\n{result.error}"
        )
    spilling = offenders(results)
    if spilling:
        print("\nHot kernels that spill registers:")
        print(f"{'kernel':26} {'arch':5} {'spilled':>8} {'accepted':>8}  instance")
    for result, kernel, allowed in spilling:
        print(
            f"{kernel.name:26} {result.arch:5} {kernel.spill_bytes:8} {allowed:8}  "
            f"{kernel.instance}"
        )
    # A renamed kernel must not leave the gate unnoticed.
    instances = {(k.name, k.instance) for result in results for k in result.kernels}
    names = {name for name, _ in instances}
    missing = [name for name in HOT if name not in names]
    missing += [" ".join(key) for key in ACCEPTED_SPILLS if key not in instances]
    missing = [] if failed else missing
    if missing:
        print(f"\nnamed here, but no source has it: {', '.join(missing)}")
    return 1 if failed or spilling or missing else 0


if __name__ == "__main__":
    sys.exit(main())
