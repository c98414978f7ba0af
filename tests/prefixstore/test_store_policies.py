"""What is written to which tier, and when."""

import pytest
from dict_tier import DictTier, held
from sample_blocks import make_keys, make_payload, make_record
from stores import load, save

from prefixstore.errors import ConfigError
from prefixstore.store.block_sources import HostBlock
from prefixstore.store.config import TierPolicy
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig

SECOND_TOUCH = {"slow": TierPolicy("write_second_touch")}


def test_policies_say_what_goes_where(make_store):
    fast, middle, slow = DictTier("fast"), DictTier("middle"), DictTier("slow")
    policies = {"fast": TierPolicy("never"), "middle": TierPolicy("never", promote=False)}
    store = make_store(fast, middle, slow, policies=policies)
    (key,) = make_keys(1)
    save(store, [key])
    assert [len(tier.records) for tier in (fast, middle, slow)] == [0, 0, 1]
    assert load(store, key) == "slow"
    assert store.flush(30)
    assert [len(tier.records) for tier in (fast, middle, slow)] == [1, 0, 1]


def test_a_block_of_one_use_is_spared_a_slow_tier(make_store):
    fast, slow = DictTier("fast"), DictTier("slow")
    store = make_store(fast, slow, policies=SECOND_TOUCH)
    keys = make_keys(3)
    save(store, keys)
    assert held(slow, keys) == [False] * 3
    assert load(store, keys[0]) == "fast"  # used again
    assert store.touch(keys[1:2]) == []  # used again, on the device
    assert store.flush(30)
    assert held(slow, keys) == [True, True, False]
    assert slow.records[keys[0].block_hash] == make_record(keys[0])


def test_a_block_that_is_computed_again_was_used_again(make_store):
    fast, slow = DictTier("fast"), DictTier("slow")
    store = make_store(fast, slow, policies=SECOND_TOUCH)
    (key,) = make_keys(1)
    save(store, [key])
    fast.records.clear()
    save(store, [key])
    assert held(slow, [key]) == [True]


def test_reuse_is_offered_once_in_a_while_only(make_store):
    fast, slow = DictTier("fast"), DictTier("slow")
    store = make_store(fast, slow, policies=SECOND_TOUCH)
    keys = make_keys(4)
    save(store, keys)
    for _ in range(10):
        for key in keys:
            assert load(store, key) == "fast"
        store.touch(keys)
    assert store.flush(30)
    assert slow.calls.count("put") == 4
    assert slow.calls.count("contains") <= 4


def test_a_lone_tier_of_second_touch_asks_for_the_block(make_store):
    slow = DictTier("slow")
    store = make_store(slow, policies=SECOND_TOUCH)
    keys = make_keys(2)
    done: list[int] = []
    for key in keys:
        assert store.save(key, HostBlock(make_payload(key)), lambda: done.append(1))
    assert store.flush(30)
    assert (held(slow, keys), done) == ([False] * 2, [1, 1])
    assert store.touch(keys) == [0, 1]
    assert store.touch(keys) == []
    assert store.save(keys[1], HostBlock(make_payload(keys[1])), is_reuse=True)
    assert store.flush(30)
    assert held(slow, keys) == [False, True]


def test_what_memory_evicts_is_written_back(make_store):
    memory, slow = MemoryTier(MemoryTierConfig(8 * 4096)), DictTier("slow")
    store = make_store(memory, slow, policies={"slow": TierPolicy("write_back")})
    keys = make_keys(20)
    save(store, keys)
    there = [memory.contains(key.name) for key in keys]
    assert sum(there) == 8
    assert held(slow, keys) == [not one for one in there]
    assert [load(store, key) for key in keys[:3]] == ["slow"] * 3


def test_write_back_needs_a_tier_that_tells(make_store):
    policies = {"slow": TierPolicy("write_back")}
    with pytest.raises(ConfigError, match=r"slow: expected a tier before it that .* got None"):
        make_store(DictTier("slow"), policies=policies)
    with pytest.raises(ConfigError, match="for write_back; got fast"):
        make_store(DictTier("fast"), DictTier("slow"), policies=policies)
