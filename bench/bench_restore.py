"""Time hits, from a record in a tier to its payload in the pool, and the copies they stand on.

A run restores a batch of records, one at a time. `copy` is two copies in memory; `raw_file` a read
past the page cache, as the disk tier does, and a copy; `plain_file` the same from a warm page
cache; `unverified` the tier without the store's checks. All files are flushed to disk before.
"""

import os
import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from bench.harness import check_agreement, run_case, write_out
from prefixstore.record import BlockKey, RecordLayout, chain_keys, encode
from prefixstore.store import Store
from prefixstore.store.block_targets import HostBlocks
from prefixstore.tiers.base import Tier
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig
from prefixstore.tiers.pages import PAGE_BYTES, page_aligned, round_up

BATCH_BYTES = 16 << 20

LAYOUTS = {
    "small": RecordLayout(6, 1, 64, 64, "bfloat16"),
    "smollm2_135m": RecordLayout(30, 3, 64, 64, "bfloat16"),
    "llama3_8b": RecordLayout(32, 8, 128, 64, "bfloat16"),
}


@dataclass(frozen=True)
class Case:
    medium: str
    model: str

    @property
    def name(self) -> str:
        return f"{self.medium}_restore_{self.model}"

    @property
    def layout(self) -> RecordLayout:
        return LAYOUTS[self.model]

    @property
    def slot_bytes(self) -> int:
        """Size of a record, rounded up to whole pages."""
        return round_up(self.layout.record_bytes, PAGE_BYTES)

    @property
    def batch_size(self) -> int:
        return BATCH_BYTES // self.layout.record_bytes


CASES = [Case(medium, model) for medium in ("memory", "disk") for model in LAYOUTS]


class Holder(Protocol):
    """Holds a number of records; buffers begin on pages."""

    def put(self, number: int, record: np.ndarray) -> None: ...
    def get(self, number: int, out: np.ndarray) -> None: ...
    def close(self) -> None: ...


class Copies:
    """The limit of memory: copies into an array and out of it."""

    def __init__(self, num_records: int, record_bytes: int) -> None:
        self._arena = page_aligned(num_records * record_bytes).reshape(num_records, -1)

    def put(self, number: int, record: np.ndarray) -> None:
        np.copyto(self._arena[number], record[: self._arena.shape[1]])

    def get(self, number: int, out: np.ndarray) -> None:
        np.copyto(out[: self._arena.shape[1]], self._arena[number])

    def close(self) -> None:
        pass


class PlainFile:
    """The limit of the disk: one system call per record, at fixed places of one file."""

    def __init__(self, path: Path, flags: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | flags)

    def put(self, number: int, record: np.ndarray) -> None:
        assert os.pwrite(self._fd, record.data, number * record.nbytes) == record.nbytes

    def get(self, number: int, out: np.ndarray) -> None:
        assert os.preadv(self._fd, [out.data], number * out.nbytes) == out.nbytes

    def close(self) -> None:
        os.close(self._fd)


class TierHolder:
    """A tier as a holder."""

    def __init__(self, tier: Tier, keys: list[BlockKey], record_bytes: int) -> None:
        self.tier = tier
        self._keys = keys
        self._record_bytes = record_bytes

    def put(self, number: int, record: np.ndarray) -> None:
        self.tier.put(self._keys[number].name, record[: self._record_bytes].data)

    def get(self, number: int, out: np.ndarray) -> None:
        num_read = self.tier.get(self._keys[number].name, out.data)
        assert num_read == self._record_bytes, f"expected {self._record_bytes}, got {num_read}"

    def close(self) -> None:
        self.tier.close()


