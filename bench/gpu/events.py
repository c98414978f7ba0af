"""Times calls with device events, on inputs that are not in the device's cache."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

NUM_ROUNDS = 15
# An idle device's clocks are low: without warming up, calls took up to a fifth longer.
WARM_UP_S = 0.02
# Number of inputs used in turn, so that none is still in the cache when its turn comes.
MAX_INPUTS = 24


def time_calls(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds per call, the median over rounds of all calls, which must have run before."""
    begin_s = time.monotonic()
    while time.monotonic() < begin_s + WARM_UP_S:
        for call in calls:
            call()
        torch.cuda.synchronize()
    begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(NUM_ROUNDS)] for _ in "ab")
    for begin, end in zip(begins, ends, strict=True):
        begin.record()
        for call in calls:
            call()
        end.record()
    torch.cuda.synchronize()
    times_ms = (begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True))
    return 1e3 * statistics.median(times_ms) / len(calls)


def time_both_ways(calls: Sequence[Callable[[], Any]]) -> dict[str, float]:
    """Microseconds of a call: as called from Python, and as replayed from a graph."""
    for call in calls:
        call()
    eager_us = time_calls(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return {"eager_us": eager_us, "graph_us": time_calls([graph.replay]) / len(calls)}


def replayed(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The output of a call, which must have run before, when replayed from a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.fill_(torch.nan)  # stays NaN if the call launched on another stream
    graph.replay()
    return out.clone()  # the graph owns its memory


def make_cold(make: Callable[[], Any], num_bytes: int) -> list[Any]:
    """Inputs that together are four times as large as the device's cache."""
    torch.cuda.empty_cache()  # memory of the previous case
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(MAX_INPUTS, -(-4 * cache_bytes // num_bytes))
    with torch.device("cuda"):
        return [make() for _ in range(count)]
