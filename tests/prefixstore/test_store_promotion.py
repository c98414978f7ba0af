"""Promotion to faster tiers: the memory that waiting records keep, and its release."""

import threading
import time
from functools import partial

import numpy as np
import pytest
from dict_tier import DictTier, fill
from failing_tiers import Gate
from sample_blocks import LAYOUT, make_keys
from stores import load, use_of
from test_store_fetching import run_both

from prefixstore.record import RecordLayout, encode
from prefixstore.store import Store, loader
from prefixstore.store.block_targets import HostBlocks
from prefixstore.store.fetcher import record_room

Q2 = RecordLayout(2, 2, 64, 32, "bfloat16", 0, ("q2",))


@pytest.fixture
def held_up():
    """A fast tier whose writer waits until the test ends."""
    gate = Gate("put")
    yield DictTier("fast", gate)
    gate.open()


def load_many(store: Store, keys, progress=None) -> list[str | None]:
    outs = [bytearray(key.layout.block_bytes) for key in keys]
    return store.load_many(keys, HostBlocks(outs), progress=progress)


def kept_bytes(store: Store) -> int:
    """Bytes of memory with records that wait for a faster tier, or for their load's end."""
    queue = store._writer._queue
    jobs = [*queue._jobs, *queue._running]
    for one in store._loader._promoter._under_way:
        jobs += one.promotions
    roots = {}
    for job in jobs:
        root = job.source.record
        while isinstance(root.base, np.ndarray):
            root = root.base
        roots[id(root)] = root
    return sum(root.nbytes for root in roots.values())


def test_short_records_in_long_rows_keep_no_more_than_themselves(make_store, held_up):
    slow = DictTier("slow")
    keys = make_keys(200, Q2)
    record = bytearray(Q2.encode_bytes)
    block = np.random.default_rng(0).standard_normal(Q2.block_bytes // 4).astype(np.float32)
    for key in keys:
        num_bytes = encode(key, (block.view(np.uint32) >> 16).astype(np.uint16).repeat(2), record)
        slow.records[key.block_hash] = bytes(record[:num_bytes])
    assert 4 * num_bytes < record_room(keys[0])
    bound = 40 * num_bytes
    store = make_store(held_up, slow, held_bytes=bound)
    for first in range(0, 200, 4):
        assert load_many(store, keys[first : first + 4]) == ["slow"] * 4
    stats = store.stats()
    assert bound - num_bytes < kept_bytes(store) <= bound
    assert (stats.queue_entries, stats.num_promotions_dropped) == (40, 160)
    assert len(store._loader._slabs._free) == 1  # copied records left it to the next load


def test_few_records_keep_no_large_buffer(make_store, held_up):
    slow = DictTier("slow")
    keys = make_keys(40)
    fill(slow, keys[::10])
    store = make_store(held_up, slow)
    found = load_many(store, keys)
    assert found.count("slow") == 4
    assert kept_bytes(store) == store.stats().queue_bytes == 4 * LAYOUT.record_bytes


@pytest.mark.parametrize("bounded", ["queue_bytes", "held_bytes"])
def test_all_loads_together_keep_no_more_than_the_bound(make_store, held_up, monkeypatch, bounded):
    (key,) = make_keys(1)
    monkeypatch.setattr(loader, "BATCH_BYTES", 4 * record_room(key))
    slow = DictTier("slow")
    of_loads = [make_keys(16, seed=seed) for seed in range(4)]
    for keys in of_loads:
        fill(slow, keys)
    bound = 20 * record_room(key)
    store = make_store(held_up, slow, **{bounded: bound})
    at_work = threading.Barrier(len(of_loads) + 1)

    def progress(keys, loaded) -> bool:
        if loaded[-1] == len(keys) - 1:
            for _ in range(2):  # while it is measured
                at_work.wait(30)
        return True

    found: list[list[str | None]] = []
    threads = [
        threading.Thread(
            target=lambda keys=keys: found.append(load_many(store, keys, partial(progress, keys)))
        )
        for keys in of_loads
    ]
    for thread in threads:
        thread.start()
    at_work.wait(30)
    measured = kept_bytes(store)
    at_work.wait(30)
    for thread in threads:
        thread.join(30)
    assert found == [["slow"] * 16] * 4
    assert bound // 2 < measured <= bound
    assert kept_bytes(store) <= bound
    assert use_of(store, "slow").num_hits == 64


def test_who_waits_for_what_finds_no_room_is_given_it_all_the_same(make_store):
    gate, is_fetching = threading.Event(), threading.Event()

    def fail(call: str) -> None:
        if call == "get":
            is_fetching.set()
            assert gate.wait(30)

    fast, slow = DictTier("fast"), DictTier("slow", fail)
    store = make_store(fast, slow, queue_bytes=1)
    (key,) = make_keys(1)
    fill(slow, [key])
    found = []

    def request() -> None:
        found.append(load(store, key))

    run_both(store, request, request, is_fetching, gate)
    assert found == ["slow", "slow"]
    assert slow.calls.count("get") == 1
    assert store.stats().num_promotions_dropped == 1


def test_a_key_that_comes_twice_leaves_the_claim_of_another_load_alone(make_store):
    writes, reads = Gate("put"), Gate("get")
    fast, slow = DictTier("fast", writes), DictTier("slow")
    store = make_store(fast, slow, queue_entries=1)
    (key,) = make_keys(1)
    fill(slow, [key])
    assert load_many(store, [key, key]) == ["slow", "slow"]
    assert slow.calls.count("get") == 1
    slow.fail = reads
    found: list[list[str | None]] = []
    thread = threading.Thread(target=lambda: found.append(load_many(store, [key])))
    thread.start()
    while thread.is_alive() and not reads.entered.is_set():
        time.sleep(0.001)
    writes.open()  # ends only the first load's claim
    assert store.flush(30)
    reads.open()
    thread.join(30)
    assert found == [["slow"]]