def make_holders(case: Case, keys: list[BlockKey], directory: Path) -> dict[str, Holder]:
    """A holder for each provider, the baseline first; none finds another's data in the caches."""
    num_records, record_bytes = len(keys), case.layout.record_bytes
    slab_bytes = case.batch_size * case.slot_bytes
    capacity_bytes = num_records // case.batch_size * slab_bytes
    holders: dict[str, Holder] = {}
    if case.medium == "memory":
        holders["copy"] = Copies(num_records, record_bytes)
    else:
        holders["raw_file"] = PlainFile(directory / "raw", os.O_DIRECT)
        holders["plain_file"] = PlainFile(directory / "plain", 0)
    for name in ("unverified", "kvkernels"):
        tier: Tier
        if case.medium == "memory":
            tier = MemoryTier(MemoryTierConfig(capacity_bytes, slab_bytes))
        else:
            tier = DiskTier(DiskTierConfig(directory / name, capacity_bytes, slab_bytes))
        holders[name] = TierHolder(tier, keys, record_bytes)
    return holders


def put_all(holder: Holder, records: np.ndarray, numbers: range) -> None:
    for number in numbers:
        holder.put(number, records[number])


def restore_all(
    holder: Holder, out: np.ndarray, record_bytes: int, pool: np.ndarray, numbers: range
) -> None:
    payload = out[record_bytes - pool.shape[1] : record_bytes]
    for number in numbers:
        holder.get(number, out)
        np.copyto(pool[number], payload)


def load_all(store: Store, keys: list[BlockKey], pool: np.ndarray, numbers: range) -> None:
    for number in numbers:
        assert store.load_many([keys[number]], HostBlocks([pool[number]])) != [None]


def make_providers(
    case: Case,
    holders: dict[str, Holder],
    keys: list[BlockKey],
    num_records: int,
    stack: ExitStack,
) -> dict[str, Callable[[range], None]]:
    out = page_aligned(case.slot_bytes)
    providers: dict[str, Callable[[range], None]] = {}
    for name, holder in holders.items():
        pool = np.zeros((num_records, case.layout.payload_bytes), np.uint8)
        pool[:] = 1  # so that page faults fall outside timed runs
        if isinstance(holder, TierHolder) and name == "kvkernels":
            store = stack.enter_context(Store([holder.tier]))
            providers[name] = partial(load_all, store, keys, pool)
        else:
            providers[name] = partial(restore_all, holder, out, case.layout.record_bytes, pool)
    return providers


def make_keys_and_records(case: Case, num_records: int) -> tuple[list[BlockKey], np.ndarray]:
    layout = case.layout
    tokens = np.arange(num_records * layout.block_size)
    keys = chain_keys(layout, bytes(16), tokens)
    payload = np.resize(np.arange(251, dtype=np.uint8), layout.payload_bytes)
    records = page_aligned(num_records * case.slot_bytes).reshape(num_records, -1)
    for key, record in zip(keys, records, strict=True):
        encode(key, payload, record[: layout.record_bytes])
    return keys, records


def check_contents(case: Case, holders: dict[str, Holder], numbers: range) -> None:
    """Raise unless all holders have the same records."""
    results = {}
    for name, holder in holders.items():
        outs = [page_aligned(case.slot_bytes) for _ in numbers]
        for number, out in zip(numbers, outs, strict=True):
            holder.get(number, out)
        results[name] = [torch.from_numpy(out[: case.layout.record_bytes]) for out in outs]
    check_agreement(results, next(iter(holders)), 0.0)


def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for case in CASES:
        if case_filter not in case.name:
            continue
        # a batch for each round and the warm-up: no round finds another's data in the caches
        num_records = case.batch_size * (num_rounds + 1)
        keys, records = make_keys_and_records(case, num_records)
        batches = [
            range(start, start + case.batch_size)
            for start in range(0, num_records, case.batch_size)
        ]
        random.Random(0).shuffle(batches)  # so that read-ahead of one does not help the next
        with tempfile.TemporaryDirectory() as path, ExitStack() as stack:
            holders = make_holders(case, keys, Path(path))
            for holder in holders.values():
                stack.callback(holder.close)
                put_all(holder, records, range(num_records))
            check_contents(case, holders, range(2))
            write_out(Path(path))
            providers = make_providers(case, holders, keys, num_records, stack)
            num_bytes = case.batch_size * case.layout.record_bytes
            run_case(case.name, providers, batches, num_rounds, num_bytes)
