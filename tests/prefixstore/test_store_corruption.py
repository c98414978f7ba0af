"""Wrong records: whatever a tier returns, no wrong block is restored."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
from dict_tier import CAPACITY, DictTier, fill
from sample_blocks import LAYOUT, make_keys, make_record
from stores import load, save, use_of

from prefixstore.block_key import BlockKey
from prefixstore.store.block_targets import HostBlocks
from prefixstore.store.breaker import BreakerConfig
from prefixstore.store.guarded_tier import GuardedTier
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig

REGIONS = {
    "header": (0, 96),
    "token ids": (96, 160),
    "layer table": (160, 232),
    "padding": (232, LAYOUT.header_bytes),
    "payload": (LAYOUT.header_bytes, LAYOUT.record_bytes),
}


def flip_stored_bit(tier: MemoryTier | DiskTier, key: BlockKey, position: int, bit: int) -> None:
    """Flip a bit directly in the tier's arena or file."""
    if isinstance(tier, MemoryTier):
        tier._arena.records[key.block_hash].data[position] ^= 1 << bit
        return
    ref = tier._index.look_ups.find_many([key.name])[key.name]
    with (tier._config.path / ref.slab.file_name).open("r+b", buffering=0) as file:
        file.seek(ref.slot * ref.slab.slot_bytes + position)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.fixture(params=["memory", "disk"])
def tier(request, tmp_path) -> MemoryTier | DiskTier:
    """Each real tier in turn; the test's store closes it."""
    if request.param == "memory":
        return MemoryTier(MemoryTierConfig(CAPACITY))
    return DiskTier(DiskTierConfig(tmp_path, CAPACITY))


def test_a_thousand_flipped_bits_give_a_thousand_misses(make_store, tier):
    """One bit of one record at a time, 200 in each region of a record, at random places."""
    random = np.random.default_rng(0)
    store = make_store(tier)
    keys = make_keys(20)
    save(store, keys)
    for start, end in REGIONS.values():
        for _ in range(200):
            key = keys[random.integers(len(keys))]
            position, bit = int(random.integers(start, end)), int(random.integers(8))
            flip_stored_bit(tier, key, position, bit)
            assert load(store, key) is None, f"bit {bit} of byte {position}"
            assert not tier.contains(key.name)  # deleted, so it is met only once
            save(store, [key])
    use = use_of(store, tier.name)
    assert (use.num_corrupted, use.num_misses, use.num_hits) == (1000, 1000, 0)
    assert (store.stats().num_misses, use.num_errors, use.is_down) == (1000, 0, False)
    assert [load(store, key) for key in keys] == [tier.name] * 20
    assert store.check() == []


def other_records(key: BlockKey) -> dict[str, bytes]:
    """Records that may be stored under a key's hash but must not be used."""
    right = bytes(make_record(key))
    tokens = key.tokens.copy()
    tokens[3] ^= 1
    layout = key.layout
    keys = {
        "another model": replace(key, identity=bytes(16)),
        "another prefix": replace(key, parent_hash=key.block_hash),
        "other tokens of the same hash": replace(key, tokens=tokens),
        "another dtype": replace(key, layout=replace(layout, dtype="float16")),
        "another layer group": replace(key, layout=replace(layout, layer_group=1)),
        "fewer layers": replace(key, layout=replace(layout, num_layers=2)),
        "more layers": replace(key, layout=replace(layout, num_layers=4)),
    }
    return {
        **{what: bytes(make_record(other)) for what, other in keys.items()},
        "another block": bytes(make_record(make_keys(1, seed=1)[0])),
        "half a header": right[:48],
        "a header only": right[: layout.header_bytes],
        "all but one byte": right[:-1],
        "one byte more": right + b"\0",
        "zeros": bytes(len(right)),
    }


@pytest.mark.parametrize("what", other_records(make_keys(1)[0]))
def test_any_other_record_under_the_hash_is_a_counted_miss(make_store, tier, what):
    store = make_store(tier)
    key, neighbour = make_keys(2)
    save(store, [neighbour])
    tier.put(key.name, memoryview(other_records(key)[what]))
    assert load(store, key) is None
    use = use_of(store, tier.name)
    assert (use.num_corrupted, use.num_misses, use.num_hits) == (1, 1, 0)
    assert store.contains_many([key, neighbour]) == [None, tier.name]
    save(store, [key])
    assert [load(store, key), load(store, neighbour)] == [tier.name] * 2
    assert store.check() == []


def test_a_corrupted_record_is_deleted_and_the_next_tier_answers(make_store):
    fast, slow = DictTier("fast"), DictTier("slow")
    store = make_store(fast, slow)
    (key,) = make_keys(1)
    save(store, [key])
    damaged = bytearray(fast.records[key.block_hash])
    damaged[-1] ^= 1
    fast.records[key.block_hash] = bytes(damaged)
    assert load(store, key) == "slow"
    assert store.flush(30)
    assert load(store, key) == "fast"  # promoted in place of the deleted one
    assert use_of(store, "fast").num_corrupted == 1


def test_wrong_records_of_a_load_are_deleted_together_and_by_its_deadline(make_store):
    class Told(DictTier):
        def delete_many(self, names, *, deadline=None):
            told.append((set(names), deadline, self.calls.count("get")))
            return super().delete_many(names, deadline=deadline)

    told: list = []
    fast, slow = Told("fast"), DictTier("slow")
    store = make_store(fast, slow)
    keys = make_keys(5)
    save(store, keys)
    for key, position in zip(keys, (0, 100, -1), strict=False):  # header, tokens and payload
        damaged = bytearray(fast.records[key.block_hash])
        damaged[position] ^= 1
        fast.records[key.block_hash] = bytes(damaged)
    deadline, num_gets = time.monotonic() + 30, fast.calls.count("get")
    target = HostBlocks([bytearray(LAYOUT.payload_bytes) for _ in keys])
    assert store.load_many(keys, target, deadline) == ["slow"] * 3 + ["fast"] * 2
    assert told == [({key.name for key in keys[:3]}, deadline, num_gets + 5)]
    assert store.flush(30)
    assert [load(store, key) for key in keys] == ["fast"] * 5


def test_wrong_records_for_which_no_time_is_left_are_deleted_the_next_time():
    tier = DictTier("tier")
    (key,) = make_keys(1)
    fill(tier, [key])
    guarded = GuardedTier(tier, BreakerConfig())
    guarded.reject(key, "wrong")
    guarded.delete_rejected(time.monotonic() - 1)
    assert tier.calls == [] and guarded.use().num_errors == 0
    for _ in range(2):
        guarded.delete_rejected(time.monotonic() + 30)
    assert tier.calls == ["delete"] and tier.records == {}


def test_truncated_and_overlong_records_are_misses(make_store):
    tier = DictTier("dict")
    store = make_store(tier)
    (key,) = make_keys(1)
    record = bytes(make_record(key))
    for num_bytes in (0, 1, 95, 96, 255, 256, len(record) - 1):
        tier.records[key.block_hash] = record[:num_bytes]
        assert load(store, key) is None
    assert use_of(store, "dict").num_corrupted == 7


@pytest.mark.parametrize("claim", [-1, 0, 1 << 40])
def test_a_tier_that_lies_about_lengths_is_a_miss(make_store, claim):
    tier = DictTier("liar")
    store = make_store(tier)
    (key,) = make_keys(1)
    tier.records[key.block_hash] = bytes(make_record(key))
    read = tier._read
    tier._read = lambda name, out: read(name, out) and claim
    name = load(store, key)  # fails the test if the payload is wrong
    assert name is None or claim > LAYOUT.record_bytes
