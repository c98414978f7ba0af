"""Compare tiers with copies in memory and with direct and buffered files (in TMPDIR).

A run moves a batch of records, as a store does: 16 MiB of rows that begin on pages. All tiers are
full before anything is timed, so each put evicts a record, and the plain providers overwrite one.
No provider flushes the disk. `raw_file` is the fastest known way to use a disk from Python:
O_DIRECT, four threads, one system call per record, one preallocated file. `buffered_file` reads
from the page cache; `buffered_file_cold` evicts its file from it first, which takes a small part of
its time. `lookup` asks for 32 records, half of which are there; `reopen` opens a directory with
100,000 records.
"""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from bench.harness import check_agreement, print_line, run_case, spread, write_out
from prefixstore.block_key import BlockHash, RecordName
from prefixstore.tiers.base import ReadOutcome, Tier
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig
from prefixstore.tiers.pages import PAGE_BYTES, page_aligned, round_up

BATCH_BYTES = 16 << 20
NUM_BATCHES = 16  # that a holder holds
NUM_THREADS = 4
NUM_LOOKED_UP = 32
NUM_HELD = 10_000  # while looking up
LOOKUPS_A_ROUND = 100
NUM_REOPENED = 100_000
ROW_BYTES = {"64k": 64 << 10, "1m": 1 << 20, "4m": 4 << 20, "8m": 8 << 20}


@dataclass(frozen=True)
class Case:
    medium: str
    what: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.medium}_{self.what}_{self.size}"

    @property
    def record_bytes(self) -> int:
        return ROW_BYTES[self.size] - 704  # like a record, no multiple of a page

    @property
    def row_bytes(self) -> int:
        return ROW_BYTES[self.size]

    @property
    def batch_size(self) -> int:
        return BATCH_BYTES // self.row_bytes


CASES = [
    Case(medium, what, size)
    for medium in ("memory", "disk")
    for what in ("put", "get")
    for size in ROW_BYTES
]


class Holder(Protocol):
    """Holds a number of records: a put overwrites the oldest."""

    def put(self, numbers: range, rows: np.ndarray) -> None: ...
    def get(self, numbers: range, rows: np.ndarray) -> None: ...
    def close(self) -> None: ...


class Copies:
    """The limit of memory: copies into an array and out of it.

    It is the tier's own arena: on some machines the rate depends on which memory is used.
    """

    def __init__(self, arena: np.ndarray, case: Case) -> None:
        self._arena = arena.reshape(-1, case.row_bytes)
        self._record_bytes = case.record_bytes

    def put(self, numbers: range, rows: np.ndarray) -> None:
        for number, row in zip(numbers, rows, strict=True):
            held = self._arena[number % len(self._arena)]
            np.copyto(held[: self._record_bytes], row[: self._record_bytes])

    def get(self, numbers: range, rows: np.ndarray) -> None:
        for number, row in zip(numbers, rows, strict=True):
            held = self._arena[number % len(self._arena)]
            np.copyto(row[: self._record_bytes], held[: self._record_bytes])

    def close(self) -> None:
        pass


class PlainFile:
    """The limit of the disk: a system call per record, at fixed places of one file, in threads."""

    def __init__(self, path: Path, num_records: int, case: Case, flags: int) -> None:
        self._num_records = num_records
        self._row_bytes = case.row_bytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | flags)
        os.posix_fallocate(self._fd, 0, num_records * case.row_bytes)
        self._threads = ThreadPoolExecutor(NUM_THREADS)

    def put(self, numbers: range, rows: np.ndarray) -> None:
        self._for_each(os.pwritev, numbers, rows)

    def get(self, numbers: range, rows: np.ndarray) -> None:
        self._for_each(os.preadv, numbers, rows)

    def close(self) -> None:
        self._threads.shutdown()
        os.close(self._fd)

    def _for_each(self, call: Callable[..., int], numbers: range, rows: np.ndarray) -> None:
        def move(number: int, row: np.ndarray) -> None:
            num_moved = call(self._fd, [row.data], number % self._num_records * self._row_bytes)
            assert num_moved == self._row_bytes

        for _ in self._threads.map(move, numbers, rows):
            pass


