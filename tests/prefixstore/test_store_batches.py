"""Many blocks at once are fetched and decoded together, and each is verified."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dict_tier import DictTier
from sample_blocks import make_keys
from stores import use_of
from test_record_codecs import make_block, make_record, restore, with_infinity

import prefixstore.store.loader as loader
from kvkernels import KVPool
from prefixstore.pool_blocks import PoolBlocks
from prefixstore.record_layout import RecordLayout
from prefixstore.store import Store
from prefixstore.store.block_sources import HostBlock
from prefixstore.store.block_targets import BlockTarget, HostBlocks
from prefixstore.tiers.pages import PAGE_BYTES

NUM_BLOCKS = 20
MISSING, DAMAGED, RAW = 8, (3, 4, 13), (4, 5, 11)
LAYOUT = RecordLayout(3, 1, 16, 16, "bfloat16", 0, ("q8",))
# A layout whose raw records have a shorter header.
LISTED = RecordLayout(6, 1, 16, 16, "bfloat16", 0, ("q8", *("raw",) * 5))


class Targets:
    """Twenty blocks in host memory or in a pool, to restore into and read."""

    def __init__(self, kind: str, layout: RecordLayout) -> None:
        self._layout = layout
        self._pool = KVPool(layout.block_format.layout, NUM_BLOCKS)
        self._pool_blocks = PoolBlocks(self._pool, [layout]) if kind == "pool" else None

    def new(self) -> BlockTarget:
        self._pool.data.fill_(7.0)
        if self._pool_blocks is not None:
            return self._pool_blocks.target(range(NUM_BLOCKS))
        return HostBlocks([self[number] for number in range(NUM_BLOCKS)])

    def __getitem__(self, number: int) -> np.ndarray:
        return self._pool.block_data(number).numpy()

    def close(self) -> None:
        if self._pool_blocks is not None:
            self._pool_blocks.close()


@pytest.fixture(params=["host", "pool"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("layout", [LAYOUT, LISTED], ids=["one codec", "a list"])
@pytest.mark.parametrize("batch_pages", [1, 5, 1000])
def test_all_that_is_right_comes_back(
    kind: str, layout: RecordLayout, batch_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With missing, damaged and raw ones among them; hits are promoted while the next is read."""
    monkeypatch.setattr(loader, "BATCH_BYTES", batch_pages * PAGE_BYTES)
    keys = make_keys(NUM_BLOCKS, layout)
    blocks = [
        with_infinity(layout) if number in RAW else make_block(layout, number)
        for number in range(NUM_BLOCKS)
    ]
    records = [bytes(make_record(*pair)) for pair in zip(keys, blocks, strict=True)]
    fast, slow = DictTier("fast"), DictTier("slow")
    for number, key in enumerate(keys):
        if number != MISSING:
            slow.records[key.block_hash] = records[number]
        if number in DAMAGED:  # in the tier where it is found first
            damaged = bytearray(records[number])
            damaged[layout.raw.header_bytes + 100] ^= 1
            fast.records[key.block_hash] = bytes(damaged)
    targets = Targets(kind, layout)
    expected = ["slow"] * NUM_BLOCKS
    expected[MISSING] = None
    with Store([fast, slow]) as store:
        for tier in ("slow", "fast"):  # then from the tier that they were promoted to
            names = store.load_many(keys, targets.new())
            assert names == [name and tier for name in expected]
            for number, key in enumerate(keys):
                if number != MISSING:
                    assert np.array_equal(targets[number], restore(records[number], key)), number
            assert store.flush(30)
        assert use_of(store, "fast").num_corrupted == len(DAMAGED)
        assert use_of(store, "slow").num_corrupted == 0
        stats = store.stats()
        assert (stats.num_loads, stats.num_misses) == (2 * NUM_BLOCKS, 2)
        assert stats.num_promotions_dropped == 0
    targets.close()


def test_blocks_of_a_pool_become_the_records_of_their_bytes(kind: str) -> None:
    tier = DictTier("tier")
    keys = make_keys(6, LISTED)
    pool = KVPool(LISTED.block_format.layout, 6)
    pool.data.copy_(torch.randn(pool.data.shape))
    pool.data[2, 0, 0, 0, 0, 0] = torch.inf
    pool_blocks = PoolBlocks(pool, [LISTED])
    released: list[int] = []
    with Store([tier]) as store:
        for number, key in enumerate(keys):
            block = pool.block_data(number).numpy()
            source = HostBlock(block) if kind == "host" else pool_blocks.source(number)
            assert store.save(key, source, done=lambda number=number: released.append(number))
        assert store.flush(30)
    pool_blocks.close()
    assert released == list(range(6))
    for number, key in enumerate(keys):
        assert tier.records[key.block_hash] == make_record(key, pool.block_data(number).numpy())


def test_no_blocks_are_no_work() -> None:
    with Store([DictTier("tier")]) as store:
        assert store.load_many([], HostBlocks([])) == []
