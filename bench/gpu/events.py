"""Times calls with device events, on inputs that are not in the device's cache."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

NUM_ROUNDS = 15
# An idle device's clocks are low: one that was timed at once took up to a fifth longer.
WARM_UP_S = 0.02
# Inputs used in turn, so that none is in the cache when its turn comes.
MAX_INPUTS = 24


def time_calls(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one of the calls, which have run before: median over rounds of all."""
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
    """Microseconds of a call: as called from Python, and replayed from a graph without it."""
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
    """What a call, which has run before, gives when it is replayed from a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.fill_(torch.nan)  # it stays so where the call launches on another stream
    graph.replay()
    return out.clone()  # the graph owns its memory


def make_cold(make: Callable[[], Any], num_bytes: int) -> list[Any]:
    """As many inputs as together are four times the device's cache."""
    torch.cuda.empty_cache()  # what the case before took
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(MAX_INPUTS, -(-4 * cache_bytes // num_bytes))
    with torch.device("cuda"):
        return [make() for _ in range(count)]