class ColdFile(PlainFile):
    """The same file, evicted from the page cache before each read."""

    def get(self, numbers: range, rows: np.ndarray) -> None:
        start = numbers.start % self._num_records * self._row_bytes
        os.posix_fadvise(self._fd, start, rows.nbytes, os.POSIX_FADV_DONTNEED)
        super().get(numbers, rows)


class TierHolder:
    """A tier with room for exactly so many records."""

    def __init__(self, tier: Tier, num_records: int, record_bytes: int) -> None:
        self._tier = tier
        # a name comes again only long after its record was evicted
        self._names = make_names(2 * num_records)
        self._num_put = 0
        self._record_bytes = record_bytes

    def put(self, numbers: range, rows: np.ndarray) -> None:
        start = self._num_put % len(self._names)
        self._num_put += len(numbers)
        names = self._names[start : start + len(numbers)]
        outcomes = self._tier.put_many(names, [row[: self._record_bytes].data for row in rows])
        assert outcomes == [None] * len(names), outcomes

    def get(self, numbers: range, rows: np.ndarray) -> None:
        names = self._names[numbers.start : numbers.stop]
        outcomes = self._tier.get_many(names, [row.data for row in rows])
        assert outcomes == [self._record_bytes] * len(names), outcomes

    def close(self) -> None:
        self._tier.close()


class WaitingTierHolder(TierHolder):
    """The same with a deadline: to be able to abandon a hanging read, it copies once more."""

    def get(self, numbers: range, rows: np.ndarray) -> None:
        names = self._names[numbers.start : numbers.stop]
        outcomes = self._get([row.data for row in rows], names, time.monotonic() + 60)
        assert outcomes == [self._record_bytes] * len(names), outcomes

    def _get(
        self, outs: list[memoryview], names: list[RecordName], deadline: float
    ) -> list[ReadOutcome]:
        return self._tier.get_many(names, outs, deadline=deadline)


class AbandoningTierHolder(WaitingTierHolder):
    """Reads as the store does: buffers that were not filled in time would be given up."""

    def _get(
        self, outs: list[memoryview], names: list[RecordName], deadline: float
    ) -> list[ReadOutcome]:
        return self._tier.get_or_abandon_many(names, outs, deadline=deadline)


def make_names(num_names: int) -> list[RecordName]:
    source = random.Random(0)
    return [RecordName(bytes(16), BlockHash(source.randbytes(16))) for _ in range(num_names)]


def make_holders(case: Case, num_records: int, directory: Path) -> dict[str, Holder]:
    """A holder for each provider, the baseline first; none finds another's data in the caches."""
    slab_bytes = case.batch_size * case.row_bytes
    capacity_bytes = num_records // case.batch_size * slab_bytes
    if case.medium == "memory":
        tier = MemoryTier(MemoryTierConfig(capacity_bytes, slab_bytes))
        return {
            "copy": Copies(tier.lent_memory, case),
            "kvkernels": TierHolder(tier, num_records, case.record_bytes),
        }
    holders: dict[str, Holder] = {
        "raw_file": PlainFile(directory / "raw_file", num_records, case, os.O_DIRECT),
        "buffered_file": PlainFile(directory / "buffered_file", num_records, case, 0),
    }
    if case.what == "get":
        holders["buffered_file_cold"] = ColdFile(directory / "cold_file", num_records, case, 0)
    kinds = {
        "kvkernels": (TierHolder, "auto"),
        "kvkernels_with_deadline": (WaitingTierHolder, "auto"),
        "kvkernels_as_store": (AbandoningTierHolder, "auto"),
        "kvkernels_buffered": (TierHolder, "buffered"),  # like buffered_file, page cache warm
    }
    for name in ["kvkernels"] if case.what == "put" else kinds:
        kind, io = kinds[name]
        disk = DiskTier(DiskTierConfig(directory / name, capacity_bytes, slab_bytes, io=io))
        holders[name] = kind(disk, num_records, case.record_bytes)
    return holders


