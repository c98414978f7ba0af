"""The queue of blocks to be written is bounded, and saving never waits for it."""

import os
import threading
import time

import pytest
from dict_tier import CAPACITY, DictTier, fill, held
from failing_tiers import Gate
from sample_blocks import LAYOUT, make_keys, make_payload, make_record
from stores import load, memory_and_disk, save, use_of

from prefixstore.block_key import BlockKey
from prefixstore.errors import TierTimeout
from prefixstore.store import Store
from prefixstore.store.block_sources import HostBlock
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig


def test_a_stalled_tier_never_stalls_who_saves(make_store):
    gate = Gate("put")
    store = make_store(DictTier("stalled", gate), queue_entries=4)
    keys = make_keys(20)
    done: list[int] = []
    started = time.monotonic()
    taken = [
        store.save(key, HostBlock(make_payload(key)), lambda i=i: done.append(i))
        for i, key in enumerate(keys)
    ]
    assert time.monotonic() - started < 5
    assert 4 <= sum(taken) <= 5
    stats = store.stats()
    assert (stats.num_saved, stats.num_dropped) == (sum(taken), 20 - sum(taken))
    assert {i for i, was_taken in enumerate(taken) if not was_taken} <= set(done)
    assert not store.flush(0.05)
    gate.open()
    assert store.flush(30)
    assert sorted(done) == list(range(20))  # each exactly once
    loaded = [load(store, key) is not None for key in keys]
    assert loaded == taken
    assert store.check() == []


def test_queue_is_bounded_in_bytes(make_store):
    gate = Gate("put")
    store = make_store(DictTier("stalled", gate), queue_bytes=3 * LAYOUT.payload_bytes + 1)
    keys = make_keys(8)
    assert sum(store.save(key, HostBlock(make_payload(key))) for key in keys) == 3
    stats = store.stats()
    assert (stats.queue_entries, stats.queue_bytes) == (3, 3 * LAYOUT.payload_bytes)
    gate.open()
    assert store.flush(30)
    assert store.stats().queue_bytes == 0


def test_payload_may_change_after_done(make_store):
    gate = Gate("put")
    store = make_store(DictTier("slow", gate))
    (key,) = make_keys(1)
    payload, is_done = make_payload(key), threading.Event()
    assert store.save(key, HostBlock(payload), is_done.set)
    assert is_done.wait(30)  # before the put, which still waits at the gate
    payload[:] = 0
    gate.open()
    assert store.flush(30)
    assert load(store, key) == "slow"


def test_promotions_are_dropped_when_the_queue_is_full(make_store):
    gate = Gate("put")
    fast, slow = DictTier("fast", gate), DictTier("slow")
    store = make_store(fast, slow, queue_entries=2)
    keys = make_keys(6)
    for key in keys:
        slow.records[key.block_hash] = bytes(make_record(key))
    assert [load(store, key) for key in keys] == ["slow"] * 6
    assert store.stats().num_promotions_dropped == 4
    gate.open()
    assert store.flush(30)
    assert len(fast.records) == 2


def test_a_stalled_slower_tier_holds_no_block(make_store):
    gate = Gate("put")
    fast, slow = DictTier("fast"), DictTier("slow", gate)
    store = make_store(fast, slow, queue_entries=8)
    keys = make_keys(30)
    done: list[int] = []
    for key in keys:
        while not store.save(key, HostBlock(make_payload(key)), lambda: done.append(1)):
            done.pop()  # dropped, and reported
            assert store.wait_blocks(30)
    assert store.wait_blocks(30)
    assert len(done) == 30
    assert held(fast, keys) == [True] * 30
    assert not store.flush(0.05)
    gate.open()
    assert store.flush(30)
    use = use_of(store, "slow")
    assert use.num_written + use.num_dropped == 30
    assert 8 <= use.num_written < 30


def test_what_the_fastest_tier_evicts_before_its_turn_is_not_lost(make_store):
    gate = Gate("put")
    memory, slow = MemoryTier(MemoryTierConfig(8 * 4096)), DictTier("slow", gate)
    store = make_store(memory, slow, held_bytes=300 * LAYOUT.record_bytes)
    keys = make_keys(300)
    for key in keys:
        assert store.save(key, HostBlock(make_payload(key)))
        assert store.wait_blocks(30)
    gate.open()
    assert store.flush(30)
    assert memory.stats().num_records == 8
    assert held(slow, keys) == [True] * 300
    assert use_of(store, "slow").num_dropped == 0


def save_each(store: Store, keys: list[BlockKey]) -> None:
    """Save blocks one by one, each once the fastest tier has the previous one."""
    for key in keys:
        assert store.save(key, HostBlock(make_payload(key)))
        assert store.wait_blocks(30)


def test_a_batch_is_read_while_another_is_written(make_store):
    gate = Gate("put")
    fast, slow = DictTier("fast"), DictTier("slow", gate)
    store = make_store(fast, slow)
    keys = make_keys(2)
    save_each(store, keys[:1])
    assert gate.entered.wait(30)
    save_each(store, keys[1:])
    deadline = time.monotonic() + 30
    while fast.calls.count("get") < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert fast.calls.count("get") == 2 and not slow.records
    gate.open()
    assert store.flush(30)
    assert held(slow, keys) == [True] * 2


