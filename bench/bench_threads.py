"""A model's pass on threads of kvkernels' own and on OpenMP's, beside busy processes.

The baseline is the host program's OpenMP runtime, where each region waits for all its threads.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier, Event

import numpy as np
import torch

from bench.harness import print_line, spread, time_alternating
from kvkernels.threads import own_threads
from prefixstore.cache import PrefixCache
from prefixstore.engine.pass_layout import Chunk
from prefixstore.engine.runner import ModelRunner
from prefixstore.models import load_model, prepare_smollm2

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Case:
    """A pass over new tokens after cached ones, beside some busy processes."""

    kind: str
    num_cached: int
    num_new: int
    num_busy: int

    @property
    def name(self) -> str:
        return f"{self.kind}_beside_{self.num_busy}"


CASES = [
    Case(kind, num_cached, num_new, num_busy)
    for num_busy in (0, 1, 2)
    for kind, num_cached, num_new in (
        ("decode_at_1k", 1024, 1),
        ("prefill_64", 0, 64),
        ("prefill_512", 0, 512),
    )
]


def keep_busy(begin: Barrier, end: Event) -> None:
    begin.wait()
    while not end.is_set():
        sum(range(10_000))


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run busy processes for all cases, since starting one takes seconds."""
    context = multiprocessing.get_context("spawn")
    begin, end = context.Barrier(count + 1), context.Event()
    processes = [
        context.Process(target=keep_busy, args=(begin, end), daemon=True) for _ in range(count)
    ]
    for process in processes:
        process.start()
    try:
        begin.wait(START_TIMEOUT_S)
        yield
    finally:
        end.set()
        for process in processes:
            process.join()


def run_case(case: Case, runner: ModelRunner, block_size: int, num_rounds: int) -> None:
    num_blocks = -(-(case.num_cached + case.num_new) // block_size)
    chunk = Chunk(
        tokens=np.arange(100, 100 + case.num_new, dtype=np.uint32),
        start=case.num_cached,
        tables=np.arange(num_blocks, dtype=np.int32)[None],
        wants_logits=True,
    )

    def run_on(threads: Callable[[], AbstractContextManager[None]]) -> None:
        runner.threads = threads
        runner.run([chunk])

    runs = {
        "openmp": lambda _: run_on(nullcontext),
        "kvkernels": lambda _: run_on(own_threads),
    }
    with busy_processes(case.num_busy):
        seconds = time_alternating(runs, [None], num_rounds, with_own_threads={"kvkernels"})
    baseline = statistics.median(seconds["openmp"])
    for name, values in seconds.items():
        print_line(
            case=case.name,
            provider=name,
            times_as_fast_as_baseline=baseline / statistics.median(values),
            **spread(values),
        )


def main(case_filter: str = "", num_rounds: int = 15) -> None:
    model = load_model(prepare_smollm2(), torch.bfloat16)
    with PrefixCache.open(model, pool_tokens=2048) as cache:
        blocks = cache.blocks
        runner = ModelRunner(model, blocks.device.groups, blocks.block_size)
        for case in CASES:
            if case_filter in case.name:
                run_case(case, runner, blocks.block_size, num_rounds)
        runner.close()