def check_contents(holders: dict[str, Holder], case: Case) -> None:
    """Raise unless all holders have the same first batch."""
    results = {}
    for name, holder in holders.items():
        rows = np.zeros((case.batch_size, case.row_bytes), np.uint8)
        aligned = page_aligned(rows.nbytes).reshape(rows.shape)
        holder.get(range(case.batch_size), aligned)
        rows[:, : case.record_bytes] = aligned[:, : case.record_bytes]
        results[name] = [torch.from_numpy(rows)]
    check_agreement(results, next(iter(holders)), 0.0)


def run(case: Case, num_rounds: int) -> None:
    num_records = case.batch_size * NUM_BATCHES
    batches = [
        range(start, start + case.batch_size) for start in range(0, num_records, case.batch_size)
    ]
    random.Random(0).shuffle(batches)  # so that read-ahead of one does not help the next
    rows = page_aligned(case.batch_size * case.row_bytes).reshape(case.batch_size, -1)
    rows[:] = np.resize(np.arange(251, dtype=np.uint8), rows.shape)
    with tempfile.TemporaryDirectory() as path, ExitStack() as stack:
        holders = make_holders(case, num_records, Path(path))
        for holder in holders.values():
            stack.callback(holder.close)
            for batch in sorted(batches, key=lambda batch: batch.start):
                holder.put(batch, rows)
        check_contents(holders, case)
        write_out(Path(path))
        providers = {
            name: partial(lambda call, numbers: call(numbers, rows), getattr(holder, case.what))
            for name, holder in holders.items()
        }
        num_bytes = case.batch_size * case.record_bytes
        run_case(case.name, providers, batches, num_rounds, num_bytes)


def run_lookups(num_rounds: int) -> None:
    """Print the median and the 99th percentile of look-ups; the tiers take turns."""
    names = make_names(2 * NUM_HELD)
    held, source = names[:NUM_HELD], random.Random(1)
    rows = page_aligned(NUM_HELD * PAGE_BYTES).reshape(NUM_HELD, -1)
    capacity_bytes = 2 * round_up(rows.nbytes, 1 << 20)
    with tempfile.TemporaryDirectory() as path:
        tiers: dict[str, Tier] = {
            "memory": MemoryTier(MemoryTierConfig(capacity_bytes)),
            "disk": DiskTier(DiskTierConfig(Path(path), capacity_bytes)),
        }
        taken: dict[str, list[float]] = {name: [] for name in tiers}
        for tier in tiers.values():
            assert tier.put_many(held, [row.data for row in rows]) == [None] * NUM_HELD
        for _ in range(num_rounds):
            for name, tier in tiers.items():
                for _ in range(LOOKUPS_A_ROUND):
                    asked = source.sample(names, NUM_LOOKED_UP)
                    begin = time.perf_counter()
                    tier.contains_many(asked)
                    taken[name].append(time.perf_counter() - begin)
        for name, seconds in taken.items():
            percentiles = statistics.quantiles(seconds, n=100)
            print_line(
                case=f"{name}_lookup",
                provider="kvkernels",
                num_names=NUM_LOOKED_UP,
                p50_us=1e6 * percentiles[49],
                p99_us=1e6 * percentiles[98],
            )
            tiers[name].close()


def run_reopening(num_rounds: int) -> None:
    """Print how long a directory full of records takes to open."""
    names = make_names(NUM_REOPENED)
    rows = [row.data for row in page_aligned(1000 * PAGE_BYTES).reshape(1000, -1)]
    with tempfile.TemporaryDirectory() as path:
        config = DiskTierConfig(Path(path), NUM_REOPENED * PAGE_BYTES)
        tier = DiskTier(config)
        for start in range(0, NUM_REOPENED, len(rows)):
            assert not any(tier.put_many(names[start : start + len(rows)], rows))
        seconds = []
        for _ in range(num_rounds):
            tier.close()
            begin = time.perf_counter()
            tier = DiskTier(config)
            seconds.append(time.perf_counter() - begin)
        print_line(
            case="disk_reopen",
            provider="kvkernels",
            num_records=tier.stats().num_records,
            **spread(seconds),
        )
        tier.close()


def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for case in CASES:
        if case_filter in case.name:
            run(case, num_rounds)
    if case_filter in "lookup":
        run_lookups(num_rounds)
    if case_filter in "reopen":
        run_reopening(num_rounds)
