"""The contract of every tier, and random operations beside a plain dict."""

import re
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sample_blocks import LARGE_LAYOUT, LAYOUT, make_keys, make_record
from tier_kinds import LARGE_SLOT, PAGE, SLOT, get, put, put_in_place, stored_bytes

from prefixstore.errors import BlockCorrupted, ConfigError, TierFull, TierUnavailable
from prefixstore.tiers.base import Tier
from prefixstore.tiers.disk import DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig


def test_keeps_what_is_put(make_any_tier):
    tier = make_any_tier(64 * SLOT)
    first, second = make_keys(2)
    assert get(tier, first) is None
    put(tier, first)
    assert get(tier, first) == make_record(first)
    assert get(tier, second) is None
    assert tier.contains(first.name) and not tier.contains(second.name)
    stats = tier.stats()
    assert (stats.num_hits, stats.num_misses, stats.num_puts) == (1, 2, 1)
    assert stats.read_bytes == stats.written_bytes == stored_bytes(tier, LAYOUT)


def test_keeps_the_first_of_two_records_of_one_hash(make_any_tier):
    tier = make_any_tier(64 * SLOT)
    (key,) = make_keys(1)
    put(tier, key)
    other = make_record(key)
    other[-1] ^= 1
    tier.put(key.name, memoryview(other))
    assert get(tier, key) == make_record(key)
    assert tier.stats().num_puts == 1


def test_forgets_what_is_deleted(make_any_tier):
    tier = make_any_tier(64 * SLOT)
    (key,) = make_keys(1)
    assert not tier.delete(key.name)
    put(tier, key)
    assert tier.delete(key.name)
    assert get(tier, key) is None
    put(tier, key)
    assert get(tier, key) == make_record(key)


def test_counts_what_it_holds(make_tier):
    tier = make_tier(64 * SLOT)
    (key,) = make_keys(1)
    put(tier, key)
    stats = tier.stats()
    assert (stats.num_records, stats.used_bytes) == (1, stored_bytes(tier, LAYOUT))
    tier.delete(key.name)
    stats = tier.stats()
    assert (stats.num_records, stats.used_bytes) == (0, 0)


def test_answers_for_many_at_once(make_any_tier):
    tier = make_any_tier(1024 * SLOT)
    keys = make_keys(600)  # more than the disk tier looks up in one query
    for key in keys[::7]:
        put(tier, key)
    expected = [i % 7 == 0 for i in range(600)]
    assert tier.contains_many([key.name for key in keys]) == expected
    assert tier.contains_many([]) == []


def test_evicts_the_least_recently_used(make_tier):
    tier = make_tier(4 * SLOT)
    keys = make_keys(6)
    for key in keys[:4]:
        put(tier, key)
    assert get(tier, keys[0]) is not None
    put(tier, keys[4])
    put(tier, keys[5])
    assert tier.contains_many([key.name for key in keys]) == [True, False, False] + [True] * 3
    assert tier.stats().num_evictions == 2


def test_stays_within_its_bytes(make_tier):
    capacity = 10 * SLOT
    tier = make_tier(capacity)
    for key in make_keys(50):
        put(tier, key)
        assert tier.stats().used_bytes <= capacity
    assert tier.stats().num_records == 10


def test_records_of_another_size_get_their_share(make_tier):
    tier = make_tier(16 * LARGE_SLOT)
    small, large = make_keys(400), make_keys(40, LARGE_LAYOUT)
    for key in small:
        put(tier, key)
    for key in large:
        put(tier, key)
    assert get(tier, large[-1]) == make_record(large[-1])
    assert tier.stats().num_records > 14
    for key in small:
        put(tier, key)
    assert get(tier, small[-1]) == make_record(small[-1])


def test_refuses_a_record_larger_than_itself_and_loses_nothing(make_tier):
    tier = make_tier(8 * SLOT)
    (small,), (large,) = make_keys(1), make_keys(1, LARGE_LAYOUT)
    put(tier, small)
    with pytest.raises(TierFull, match="expected"):
        put(tier, large)
    assert get(tier, small) == make_record(small)


def test_refuses_a_buffer_that_is_too_short(make_any_tier):
    tier = make_any_tier(8 * SLOT)
    (key,) = make_keys(1)
    put(tier, key)
    num_bytes = stored_bytes(tier, LAYOUT)
    expected = f"at most {100 + num_bytes - LAYOUT.record_bytes} bytes, got {num_bytes}"
    with pytest.raises(BlockCorrupted, match=expected):
        tier.get(key.name, memoryview(bytearray(100)))


def test_says_when_it_is_closed(make_any_tier, open_tiers):
    tier = make_any_tier(8 * SLOT)
    (key,) = make_keys(1)
    put(tier, key)
    tier.close()
    for call in (
        lambda: get(tier, key),
        lambda: put(tier, key),
        lambda: tier.contains(key.name),
        lambda: tier.contains_many([key.name]),
        lambda: tier.delete(key.name),
        tier.check,
    ):
        with pytest.raises(TierUnavailable, match="open"):
            call()
    open_tiers.clear()
    tier.close()


