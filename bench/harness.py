"""Times providers of one result against each other, on cold caches, in alternating order."""

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

Inputs = TypeVar("Inputs")

READ_BUFFER_BYTES = 256 << 20


def print_line(**fields: Any) -> None:
    """Print one JSON line."""
    rounded = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in fields.items()
    }
    print(json.dumps(rounded), flush=True)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def print_machine() -> None:
    """Print what the timings depend on."""
    from kvkernels import native

    print_line(
        machine=_cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],
        python=platform.python_version(),
        torch=torch.__version__,
        isas=native.available_isas(),
        last_level_cache_bytes=last_level_cache_bytes(),
    )


def last_level_cache_bytes() -> int:
    """Size of the largest processor cache; 64 MiB where Linux does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [
        path.read_text().strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=64 << 20)


def make_cold(make: Callable[[], Inputs], num_bytes: int) -> list[Inputs]:
    """As many inputs as together are twice the last level cache, to be used in turn."""
    return [make() for _ in range(max(1, -(-2 * last_level_cache_bytes() // num_bytes)))]


def check_agreement(
    results: Mapping[str, Sequence[torch.Tensor]], baseline: str, tolerance: float
) -> None:
    """Raise RuntimeError unless all providers gave about what the baseline gave."""
    for name, tensors in results.items():
        for got, want in zip(tensors, results[baseline], strict=True):
            error = (got.double() - want.double()).abs().max().item()
            if not error <= tolerance:
                raise RuntimeError(
                    f"{name}: expected to agree with {baseline} to {tolerance}, got {error:.3e}"
                )


def time_alternating(
    providers: Mapping[str, Callable[[Inputs], Any]], inputs: Sequence[Inputs], num_rounds: int
) -> dict[str, list[float]]:
    """Seconds of each run; every round runs all providers, in the order of the round before
    reversed. Each run takes the next of the inputs: none finds what the one before has read."""
    names = list(providers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    next_inputs = itertools.cycle(inputs)
    for round_index in range(-1, num_rounds):  # the first round warms up
        for name in names:
            chosen = next(next_inputs)
            begin = time.perf_counter()
            providers[name](chosen)
            elapsed = time.perf_counter() - begin
            if round_index >= 0:
                seconds[name].append(elapsed)
        names.reverse()
    return seconds


def run_case(
    case: str,
    providers: Mapping[str, Callable[[Inputs], Any]],
    inputs: Sequence[Inputs],
    num_rounds: int,
    num_bytes: int,
    num_flops: int,
) -> None:
    """Time all providers and print a line for each, the baseline (the first) first.

    The bandwidth of reading memory is measured among them, with as many threads:
    `torch.sum` over 256 MiB of float32, which does nothing but read.
    """
    buffer = torch.ones(READ_BUFFER_BYTES // 4)
    baseline = next(iter(providers))
    everything = {**providers, "read": lambda _: buffer.sum()}
    seconds = time_alternating(everything, inputs, num_rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    read_rate = READ_BUFFER_BYTES / medians["read"]
    for name in providers:
        median = medians[name]
        print_line(
            case=case,
            provider=name,
            median_ms=1e3 * median,
            p90_ms=1e3 * sorted(seconds[name])[int(0.9 * (num_rounds - 1))],
            times_as_fast_as_baseline=medians[baseline] / median,
            gbytes_per_s=num_bytes / median / 1e9,
            gflops=num_flops / median / 1e9,
            read_gbytes_per_s=read_rate / 1e9,
            share_of_read=num_bytes / median / read_rate,
        )
