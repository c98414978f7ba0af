"""Time blocks between a pool and the tiers through the store, and through the bare tier.

A run saves a batch of new blocks out of a pool and waits until the tier has them, or loads a batch
into it. `tier` moves the same records between the tier and plain memory in one call, and neither
encodes nor verifies. All tiers are full before anything is timed. Records are raw; those on disk
are read past the page cache. `disk_spill` saves into memory and waits until the disk tier after it
has the records, too.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.bench_redis import Server
from bench.harness import run_case
from kvkernels import KVPool
from prefixstore.pool_blocks import PoolBlocks
from prefixstore.record import BlockKey, RecordLayout, chain_keys, encode
from prefixstore.store import Store, StoreConfig
from prefixstore.tiers.base import Tier
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig
from prefixstore.tiers.pages import PAGE_BYTES, page_aligned, round_up
from prefixstore.tiers.redis import RedisTier
from prefixstore.tiers.redis.config import RedisTierConfig

NUM_BATCHES = 4  # that the tier holds
LAYOUTS = {
    "96k": RecordLayout(6, 1, 64, 64, "bfloat16"),
    "1m": RecordLayout(32, 2, 64, 64, "bfloat16"),
    "4m": RecordLayout(32, 8, 128, 32, "bfloat16"),
    "8m": RecordLayout(32, 8, 128, 64, "bfloat16"),
}


@dataclass(frozen=True)
class Case:
    medium: str
    what: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.medium}_{self.what}_{self.size}"

    @property
    def layout(self) -> RecordLayout:
        return LAYOUTS[self.size]

    @property
    def row_bytes(self) -> int:
        return round_up(self.layout.record_bytes, PAGE_BYTES)

    @property
    def batch_size(self) -> int:
        """Blocks of a run: several of the store's own batches."""
        return (128 << 20) // self.row_bytes // 4 * 4


CASES = [
    Case(medium, what, size)
    for medium in ("memory", "disk", "unix", "tcp")
    for what in ("save", "load", "spill")
    for size in LAYOUTS
    if medium == "disk" or what != "spill"
]


def open_tier(case: Case, num_records: int, directory: Path, stack: ExitStack) -> Tier:
    """A tier with room for so many records; each save then evicts one."""
    slab_bytes = case.batch_size // 4 * case.row_bytes
    capacity_bytes = round_up(num_records * case.row_bytes, slab_bytes)
    if case.medium == "memory":
        return MemoryTier(MemoryTierConfig(capacity_bytes, slab_bytes))
    if case.medium == "disk":
        return DiskTier(DiskTierConfig(directory / "disk", capacity_bytes, slab_bytes))
    bound = ["--maxmemory", str(capacity_bytes), "--maxmemory-policy", "allkeys-lru"]
    server = Server(directory, bound if case.what == "save" else ())
    stack.callback(server.close)
    return RedisTier(RedisTierConfig.from_url(server.url(case.medium), timeout_s=60))


class Blocks:
    """A pool full of blocks, and an endless supply of fresh keys for them."""

    def __init__(self, case: Case) -> None:
        self.layout = case.layout
        self.pool = KVPool(case.layout.block_format.layout, case.batch_size)
        self.pool.data.copy_(torch.randn(self.pool.data.shape))
        self.pool_blocks = PoolBlocks(self.pool, [case.layout])
        self._seeds = itertools.count()

    def new_keys(self) -> list[BlockKey]:
        tokens = np.arange(self.pool.num_blocks * self.layout.block_size, dtype=np.uint32)
        tokens[0] = next(self._seeds)
        return chain_keys(self.layout, bytes(16), tokens)


def save_all(store: Store, blocks: Blocks, keys: list[BlockKey]) -> None:
    for number, key in enumerate(keys):
        assert store.save(key, blocks.pool_blocks.source(number))
    assert store.flush(60)


def put_all(tier: Tier, rows: np.ndarray, keys: list[BlockKey]) -> None:
    deadline = time.monotonic() + 60
    outcomes = tier.put_many(
        [key.name for key in keys],
        [row[: key.layout.record_bytes].data for row, key in zip(rows, keys, strict=True)],
        deadline=deadline,
    )
    assert outcomes == [None] * len(keys), outcomes


def load_all(store: Store, blocks: Blocks, keys: list[BlockKey]) -> None:
    target = blocks.pool_blocks.target(range(len(keys)))
    assert None not in store.load_many(keys, target, time.monotonic() + 60)


def get_all(tier: Tier, rows: np.ndarray, keys: list[BlockKey]) -> None:
    outs = [row.data for row in rows]
    names, deadline = [key.name for key in keys], time.monotonic() + 60
    outcomes = tier.get_or_abandon_many(names, outs, deadline=deadline)
    assert outcomes == [key.layout.record_bytes for key in keys], outcomes


def run(case: Case, num_rounds: int) -> None:
    blocks = Blocks(case)
    rows = page_aligned(case.batch_size * case.row_bytes).reshape(case.batch_size, -1)
    batches = [blocks.new_keys() for _ in range(NUM_BATCHES)]
    with tempfile.TemporaryDirectory(prefix="kvk") as path, ExitStack() as stack:
        tier = open_tier(case, NUM_BATCHES * case.batch_size, Path(path), stack)
        config = StoreConfig(queue_bytes=1 << 30, held_bytes=1 << 30, queue_entries=1 << 20)
        tiers: list[Tier] = [tier]
        if case.what == "spill":
            slab_bytes = case.batch_size * case.row_bytes
            tiers.insert(0, MemoryTier(MemoryTierConfig(2 * slab_bytes, slab_bytes)))
        store = stack.enter_context(Store(tiers, config))
        for keys in batches:
            for number, key in enumerate(keys):
                encode(key, blocks.pool.block_data(number).numpy(), rows[number])
            put_all(tier, rows, keys)
        providers: dict[str, Callable[[list[BlockKey]], None]]
        if case.what == "load":
            random.Random(0).shuffle(batches)
            providers = {
                "tier": partial(get_all, tier, rows),
                "store": partial(load_all, store, blocks),
            }
        else:
            batches = [blocks.new_keys() for _ in range(4 * (num_rounds + 1))]
            providers = {
                "tier": partial(put_all, tier, rows),
                "store": partial(save_all, store, blocks),
            }
        num_bytes = case.batch_size * case.layout.record_bytes
        run_case(case.name, providers, batches, num_rounds, num_bytes)
        blocks.pool_blocks.close()


def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for case in CASES:
        if case_filter in case.name:
            run(case, num_rounds)
