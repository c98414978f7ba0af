"""The store: order of tiers, promotion, deletion, and refusals."""

import threading

import numpy as np
import pytest
from dict_tier import CAPACITY, DictTier, fill, held, raises
from failing_tiers import Gate, GatedMemory
from sample_blocks import (
    IDENTITY,
    LARGE_LAYOUT,
    LAYOUT,
    load_block,
    make_keys,
    make_payload,
    make_record,
)
from stores import load, memory_and_disk, save, use_of

from prefixstore.block_key import BlockKey, chain_keys
from prefixstore.errors import ConfigError, TierUnavailable
from prefixstore.store import Store
from prefixstore.store.block_sources import HostBlock
from prefixstore.store.block_targets import HostBlocks
from prefixstore.store.breaker import BreakerConfig
from prefixstore.store.config import StoreConfig, TierPolicy
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig


def test_saves_to_all_tiers_and_loads_from_the_fastest(make_store, tmp_path):
    store = make_store(*memory_and_disk(tmp_path))
    keys = make_keys(8) + make_keys(2, LARGE_LAYOUT)
    save(store, keys)
    assert store.contains_many(keys) == ["memory"] * 10
    assert [load(store, key) for key in keys] == ["memory"] * 10
    for name in ("memory", "disk"):
        assert use_of(store, name).num_written == 10
    assert use_of(store, "disk").num_hits == 0
    assert store.check() == []


def test_survives_a_restart_and_promotes(make_store, tmp_path):
    keys = make_keys(8)
    with Store(memory_and_disk(tmp_path)) as store:
        save(store, keys)
    store = make_store(*memory_and_disk(tmp_path))
    assert store.contains_many(keys) == ["disk"] * 8
    assert [load(store, key) for key in keys] == ["disk"] * 8
    assert store.flush(30)
    assert [load(store, key) for key in keys] == ["memory"] * 8
    stats = store.stats()
    assert (stats.num_loads, stats.num_misses) == (16, 0)
    assert use_of(store, "disk").read_bytes == 8 * LAYOUT.record_bytes
    assert store.check() == []


def test_one_answer_for_each_key(make_store):
    store = make_store(DictTier("dict"))
    keys = make_keys(6)
    save(store, keys[1::2])
    outs = [bytearray(LAYOUT.payload_bytes) for _ in keys]
    assert store.load_many(keys, HostBlocks(outs)) == [None, "dict"] * 3
    assert store.contains_many(keys) == [None, "dict"] * 3
    for key, out in zip(keys[1::2], outs[1::2], strict=True):
        assert out == make_payload(key).tobytes()
    assert store.contains_many([]) == []


def test_works_without_tiers(make_store):
    store = make_store()
    (key,) = make_keys(1)
    save(store, [key])
    assert load(store, key) is None
    assert store.contains_many([key]) == [None]


def test_a_present_record_is_not_written_again(make_store):
    tier = DictTier("dict")
    store = make_store(tier)
    (key,) = make_keys(1)
    save(store, [key])
    save(store, [key])
    assert tier.calls.count("put") == 1
    assert use_of(store, "dict").num_present == 1


