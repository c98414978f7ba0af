"""Times providers of the same result against each other, with cold caches, in alternating order."""

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.rates import Rates, make_probes, rates_of

Inputs = TypeVar("Inputs")

# A case that takes longer ends after fewer rounds than were asked for.
CASE_LIMIT_S = 60
MIN_ROUNDS = 3
SPIN_S = 0.01
SHORT_ROUND_S = 1

printed_cases: set[str] = set()  # in the lines so far


def rounded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with four digits of each float."""
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in fields.items()
    }


def print_line(**fields: Any) -> None:
    """Print one JSON line."""
    if "case" in fields:
        printed_cases.add(fields["case"])
    print(json.dumps(rounded(fields)), flush=True)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def describe_machine() -> dict[str, Any]:
    """The machine and versions that the timings depend on."""
    from kvkernels import native

    return {
        "machine": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "isas": native.available_isas(),
        "last_level_cache_bytes": last_level_cache_bytes(),
    }


def last_level_cache_bytes() -> int:
    """Size of the largest processor cache; 64 MiB where Linux does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [
        path.read_text().strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=64 << 20)


def make_cold(make: Callable[[], Inputs], num_bytes: int) -> list[Inputs]:
    """Inputs that together are twice as large as the last level cache, to be used in turn."""
    return [make() for _ in range(max(1, -(-2 * last_level_cache_bytes() // num_bytes)))]


def write_out(directory: Path) -> None:
    """Write a directory's files out, so that none is written while others are timed.

    Clean pages can also be dropped from the page cache.
    """
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def check_agreement(
    results: Mapping[str, Sequence[torch.Tensor]], baseline: str, tolerance: float
) -> None:
    """Raise RuntimeError unless all providers gave about what the baseline gave.

    The error is the norm of the difference over the norm of the baseline's output. By the largest
    difference zeros would pass, since outputs of attention over many tokens are small.
    """
    for name, tensors in results.items():
        for got, want in zip(tensors, results[baseline], strict=True):
            length = want.double().norm().item()
            difference = (got.double() - want.double()).norm().item()
            if not difference <= tolerance * length:
                error = difference / length if length else difference
                raise RuntimeError(
                    f"{name}: expected to agree with {baseline} to {tolerance}, got {error:.3e}"
                )


def time_alternating(
    providers: Mapping[str, Callable[[Inputs], Any]],
    inputs: Sequence[Inputs],
    num_rounds: int,
    probes: Mapping[str, Callable[[], Any]] | None = None,
    with_own_threads: Collection[str] = (),
) -> dict[str, list[float]]:
    """Seconds of each run; every round runs all probes, then all providers, in the reverse order of
    the previous round. Each run takes the next of the inputs, so that none finds in the caches what
    the previous one read.

    The probes push code and page tables out of the caches, and a provider's writes must leave the
    caches before there is room for the next one's inputs. So where rounds are short enough for that
    to matter, each timed run follows an untimed one of the same provider. Providers in
    `with_own_threads` run after a pause, because OpenMP's threads spin for milliseconds after a run
    and would take the processors from theirs. After CASE_LIMIT_S no round begins, but at least
    MIN_ROUNDS are run (or as many as were asked for).
    """
    probes = probes or {}
    names = list(providers)
    seconds: dict[str, list[float]] = {name: [] for name in (*names, *probes)}
    next_inputs = itertools.cycle(inputs)
    round_s = 0.0
    ends_at = time.perf_counter() + CASE_LIMIT_S
    for round_index in range(-1, num_rounds):  # the first round warms up
        if round_index >= MIN_ROUNDS and time.perf_counter() > ends_at:
            break
        taken = {name: _seconds_of(probe) for name, probe in probes.items()}
        for name in names:
            if name in with_own_threads:
                time.sleep(SPIN_S)
            if probes and round_s < SHORT_ROUND_S:
                providers[name](next(next_inputs))
            taken[name] = _seconds_of(partial(providers[name], next(next_inputs)))
        round_s = sum(taken[name] for name in names)
        if round_index >= 0:
            for name, value in taken.items():
                seconds[name].append(value)
        names.reverse()
    return seconds


def _seconds_of(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, and number of runs."""
    low, high = tails(seconds)
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p10_ms": 1e3 * low,
        "p90_ms": 1e3 * high,
        "num_rounds": len(seconds),
    }


def tails(values: Sequence[float]) -> tuple[float, float]:
    """The 10th and 90th percentile, not interpolated: each is one of the values."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.1 * last)], ordered[round(0.9 * last)]


def figures(
    seconds: Sequence[float], rates: Rates, num_bytes: int, num_flops: int = 0
) -> dict[str, float]:
    """A provider's times, the least times at the measured rates, and the shares of those."""
    median = statistics.median(seconds)
    found = {
        **spread(seconds),
        "read_floor_ms": 1e3 * num_bytes / rates.read,
        "gbytes_per_s": num_bytes / median / 1e9,
        "read_gbytes_per_s": rates.read / 1e9,
        "best_read_gbytes_per_s": rates.best_read / 1e9,
        "share_of_read": num_bytes / median / rates.read,
        "share_of_best_read": num_bytes / median / rates.best_read,
    }
    if rates.matmul is not None and rates.best_matmul is not None:
        found |= {
            "matmul_floor_ms": 1e3 * num_flops / rates.matmul,
            "tflops": num_flops / median / 1e12,
            "matmul_tflops": rates.matmul / 1e12,
            "best_matmul_tflops": rates.best_matmul / 1e12,
            "share_of_matmul": num_flops / median / rates.matmul,
        }
    return found


def run_case(
    case: str,
    providers: Mapping[str, Callable[[Inputs], Any]],
    inputs: Sequence[Inputs],
    num_rounds: int,
    num_bytes: int,
) -> None:
    """Time all providers and print a line for each, the baseline (the first) first."""
    seconds = time_alternating(providers, inputs, num_rounds, make_probes())
    rates = rates_of(seconds)
    baseline = statistics.median(seconds[next(iter(providers))])
    for name in providers:
        print_line(
            case=case,
            provider=name,
            times_as_fast_as_baseline=baseline / statistics.median(seconds[name]),
            **figures(seconds[name], rates, num_bytes),
        )
