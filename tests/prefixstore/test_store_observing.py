"""What a store reports of each load: records, bytes and seconds by tier."""

import threading
import time

import numpy as np
import pytest
from dict_tier import DictTier, raises
from sample_blocks import LAYOUT, make_keys, make_record

from prefixstore.block_key import BlockKey
from prefixstore.errors import TierUnavailable
from prefixstore.store import Store, StoreConfig
from prefixstore.store.block_targets import HostBlocks
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig

SLOW_S = 0.02


class Told:
    """Records what it is told, and in which thread."""

    def __init__(self) -> None:
        self.loads: list[tuple[str, int, int, float]] = []
        self.threads: set[int] = set()

    def __call__(self, tier_name: str, num_records: int, num_bytes: int, seconds: float) -> None:
        self.loads.append((tier_name, num_records, num_bytes, seconds))
        self.threads.add(threading.get_ident())

    def counts(self) -> list[tuple[str, int, int]]:
        return [load[:3] for load in self.loads]


def sleeps(call: str) -> None:
    if call == "get":
        time.sleep(SLOW_S)


def put(tier: DictTier, keys: list[BlockKey]) -> None:
    for key in keys:
        tier.records[key.block_hash] = bytes(make_record(key))


def load(store: Store, keys: list[BlockKey]) -> list[str | None]:
    return store.load_many(keys, HostBlocks([np.empty(LAYOUT.block_bytes, np.uint8) for _ in keys]))


def test_tells_what_each_tier_gave_and_what_it_took() -> None:
    memory = MemoryTier(MemoryTierConfig(4 << 20))
    slow, told = DictTier("slow", sleeps), Told()
    keys = make_keys(6)
    for key in keys[:3]:
        memory.put(key.name, memoryview(make_record(key)))
    put(slow, keys[3:5])
    with Store([memory, slow], observer=told) as store:
        assert load(store, keys) == [*["memory"] * 3, "slow", "slow", None]
        assert told.counts() == [
            ("memory", 3, 3 * LAYOUT.record_bytes),
            ("slow", 2, 2 * LAYOUT.record_bytes),
        ]
        assert told.threads == {threading.get_ident()}
        (_, _, _, memory_s), (_, _, _, slow_s) = told.loads
        assert slow_s >= 3 * SLOW_S and memory_s > 0
        assert store.flush(30)
        told.loads.clear()
        load(store, keys[:5])
        assert told.counts() == [("memory", 5, 5 * LAYOUT.record_bytes)]


@pytest.mark.parametrize("what", ["absent", "damaged", "down"])
def test_what_was_no_hit_counts_for_nothing_and_took_its_time(what: str) -> None:
    fails = raises(TierUnavailable, "get") if what == "down" else sleeps
    tier, told = DictTier("tier", fails), Told()
    keys = make_keys(2)
    if what == "damaged":
        put(tier, keys)
        tier.records = {name: record[:-1] + b"!" for name, record in tier.records.items()}
    with Store([tier], observer=told) as store:
        assert load(store, keys) == [None, None]
    assert told.counts() == [("tier", 0, 0)]
    assert told.loads[0][3] >= (0 if what == "down" else 2 * SLOW_S)


def test_each_observer_is_told_until_it_is_taken_off() -> None:
    tier, first, last = DictTier("tier"), Told(), Told()
    keys = make_keys(1)
    put(tier, keys)
    with Store([tier], StoreConfig(), first) as store:
        stop = store.observe_loads(last)
        load(store, keys)
        stop()
        load(store, keys)
    told = ("tier", 1, LAYOUT.record_bytes)
    assert (first.counts(), last.counts()) == ([told, told], [told])