def test_threads_save_and_load_at_once(make_store, tmp_path):
    memory = MemoryTier(MemoryTierConfig(8 * 4096))  # so small that it keeps evicting
    store = make_store(memory, DiskTier(DiskTierConfig(tmp_path, 24 * 4096)))
    keys = make_keys(40)
    problems: list[str] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(150):
                key = keys[random.integers(len(keys))]
                if random.integers(2):
                    store.save(key, HostBlock(make_payload(key)))
                else:
                    load(store, key)
        except AssertionError as error:
            problems.append(str(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.flush(30)
    assert problems == []
    stats = store.stats()
    assert sum(use.num_hits for use in stats.tiers) == stats.num_loads - stats.num_misses > 0
    assert [use.num_corrupted for use in stats.tiers] == [0, 0]
    assert store.check() == []


def test_pins_say_which_tiers_hold(make_store):
    memory, slow = MemoryTier(MemoryTierConfig(CAPACITY)), DictTier("slow")
    store = make_store(memory, slow)
    keys = make_keys(3)
    save(store, keys[:2])
    slow.records.pop(keys[1].block_hash)
    assert store.pin_many(keys) == [["memory", "slow"], ["memory"], []]
    assert store.pin_many(keys, False) == [["memory", "slow"], ["memory"], []]
    assert store.pin_many([]) == []


def test_an_identity_is_forgotten_in_every_tier(make_store):
    memory, broken = MemoryTier(MemoryTierConfig(CAPACITY)), DictTier("broken")
    store = make_store(memory, broken)
    keys = make_keys(3)
    save(store, keys)
    broken.delete_identity = lambda identity: raises(TierUnavailable)("delete")
    assert store.delete_identity(IDENTITY) == ["broken"]
    assert not any(memory.contains(key.name) for key in keys)
    assert set(store.sweep()) == {"memory", "broken"}


DELETIONS = {
    "names": lambda store, keys: store.delete_many(keys),
    "identity": lambda store, keys: store.delete_identity(IDENTITY),
}


def keys_of_another(num_blocks: int) -> list[BlockKey]:
    """Keys of an identity that is not deleted."""
    tokens = np.arange(num_blocks * LAYOUT.block_size, dtype=np.uint32)
    return chain_keys(LAYOUT, b"another identity", tokens)


def held_by(memory: MemoryTier, keys: list[BlockKey]) -> list[bool]:
    return memory.contains_many([key.name for key in keys])


@pytest.mark.parametrize("delete", DELETIONS.values(), ids=DELETIONS)
def test_blocks_that_are_deleted_before_their_turn_are_not_written(make_store, delete):
    gate = Gate("contains")
    memory = GatedMemory(gate, CAPACITY)
    store = make_store(memory)
    keys, (running, queued) = make_keys(3), keys_of_another(2)
    assert store.save(running, HostBlock(make_payload(running)))
    assert gate.entered.wait(30)
    done: list[BlockKey] = []
    for key in [*keys, queued]:
        assert store.save(key, HostBlock(make_payload(key)), lambda key=key: done.append(key))
    assert delete(store, keys) == []  # waits for nothing: queued records are of other identities
    assert done == keys
    assert store.stats().num_dropped == 3
    gate.open()
    assert store.flush(30)
    assert held_by(memory, [*keys, running, queued]) == [False] * 3 + [True] * 2


@pytest.mark.parametrize("delete", DELETIONS.values(), ids=DELETIONS)
@pytest.mark.parametrize("call", ["contains", "put"])  # before and after it is read from memory
def test_records_on_their_way_to_a_slower_tier_are_deleted_too(make_store, delete, call):
    gate = Gate(call)
    memory, slow = MemoryTier(MemoryTierConfig(CAPACITY)), DictTier("slow", gate)
    store = make_store(memory, slow)
    keys = make_keys(600)  # more than the writer's two threads take before they wait at the gate
    for key in keys:
        assert store.save(key, HostBlock(make_payload(key)))
    assert store.wait_blocks(30) and gate.entered.wait(30)
    failed: list[list[str]] = []
    thread = threading.Thread(target=lambda: failed.append(delete(store, keys)))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()  # the deletion waits for the write under way
    gate.open()
    thread.join(30)
    assert failed == [[]]
    assert store.flush(30)
    assert held_by(memory, keys) == [False] * 600
    assert slow.records == {}
    assert use_of(store, "slow").num_dropped > 0


@pytest.mark.parametrize("names", [("fast", "stalled"), ("stalled",)])
def test_a_tier_that_may_yet_write_what_is_deleted_is_named(make_store, names):
    gate = Gate("put")
    store = make_store(
        *(DictTier(name, gate if name == "stalled" else lambda call: None) for name in names),
        write_timeout_s=0.05,
    )
    keys = make_keys(3)
    for key in keys:
        assert store.save(key, HostBlock(make_payload(key)))
    assert gate.entered.wait(30)
    assert store.delete_identity(IDENTITY) == ["stalled"]
    gate.open()
    assert store.flush(30)
    assert store.delete_identity(IDENTITY) == []


@pytest.mark.parametrize("delete", DELETIONS.values(), ids=DELETIONS)
def test_what_is_deleted_while_it_is_loaded_goes_to_no_faster_tier(make_store, delete):
    fast, slow = DictTier("fast"), DictTier("slow")
    store = make_store(fast, slow)
    keys = make_keys(3)
    fill(slow, keys)
    blocks = HostBlocks([bytearray(LAYOUT.payload_bytes) for _ in keys])

    def delete_them(loaded) -> bool:
        assert delete(store, keys) == []
        return True

    assert store.load_many(keys, blocks, progress=delete_them) == ["slow"] * 3
    assert store.flush(30)
    assert (fast.records, slow.records) == ({}, {})
    fill(slow, keys)  # the deletion does not affect later loads
    assert store.load_many(keys, blocks) == ["slow"] * 3
    assert store.flush(30)
    assert held(fast, keys) == [True] * 3


def test_what_is_quarantined_is_neither_loaded_nor_saved(make_store) -> None:
    tier = DictTier("tier")
    store, keys = make_store(tier), make_keys(3)
    for key in keys:
        tier.put(key.name, memoryview(make_record(key)))
    store.quarantine(keys[1:2])
    blocks = [np.empty(LAYOUT.block_bytes, np.uint8) for _ in keys]
    assert store.contains_many(keys) == ["tier", None, "tier"]
    assert store.load_many(keys, HostBlocks(blocks)) == ["tier", None, "tier"]
    assert store.delete_many(keys[1:]) == []
    assert list(tier.records) == [keys[0].block_hash]
    done: list[int] = []
    for number in (1, 2):
        block = HostBlock(make_payload(keys[number]))
        assert store.save(keys[number], block, lambda number=number: done.append(number))
    assert store.flush(30)
    assert sorted(done) == [1, 2]
    assert list(tier.records) == [keys[0].block_hash, keys[2].block_hash]


def test_tells_which_tiers_could_not_delete(make_store) -> None:
    store = make_store(DictTier("good"), DictTier("bad", raises(TierUnavailable, "delete")))
    assert store.delete_many(make_keys(2)) == ["bad"]


def test_refuses_wrong_arguments(make_store):
    store = make_store(DictTier("dict"))
    (key,) = make_keys(1)
    with pytest.raises(ValueError, match="source: expected 3072 bytes, got 3"):
        store.save(key, HostBlock(b"abc"))
    save(store, [key])
    with pytest.raises(ValueError, match="block_out: expected 3072 bytes, got 3"):
        load_block(store, key, bytearray(3))
    with pytest.raises(ValueError, match="blocks: expected writable buffers"):
        load_block(store, key, bytes(LAYOUT.payload_bytes))
    with pytest.raises(ConfigError, match="tiers: expected distinct names"):
        make_store(DictTier("same"), DictTier("same"))
    with pytest.raises(ConfigError, match="policies: expected one of"):
        make_store(DictTier("dict"), policies={"dikt": TierPolicy()})
    with pytest.raises(ConfigError, match="queue_bytes: expected an integer of at least 1, got 0"):
        StoreConfig(queue_bytes=0)
    with pytest.raises(ConfigError, match="failures: expected an integer of at least 1, got 0"):
        BreakerConfig(failures=0)
    with pytest.raises(ConfigError, match="pause_s: expected more than 0, got 0"):
        BreakerConfig(pause_s=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TierPolicy("sometimes"), "write: expected one of .*, got 'sometimes'"),
        (lambda: TierPolicy(negative_ttl_s=-1), "negative_ttl_s: expected 0 or more, got -1"),
        (lambda: StoreConfig(load_timeout_s=0), "load_timeout_s: expected more than 0, got 0"),
        (lambda: StoreConfig(write_timeout_s=0), "write_timeout_s: expected more than 0, got 0"),
        (lambda: StoreConfig(close_timeout_s=-1), "close_timeout_s: expected 0 or more, got -1"),
    ],
)
def test_refuses_wrong_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
