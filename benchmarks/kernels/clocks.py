# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Medians in microseconds of calls on several layers' caches, one after the other."""

import statistics
import time
from collections.abc import Callable

import torch

Calls = dict[str, list[Callable[[], None]]]  # by name, a call for every layer


def in_turns(calls: Calls, repeats: int) -> dict[str, float]:
    """On the CPU: names alternate and layers rotate, so that no call finds its data in
    the processor's caches and all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    layers = max(map(len, calls.values()))
    for i in range(layers + repeats):
        for name, of_layers in calls.items():
            start = time.perf_counter()
            of_layers[i % layers]()
            if i >= layers:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) * 1e6 for name, t in times.items()}


def by_graphs(calls: Calls, repeats: int) -> dict[str, float]:
    """On a GPU: replays of a CUDA graph of all layers, so that none is in the L2."""
    return {name: time_graph(of_layers, repeats) for name, of_layers in calls.items()}


def time_graph(calls: list[Callable[[], None]], repeats: int) -> float:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)
