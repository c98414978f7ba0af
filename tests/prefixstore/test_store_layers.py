"""Loads that bring a few layers of all blocks at a time, each layer verified."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from dict_tier import DictTier
from sample_blocks import make_keys
from stores import use_of
from test_record_codecs import make_block, make_record, restore, with_infinity

from kvkernels import KVPool
from kvkernels.transfer.lanes import Done
from prefixstore.errors import BlockCorrupted, TierTimeout
from prefixstore.keys import ProtectionConfig
from prefixstore.pool_blocks import PoolBlocks, PoolTarget
from prefixstore.record import check_header
from prefixstore.record_layout import RecordLayout
from prefixstore.store import Store
from prefixstore.store.block_targets import FetchedRecord
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig
from prefixstore.tiers.protected import ProtectedTier

NUM_BLOCKS = 8
RAW = (2, 5)  # longer than the others, so their layers are at other offsets
LAYOUT = RecordLayout(6, 1, 16, 16, "bfloat16", 0, ("q8",))
STEPS = (range(2), range(2, 4), range(4, 6))
KEYS = make_keys(NUM_BLOCKS, LAYOUT)
RECORDS = [
    bytes(make_record(key, with_infinity(LAYOUT) if n in RAW else make_block(LAYOUT, n)))
    for n, key in enumerate(KEYS)
]


class Progress:
    """The progress that a load reported: layers, or None for failure."""

    def __init__(self, then: Callable[[int], None] = lambda num_layers: None) -> None:
        self.seen: list[int | None] = []
        self._then = then

    def add_layers(self, num_layers: int) -> None:
        self.seen.append(num_layers)
        self._then(num_layers)

    def fail(self) -> None:
        self.seen.append(None)


class Pool:
    """A pool of blocks full of sevens, to be overwritten."""

    def __init__(self) -> None:
        self.pool = KVPool(LAYOUT.block_format.layout, NUM_BLOCKS)
        self.pool.data.fill_(7.0)
        self.blocks = PoolBlocks(self.pool, [LAYOUT])

    def target(self) -> PoolTarget:
        return self.blocks.target(range(NUM_BLOCKS))

    def is_right(self, number: int) -> bool:
        expected = restore(RECORDS[number], KEYS[number])
        return np.array_equal(self.pool.block_data(number).numpy(), expected)


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.blocks.close()


@pytest.fixture
def tier() -> DictTier:
    tier = DictTier("slow")
    tier.records = {key.block_hash: r for key, r in zip(KEYS, RECORDS, strict=True)}
    return tier


def load(store: Store, pool: Pool, progress: Progress) -> list[str | None]:
    return store.load_layers("slow", KEYS, pool.target(), STEPS, progress, math.inf)


def test_layers_of_all_blocks_come_step_by_step(pool: Pool, tier: DictTier) -> None:
    target = pool.target()

    def look(num_layers: int) -> None:
        target.wait_layer(num_layers - 1)
        assert not (pool.pool.data[:, :num_layers] == 7.0).flatten(1).all(1).any()
        assert (pool.pool.data[:, num_layers:] == 7.0).all()

    fast, progress = DictTier("fast"), Progress(look)
    with Store([fast, tier]) as store:
        found = store.load_layers("slow", KEYS, target, STEPS, progress, math.inf)
        assert found == ["slow"] * NUM_BLOCKS and progress.seen == [2, 4, 6]
        assert all(pool.is_right(number) for number in range(NUM_BLOCKS))
        assert use_of(store, "slow").num_hits == NUM_BLOCKS
        assert store.flush(30)
        assert fast.records == tier.records  # whole records were promoted


def test_a_disk_gives_layers(pool: Pool, tmp_path: Path) -> None:
    """A disk gives layers, whose bytes may begin and end anywhere in its pages."""
    disk = DiskTier(DiskTierConfig(tmp_path, 1 << 20))
    errors = disk.put_many([key.name for key in KEYS], [memoryview(one) for one in RECORDS])
    assert errors == [None] * NUM_BLOCKS
    progress = Progress()
    with Store([disk]) as store:
        deadline = time.monotonic() + 30
        found = store.load_layers("disk", KEYS, pool.target(), STEPS, progress, deadline)
    assert found == ["disk"] * NUM_BLOCKS and progress.seen == [2, 4, 6]
    assert all(pool.is_right(number) for number in range(NUM_BLOCKS))


@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize("number", [0, *RAW])
def test_a_damaged_layer_is_a_miss(pool: Pool, tier: DictTier, number: int, layer: int) -> None:
    name = KEYS[number].block_hash
    layout = LAYOUT.raw if number in RAW else LAYOUT
    damaged = bytearray(RECORDS[number])
    damaged[int(layout.layer_places[layer, 0]) + 9] ^= 1
    tier.records[name] = bytes(damaged)
    with Store([tier]) as store:
        found = load(store, pool, Progress())
        assert found == [None if n == number else "slow" for n in range(NUM_BLOCKS)]
        assert use_of(store, "slow").num_corrupted == 1
    assert name not in tier.records
    assert (pool.pool.data[number, layer] == 7.0).all()
    assert all(pool.is_right(n) for n in range(NUM_BLOCKS) if n != number)


@pytest.mark.parametrize("num_bytes", [None, 50, 1200, len(RECORDS[0]) - 1])
def test_a_record_that_is_not_whole_is_a_miss(
    pool: Pool, tier: DictTier, num_bytes: int | None
) -> None:
    name = KEYS[0].block_hash
    record = tier.records.pop(name)
    if num_bytes is not None:
        tier.records[name] = record[:num_bytes]
    progress = Progress()
    with Store([tier]) as store:
        assert load(store, pool, progress) == [None] + ["slow"] * (NUM_BLOCKS - 1)
        use = use_of(store, "slow")
        assert (use.num_misses, use.num_corrupted) == (1, num_bytes is not None)
    assert name not in tier.records  # so that it is written again
    assert progress.seen[-1] is None
    assert all(pool.is_right(number) for number in range(1, NUM_BLOCKS))


# before the first record's header, its second layers, and its last ones
@pytest.mark.parametrize("num_before", [0, NUM_BLOCKS + len(RAW), 2 * NUM_BLOCKS + len(RAW)])
def test_a_record_that_its_tier_calls_corrupted_is_deleted(
    pool: Pool, tier: DictTier, num_before: int
) -> None:
    num_reads = 0

    def fail(call: str) -> None:
        nonlocal num_reads
        num_reads += call == "get"
        if call == "get" and num_reads == num_before + 1:
            raise BlockCorrupted("slow: expected a manifest, got none")

    tier.fail = fail
    with Store([tier]) as store:
        assert load(store, pool, Progress()) == [None] + ["slow"] * (NUM_BLOCKS - 1)
        use = use_of(store, "slow")
        assert (use.num_misses, use.num_corrupted) == (1, 1)
    assert [*tier.records] == [key.block_hash for key in KEYS[1:]]


def test_a_tier_that_fails_between_two_layers_loses_no_record(pool: Pool, tier: DictTier) -> None:
    num_reads = 0

    def fail(call: str) -> None:
        nonlocal num_reads
        num_reads += call == "get"
        if num_reads > 2 * NUM_BLOCKS and call == "get":
            raise TierTimeout("slow: expected an answer in time, got none")

    tier.fail = fail
    progress = Progress()
    with Store([tier]) as store:
        assert load(store, pool, progress) == [None] * NUM_BLOCKS
        use = use_of(store, "slow")
        assert (use.num_hits, use.num_misses, use.num_corrupted) == (0, NUM_BLOCKS, 0)
    assert progress.seen == [2, None, None]
    assert len(tier.records) == NUM_BLOCKS


def test_a_load_that_raises_has_let_go_of_its_blocks(pool: Pool, tier: DictTier) -> None:
    """The lane is busy with other blocks; afterwards it must not write the released ones."""
    num_reads, is_raised, is_free = 0, threading.Event(), threading.Event()

    def fail(call: str) -> None:
        nonlocal num_reads
        num_reads += call == "get"
        if num_reads > 2 * NUM_BLOCKS and call == "get":
            is_raised.set()
            raise MemoryError("what no tier may raise")

    tier.fail = fail
    lane = pool.blocks.transfer._lane
    lane.submit(lambda: is_free.wait(30) and None)
    with Store([tier]) as store, ThreadPoolExecutor(1) as thread:
        loading = thread.submit(load, store, pool, Progress())
        assert is_raised.wait(30)
        assert not wait([loading], 0.3).done
        is_free.set()
        with pytest.raises(MemoryError):
            loading.result(30)
        pool.pool.data.fill_(3.0)  # the blocks belong to others now
        lane.submit(lambda: None).wait()
    assert (pool.pool.data == 3.0).all()


def test_a_restoration_that_raises_waits_for_what_it_began(pool: Pool) -> None:
    """Records of two layouts are restored at the same time, and the second may fail to start."""
    target, is_free = pool.target(), threading.Event()
    lane = pool.blocks.transfer._lane
    begun = []

    class Busy:
        """A lane that has no room for a second job."""

        def run(self, work: Callable[[], None], after: Done | None = None) -> Done:
            if begun:
                is_free.set()
                raise MemoryError("no room")
            lane.submit(lambda: is_free.wait(30) and None)
            begun.append(lane.submit(work, after))
            return begun[0]

    pool.blocks.transfer._lane = Busy()
    records = [
        FetchedRecord(n, key, check_header(record, key), np.frombuffer(record, np.uint8))
        for n, (key, record) in enumerate(zip(KEYS, RECORDS, strict=True))
    ]
    with pytest.raises(MemoryError):
        target.start(records)
    pool.blocks.transfer._lane = lane
    pool.pool.data.fill_(3.0)
    lane.submit(lambda: None).wait()
    assert (pool.pool.data == 3.0).all()


def test_layers_are_asked_of_tiers_that_give_them_sooner() -> None:
    """Memory's records are decoded in place, and parts of protected records cannot be verified."""
    memory = MemoryTier(MemoryTierConfig(1 << 20))
    protected = ProtectedTier(DictTier("protected"), ProtectionConfig(auth_key=bytes(range(32))))
    with Store([memory, DictTier("slow"), protected]) as store:
        assert store.layered_tiers == ["slow"]
