"""Blocks are encoded as records in batches; whatever fails, each block is released once."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from dict_tier import DictTier
from failing_tiers import Gate, GatedMemory
from sample_blocks import LAYOUT, make_keys, make_payload, make_record
from stores import save, use_of
from test_record_codecs import make_record as make_record_of

from kvkernels import KVPool
from prefixstore.block_key import BlockKey
from prefixstore.pool_blocks import PoolBlocks
from prefixstore.record_layout import RecordLayout
from prefixstore.store import Store, StoreConfig, beside
from prefixstore.store.block_sources import MAX_RECORDS_BYTES, HostBlock, WrittenRecord
from prefixstore.store.write_queue import WriteJob, WriteQueue
from prefixstore.tiers.pages import PAGE_BYTES

NUM_BLOCKS = 24
CODED = RecordLayout(3, 1, 16, 16, "bfloat16", 0, ("q8",))


class Maker:
    """Encodes blocks in host memory, 5 at a time, and may fail."""

    max_records = 10

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.sizes: list[int] = []
        self.made_twice = threading.Event()

    @contextmanager
    def records(self, keys, sources):
        self.sizes.append(len(keys))
        if len(self.sizes) - 1 == self.fails_at:
            raise ZeroDivisionError("a bug")
        if len(self.sizes) == 2:
            self.made_twice.set()
        with sources[0].block.maker.records(keys, [source.block for source in sources]) as records:
            yield records


class Block:
    """A block in host memory, encoded by a given maker."""

    held_bytes = 0

    def __init__(self, payload, maker: Maker) -> None:
        self.block, self.maker = HostBlock(payload), maker
        self.num_bytes = self.block.num_bytes


def save_behind(store: Store, gate: Gate, keys, sources) -> list[int]:
    """Save blocks while another holds up the writer, so that it takes them together."""
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
    """The tier does not count as failed, and writing goes on."""
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


def test_a_part_is_put_while_the_next_is_made() -> None:
    gate, maker = Gate("put"), Maker()

    def fail(call: str) -> None:
        gate(call)
        if call == "put" and maker.sizes:
            assert maker.made_twice.wait(30), "nothing was made meanwhile"

    tier = DictTier("tier", fail)
    keys = make_keys(12)
    with Store([tier]) as store:
        done = save_behind(store, gate, keys, [Block(make_payload(key), maker) for key in keys])
    assert maker.sizes == [5, 5, 2] and sorted(done) == list(range(12))
    assert all(tier.records[key.block_hash] == make_record(key) for key in keys)


def test_parts_are_put_where_no_thread_can_be_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, maker = Gate("put"), Maker()
    tier = DictTier("tier", gate)
    keys = make_keys(12)

    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    with Store([tier]) as store:
        monkeypatch.setattr(beside.threading, "Thread", NoThread)
        done = save_behind(store, gate, keys, [Block(make_payload(key), maker) for key in keys])
        monkeypatch.undo()
    assert maker.sizes == [5, 5, 2] and sorted(done) == list(range(12))
    assert all(tier.records[key.block_hash] == make_record(key) for key in keys)


@pytest.mark.parametrize("part", range(3))
def test_a_tier_that_fails_at_a_part_is_blamed(part: int, caplog: pytest.LogCaptureFixture) -> None:
    gate, maker = Gate("put"), Maker()

    def fail(call: str) -> None:
        gate(call)
        if call == "put" and len(tier.records) == 1 + 5 * part:  # one is from `save_behind`
            raise ZeroDivisionError("a bug")

    tier = DictTier("tier", fail)
    keys = make_keys(12)
    with Store([tier]) as store:
        done = save_behind(store, gate, keys, [Block(make_payload(key), maker) for key in keys])
        assert sorted(done) == list(range(12)) and store.check() == []
        assert "a bug" in caplog.text and use_of(store, "tier").is_down
    assert [key.block_hash in tier.records for key in keys] == [
        number < 5 * part for number in range(12)
    ]


def test_a_look_up_before_a_write_leaves_half_the_time_for_the_write(make_store) -> None:
    deadlines = []

    class Slow(DictTier):
        def contains_many(self, names, *, deadline=None):
            deadlines.append(deadline)
            return super().contains_many(names, deadline=deadline)

        def put_many(self, names, records, *, priority=0, deadline=None):
            deadlines.append(deadline)
            return super().put_many(names, records, priority=priority, deadline=deadline)

    save(make_store(DictTier("fast"), Slow("slow"), write_timeout_s=60), make_keys(1))
    looked_up, written = deadlines
    assert written - looked_up == pytest.approx(30)


def make_coded_pool() -> tuple[list[BlockKey], KVPool]:
    """Blocks of which every fifth is requested raw, and number 7 cannot be encoded otherwise."""
    keys = [
        key if number % 5 else replace(key, layout=CODED.raw)
        for number, key in enumerate(make_keys(NUM_BLOCKS, CODED))
    ]
    pool = KVPool(CODED.block_format.layout, NUM_BLOCKS)
    pool.data.copy_(torch.randn(pool.data.shape))
    pool.data[7, 0, 0, 0, 0, 0] = torch.inf
    return keys, pool


def test_blocks_of_a_pool_with_several_codecs_in_one_call() -> None:
    gate = Gate("put")
    tier = DictTier("tier", gate)
    keys, pool = make_coded_pool()
    pool_blocks = PoolBlocks(pool, [CODED, CODED.raw])
    with Store([tier]) as store:
        done = save_behind(store, gate, keys, map(pool_blocks.source, range(NUM_BLOCKS)))
    pool_blocks.close()
    assert sorted(done) == list(range(NUM_BLOCKS))
    for number, key in enumerate(keys):
        block = pool.block_data(number).numpy()
        assert tier.records[key.block_hash] == make_record_of(key, block), number


def test_records_are_made_where_the_memory_tier_keeps_them() -> None:
    """Those that turn out raw, and longer, are put as usual; slower tiers get all of them."""
    gate = Gate("contains")
    memory, slow = GatedMemory(gate, 1 << 20), DictTier("slow")
    keys, pool = make_coded_pool()
    pool_blocks = PoolBlocks(pool, [CODED, CODED.raw])
    with Store([memory, slow]) as store:
        done = save_behind(store, gate, keys, map(pool_blocks.source, range(NUM_BLOCKS)))
        assert sorted(done) == list(range(NUM_BLOCKS))
        assert use_of(store, "memory").num_written == use_of(store, "slow").num_written == 25
        records = {
            key.block_hash: make_record_of(key, pool.block_data(number).numpy())
            for number, key in enumerate(keys)
        }
        assert {name: slow.records[name] for name in records} == records
        written_bytes = use_of(store, "memory").written_bytes - LAYOUT.record_bytes
        assert written_bytes == sum(map(len, records.values()))
        if pool.device.type == "cpu":  # one was saved to hold up the writer
            assert memory.put_names[1:] == [keys[7].block_hash]
        for key in keys:
            out = memoryview(bytearray(key.layout.max_record_bytes))
            assert out[: memory.get(key.name, out)] == records[key.block_hash]
        assert store.check() == []
    pool_blocks.close()


@pytest.mark.parametrize("kind", ["pool", "host"])
def test_more_blocks_than_the_memory_tier_has_slots_are_all_written(kind: str) -> None:
    gate = Gate("contains")
    memory, slow = GatedMemory(gate, 16 * PAGE_BYTES), DictTier("slow")
    keys = make_keys(NUM_BLOCKS, CODED)
    pool = KVPool(CODED.block_format.layout, NUM_BLOCKS)
    pool.data.copy_(torch.randn(pool.data.shape))
    pool_blocks = PoolBlocks(pool, [CODED])
    with Store([memory, slow]) as store:
        sources = [
            HostBlock(pool.block_data(number).numpy())
            if kind == "host"
            else pool_blocks.source(number)
            for number in range(NUM_BLOCKS)
        ]
        save_behind(store, gate, keys, sources)
        use = use_of(store, "memory")
        assert (use.num_written, use.num_full, use.num_errors) == (25, 0, 0)
        assert len(slow.records) == 25
        assert memory.stats().num_records == 16
        assert store.check() == []
    pool_blocks.close()


def test_a_pool_that_fails_costs_what_it_had_at_hand(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate("contains")
    memory = GatedMemory(gate, 1 << 20)
    keys = make_keys(NUM_BLOCKS, CODED)
    pool_blocks = PoolBlocks(KVPool(CODED.block_format.layout, NUM_BLOCKS), [CODED])
    for name in ("write", "records"):
        monkeypatch.setattr(pool_blocks, name, lambda *_: 1 // 0)
    with Store([memory]) as store:
        done = save_behind(store, gate, keys, map(pool_blocks.source, range(NUM_BLOCKS)))
        assert sorted(done) == list(range(NUM_BLOCKS))
        assert "division" in caplog.text and not use_of(store, "memory").is_down
        assert memory.stats().num_records == 1
        assert store.check() == []
    pool_blocks.close()


def test_a_queue_gives_as_many_as_fit_into_a_batch() -> None:
    queue = WriteQueue(1 << 30, 100, 1 << 30)
    (key,) = make_keys(1)
    sizes = [300, 200, 500, 1, 2000, 7]
    for size in sizes:
        source = WrittenRecord(torch.zeros(size, dtype=torch.uint8).numpy(), size)
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
