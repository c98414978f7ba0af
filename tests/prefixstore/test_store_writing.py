"""Blocks become records many at a time, and whatever fails, each block is let go of once."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from dict_tier import DictTier
from failing_tiers import Gate
from sample_blocks import LAYOUT, make_keys, make_payload, make_record
from stores import use_of
from test_record_codecs import make_record as make_record_of

from kvkernels import KVPool
from prefixstore.pool_blocks import PoolBlocks
from prefixstore.record_layout import RecordLayout
from prefixstore.store import Store, StoreConfig
from prefixstore.store.block_sources import MAX_RECORDS_BYTES, HostBlock, WrittenRecord
from prefixstore.store.write_queue import WriteJob, WriteQueue

NUM_BLOCKS = 24
CODED = RecordLayout(3, 1, 16, 16, "bfloat16", 0, ("q8",))


class Maker:
    """Makes records as a host's blocks do, tells how many at a time, and may fail."""

    max_records = 5

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.sizes: list[int] = []

    @contextmanager
    def records(self, keys, sources):
        self.sizes.append(len(keys))
        if len(self.sizes) - 1 == self.fails_at:
            raise ZeroDivisionError("a bug")
        with sources[0].block.maker.records(keys, [source.block for source in sources]) as records:
            yield records


class Block:
    """A block in host memory that another maker makes records of."""

    def __init__(self, payload, maker: Maker) -> None:
        self.block, self.maker = HostBlock(payload), maker
        self.num_bytes = self.block.num_bytes


def save_behind(store: Store, gate: Gate, keys, sources) -> list[int]:
    """Save blocks while the writer is held up by another, so that it takes them together."""
    done: list[int] = []
    (first,) = make_keys(1, seed=99)
    assert store.save(first, HostBlock(make_payload(first)))
    assert gate.entered.wait(30)
    for number, (key, source) in enumerate(zip(keys, sources, strict=True)):
        assert store.save(key, source, done=lambda number=number: done.append(number))
    gate.open()
    assert store.flush(30)
    return done


def test_records_are_made_together_by_maker() -> None:
    gate, one, other = Gate("put"), Maker(), Maker()
    tier = DictTier("tier", gate)
    keys = make_keys(12)
    sources = [
        Block(make_payload(key), one if number % 2 else other) for number, key in enumerate(keys)
    ]
    with Store([tier]) as store:
        done = save_behind(store, gate, keys, sources)
    assert (one.sizes, other.sizes) == ([5, 1], [5, 1])
    assert sorted(done) == list(range(12))
    assert all(tier.records[key.block_hash] == make_record(key) for key in keys)


def test_a_maker_that_fails_costs_what_it_had_at_hand(caplog: pytest.LogCaptureFixture) -> None:
    """The tier is not blamed, and the writing goes on."""
    gate, maker = Gate("put"), Maker(fails_at=1)
    tier = DictTier("tier", gate)
    keys = make_keys(12)
    with Store([tier]) as store:
        done = save_behind(store, gate, keys, [Block(make_payload(key), maker) for key in keys])
        assert sorted(done) == list(range(12))
        assert [key.block_hash in tier.records for key in keys] == [True] * 5 + [False] * 7
        assert "a bug" in caplog.text and not use_of(store, "tier").is_down
        assert store.save(keys[11], HostBlock(make_payload(keys[11])))
        assert store.flush(30)
        assert keys[11].block_hash in tier.records
        assert store.check() == []


def test_blocks_of_a_pool_with_several_codecs_in_one_call() -> None:
    gate = Gate("put")
    tier = DictTier("tier", gate)
    keys = [
        key if number % 5 else replace(key, layout=CODED.raw)
        for number, key in enumerate(make_keys(NUM_BLOCKS, CODED))
    ]
    pool = KVPool(CODED.block_format.layout, NUM_BLOCKS)
    pool.data.copy_(torch.randn(pool.data.shape))
    pool.data[7, 0, 0, 0, 0, 0] = torch.inf  # written raw
    pool_blocks = PoolBlocks(pool, [CODED, CODED.raw])
    with Store([tier]) as store:
        done = save_behind(store, gate, keys, map(pool_blocks.source, range(NUM_BLOCKS)))
    pool_blocks.close()
    assert sorted(done) == list(range(NUM_BLOCKS))
    for number, key in enumerate(keys):
        block = pool.block_data(number).numpy()
        assert tier.records[key.block_hash] == make_record_of(key, block), number


def test_a_queue_gives_as_many_as_fit_into_a_batch() -> None:
    queue = WriteQueue(1 << 30, 100)
    (key,) = make_keys(1)
    sizes = [300, 200, 500, 1, 2000, 7]
    for size in sizes:
        source = WrittenRecord(torch.zeros(size, dtype=torch.uint8).numpy())
        assert queue.offer(WriteJob(key, source, (0,)))
    taken = []
    while queue.sizes() != (0, 0):
        taken.append([job.source.num_bytes for job in queue.take(2, 1000)])
        assert queue.check() == []
        queue.finish()
    assert taken == [[300, 200], [500, 1], [2000], [7]]


def test_what_is_made_at_once_fits_the_slots() -> None:
    for layout in (LAYOUT, RecordLayout(32, 8, 128, 64, "bfloat16")):
        pool_blocks = PoolBlocks(KVPool(layout.block_format.layout, 1), [layout])
        assert 4 <= pool_blocks.max_records <= max(4, MAX_RECORDS_BYTES // layout.record_bytes)
        pool_blocks.close()


def test_a_block_saved_twice_at_once_is_one_record() -> None:
    gate = Gate("put")
    tier = DictTier("tier", gate)
    (key,) = make_keys(1)
    sources = [HostBlock(make_payload(key)) for _ in range(3)]
    with Store([tier], StoreConfig()) as store:
        assert sorted(save_behind(store, gate, [key] * 3, sources)) == [0, 1, 2]
    assert tier.records[key.block_hash] == make_record(key)