def run_random_operations(tier: Tier, seed: int, is_roomy: bool) -> dict[bytes, bytes]:
    """Returns a dict after the same operations; a tier short of room may have fewer records."""
    random = np.random.default_rng(seed)
    keys = make_keys(40) + make_keys(10, LARGE_LAYOUT)
    records = {key.block_hash: bytes(make_record(key)) for key in keys}
    model: dict[bytes, bytes] = {}
    for step in range(300):
        key = keys[random.integers(len(keys))]
        match random.integers(4):
            case 0 | 1:
                (put_in_place if tier.reserves and random.integers(2) else put)(tier, key)
                model[key.block_hash] = records[key.block_hash]
                assert tier.contains(key.name)
            case 2:
                was_there = tier.delete(key.name)
                expected = model.pop(key.block_hash, None)
                assert was_there == (expected is not None) or not is_roomy
            case 3:
                got = get(tier, key)
                assert got == model.get(key.block_hash) or (got is None and not is_roomy)
        if step % 50 == 0:
            assert tier.check() == []
    return model


@pytest.mark.parametrize("seed", range(3))
def test_with_room_for_all_it_is_a_dict(make_any_tier, seed):
    run_random_operations(make_any_tier(16 * 32 * LARGE_SLOT), seed, is_roomy=True)


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_keep_its_counts(make_tier, seed):
    roomy = make_tier(16 * 32 * LARGE_SLOT)
    model = run_random_operations(roomy, seed, is_roomy=True)
    stats = roomy.stats()
    assert stats.num_records == len(model)
    trailers = len(model) * (stored_bytes(roomy, LAYOUT) - LAYOUT.record_bytes)
    assert stats.used_bytes == sum(map(len, model.values())) + trailers
    small = make_tier(20 * LARGE_SLOT, LARGE_SLOT)
    run_random_operations(small, seed, is_roomy=False)
    assert small.stats().used_bytes <= 20 * LARGE_SLOT


def test_threads_only_ever_see_whole_records(make_any_tier):
    tier = make_any_tier(6 * SLOT)  # far fewer slots than keys: evictions under every reader
    keys = make_keys(16)
    records = {key.block_hash: bytes(make_record(key)) for key in keys}
    problems: list[str] = []
    num_hits = [0] * 4

    def work(thread: int) -> None:
        random = np.random.default_rng(thread)
        try:
            for _ in range(150):
                key = keys[random.integers(len(keys))]
                if random.integers(3) == 0:
                    (put_in_place if tier.reserves and random.integers(2) else put)(tier, key)
                elif (got := get(tier, key)) is not None:
                    num_hits[thread] += 1
                    if got != records[key.block_hash]:
                        problems.append(f"thread {thread}: wrong bytes")
                if random.integers(10) == 0:
                    tier.delete(key.name)
        except TierFull:
            problems.append(f"thread {thread}: full")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert all(num_hits)


@pytest.mark.parametrize("config", [MemoryTierConfig, partial(DiskTierConfig, Path("x"))])
@pytest.mark.parametrize("name", ["capacity_bytes", "slab_bytes"])
@pytest.mark.parametrize("value", [0, 4095, -4096, 1e9, "1 GB"])
def test_refuses_sizes_that_are_none(config, name, value):
    message = f"{name}: expected an integer of at least 4096, got {value!r}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(**{"capacity_bytes": 8192, name: value})


def test_refuses_settings_out_of_range():
    with pytest.raises(ConfigError, match=r"slab_bytes: expected at most 8192 \(capacity_bytes\)"):
        MemoryTierConfig(8192, slab_bytes=16384)
    with pytest.raises(ConfigError, match="timeout_s: expected more than 0, got 0"):
        DiskTierConfig(Path("x"), 8192, timeout_s=0)
    with pytest.raises(ConfigError, match="write_lease_s: expected more than 0, got -1"):
        DiskTierConfig(Path("x"), 8192, write_lease_s=-1)


def test_memory_arena_never_grows():
    tier = MemoryTier(MemoryTierConfig(64 * PAGE))
    memory = tier.lent_memory
    for key in make_keys(200):
        put(tier, key)
    assert tier.lent_memory is memory and memory.nbytes == 64 * PAGE
    assert tier.check() == []


def test_memory_check_sees_lost_and_doubled_slots():
    tier = MemoryTier(MemoryTierConfig(16 * PAGE))
    for key in make_keys(4):
        put(tier, key)
    tier._arena.used_bytes += 1
    assert any("used bytes" in problem for problem in tier.check())
    tier._arena.used_bytes -= 1
    slab = next(slab for slab in tier._arena._slabs if slab.records)
    slab.free_offsets.append(slab.offset)
    assert any("each of" in problem for problem in tier.check())