@pytest.mark.parametrize("is_late", [False, True])
def test_nothing_is_read_into_memory_that_a_late_tier_may_write_to(make_store, is_late):
    first, second, slow = (DictTier(name) for name in ("first", "second", "slow"))
    if is_late:
        first.get_or_abandon_many = lambda names, outs, *, deadline: [TierTimeout("late")]
    else:
        first.get_or_abandon_many = lambda names, outs, *, deadline: [None]
    store = make_store(first, second, slow)
    keys = make_keys(1)
    fill(second, keys)
    assert store.save(keys[0], HostBlock(make_payload(keys[0])))
    assert store.flush(30)
    assert second.calls.count("get") == (0 if is_late else 1)
    assert held(slow, keys) == [not is_late]
    assert use_of(store, "slow").num_dropped == is_late


@pytest.mark.parametrize("num_fitting", [0, 1, 2])
def test_what_is_evicted_after_it_was_taken_and_before_it_was_read_is_not_lost(
    make_store, num_fitting: int
):
    gate = Gate("contains")  # the slower tier's look-up comes between the two
    memory, slow = MemoryTier(MemoryTierConfig(4 * 4096)), DictTier("slow", gate)
    store = make_store(memory, slow, held_bytes=num_fitting * LAYOUT.record_bytes or 1)
    keys = make_keys(6)
    save_each(store, keys[:1])
    assert gate.entered.wait(30)
    save_each(store, keys[1:])  # evicts the first, being written, and the second, queued
    assert [memory.contains(key.name) for key in keys] == [False, False, True, True, True, True]
    assert store.check() == []
    gate.open()
    assert store.flush(30)
    is_rescued = [number < num_fitting for number in range(2)]
    assert held(slow, keys) == [*is_rescued, True, True, True, True]
    assert [slow.records.get(key.block_hash) for key in keys[:num_fitting]] == [
        make_record(key) for key in keys[:num_fitting]
    ]
    assert use_of(store, "slow").num_dropped == 2 - num_fitting


def test_what_was_read_takes_no_room_when_it_is_evicted(make_store):
    gate = Gate("put")
    memory, slow = MemoryTier(MemoryTierConfig(4 * 4096)), DictTier("slow", gate)
    store = make_store(memory, slow, held_bytes=LAYOUT.record_bytes)
    keys = make_keys(6)
    save_each(store, keys[:1])
    assert gate.entered.wait(30)
    save_each(store, keys[1:])  # evicts the first, being written, and the second
    assert [memory.contains(key.name) for key in keys] == [False, False, True, True, True, True]
    gate.open()
    assert store.flush(30)
    assert held(slow, keys) == [True] * 6


def test_a_record_queued_again_while_it_is_being_read_is_not_lost(make_store):
    """Whichever of the two jobs gets the bytes."""
    gate = Gate("contains")
    memory, slow = MemoryTier(MemoryTierConfig(4 * 4096)), DictTier("slow", gate)
    store = make_store(memory, slow)
    keys = make_keys(5)
    save_each(store, keys[:1])
    assert gate.entered.wait(30)
    save_each(store, [keys[0], *keys[1:]])
    assert [memory.contains(key.name) for key in keys] == [False, True, True, True, True]
    assert store.check() == []
    gate.open()
    assert store.flush(30)
    assert held(slow, keys) == [True] * 5


def test_records_that_are_gone_when_their_turn_comes_are_counted(make_store):
    gate = Gate("put")
    fast, slow = DictTier("fast"), DictTier("slow", gate)
    store = make_store(fast, slow)
    keys = make_keys(800)  # more than the writer's two threads take before they wait at the gate
    save_all = [store.save(key, HostBlock(make_payload(key))) for key in keys]
    assert all(save_all) and store.wait_blocks(30)
    fast.records.clear()
    gate.open()
    assert store.flush(30)
    use = use_of(store, "slow")
    assert use.num_dropped > 0
    assert use.num_written + use.num_dropped == 800


def test_close_writes_what_is_queued(tmp_path):
    keys = make_keys(30)
    with Store(memory_and_disk(tmp_path)) as store:
        for key in keys:
            assert store.save(key, HostBlock(make_payload(key)))
    tier = DiskTier(DiskTierConfig(tmp_path, CAPACITY))
    assert all(tier.contains_many([key.name for key in keys]))
    tier.close()


def test_close_gives_up_on_a_stalled_tier(make_store):
    gate = Gate("put")
    store = make_store(DictTier("stalled", gate), close_timeout_s=0.1)
    done: list[BlockKey] = []
    keys = make_keys(3)
    for key in keys:
        store.save(key, HostBlock(make_payload(key)), lambda key=key: done.append(key))
    started = time.monotonic()
    store.close()
    assert time.monotonic() - started < 10
    assert len(done) == 3
    assert 0 <= store.stats().num_dropped <= 2  # the others were being written
    gate.open()


def test_after_close_everything_is_a_miss(tmp_path):
    store = Store(memory_and_disk(tmp_path))
    (key,) = make_keys(1)
    save(store, [key])
    store.close()
    store.close()
    done: list[int] = []
    assert load(store, key) is None
    assert not store.save(key, HostBlock(make_payload(key)), lambda: done.append(1))
    assert done == [1]
    assert store.contains_many([key]) == [None]


def test_a_forked_process_queues_nothing_for_the_writer_it_lacks(make_store):
    store = make_store(DictTier("tier"))
    keys = make_keys(2)
    save(store, keys[:1])
    pid = os.fork()
    if pid == 0:  # in the child: exit at once, whatever happens
        try:
            done = []
            payload = memoryview(make_payload(keys[1])).cast("B")
            store.save(keys[1], HostBlock(payload), done=lambda: done.append(1))
            was_dropped = done == [1] and store.stats().num_dropped == 1
            os._exit(0 if was_dropped and not store.flush(60) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    save(store, keys[1:])
    assert load(store, keys[1]) == "tier"
