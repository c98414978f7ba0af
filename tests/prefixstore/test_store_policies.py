"""What goes into which tier and when; who waits for what, and for how long."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from sample_blocks import IDENTITY, LAYOUT, load_block, make_keys, make_payload, make_record
from test_store import CAPACITY, DictTier, Gate, load, raises, save, use_of

from prefixstore.block_key import BlockKey
from prefixstore.errors import ConfigError, TierTimeout, TierUnavailable
from prefixstore.store import BreakerConfig, Store, StoreConfig, TierPolicy
from prefixstore.store.block_sources import HostBlock
from prefixstore.store.in_flight import InFlight
from prefixstore.store.recent_names import RecentNames
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig

SECOND_TOUCH = {"slow": TierPolicy("write_second_touch")}


@pytest.fixture
def make_store() -> Iterator[Callable[..., Store]]:
    """Makes a store; each is recounted and closed after the test."""
    stores: list[Store] = []

    def make(*tiers, **settings) -> Store:
        stores.append(Store(tiers, StoreConfig(**settings)))
        return stores[-1]

    yield make
    for store in stores:
        assert store.check() == []
        store.close()


def fill(tier: DictTier, keys: list[BlockKey]) -> None:
    for key in keys:
        tier.records[key.block_hash] = bytes(make_record(key))


def held(tier: DictTier, keys: list[BlockKey]) -> list[bool]:
    return [key.block_hash in tier.records for key in keys]


# ---- second touch --------------------------------------------------------------------------------


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


# ---- write back ----------------------------------------------------------------------------------


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


# ---- slow and failing tiers ----------------------------------------------------------------------


def test_a_stalled_slower_tier_holds_no_block(make_store):
    gate = Gate()
    fast, slow = DictTier("fast"), DictTier("slow", gate)
    store = make_store(fast, slow, queue_entries=8)
    keys = make_keys(30)
    done: list[int] = []
    for key in keys:
        while not store.save(key, HostBlock(make_payload(key)), lambda: done.append(1)):
            done.pop()  # dropped, and said so
            assert store.wait_blocks(30)
    assert store.wait_blocks(30)
    assert len(done) == 30
    assert held(fast, keys) == [True] * 30
    assert not store.flush(0.05)
    gate.event.set()
    assert store.flush(30)
    use = use_of(store, "slow")
    assert use.num_written + use.num_dropped == 30
    assert 8 <= use.num_written < 30


def test_what_the_fastest_tier_evicts_before_its_turn_is_not_lost(make_store):
    gate = Gate()
    memory, slow = MemoryTier(MemoryTierConfig(8 * 4096)), DictTier("slow", gate)
    store = make_store(memory, slow, queue_bytes=300 * LAYOUT.record_bytes)
    keys = make_keys(300)
    for key in keys:
        assert store.save(key, HostBlock(make_payload(key)))
        assert store.wait_blocks(30)
    gate.event.set()
    assert store.flush(30)
    assert memory.stats().num_records == 8
    assert sum(held(slow, keys)) + use_of(store, "slow").num_dropped == 300
    assert use_of(store, "slow").num_dropped <= 1  # one that was being taken just then


def test_a_slower_tier_gets_what_the_fastest_does_not_take(make_store):
    broken, slow = DictTier("broken", raises(TierUnavailable)), DictTier("slow")
    store = make_store(broken, slow)
    keys = make_keys(12)
    save(store, keys)
    assert held(slow, keys) == [True] * 12
    assert [load(store, key) for key in keys] == ["slow"] * 12
    broken.fail = lambda call: None


def test_records_that_are_gone_when_their_turn_comes_are_counted(make_store):
    gate = Gate()
    fast, slow = DictTier("fast"), DictTier("slow", gate)
    store = make_store(fast, slow)
    keys = make_keys(300)  # more than one batch
    save_all = [store.save(key, HostBlock(make_payload(key))) for key in keys]
    assert all(save_all) and store.wait_blocks(30)
    fast.records.clear()
    gate.event.set()
    assert store.flush(30)
    use = use_of(store, "slow")
    assert use.num_dropped > 0
    assert use.num_written + use.num_dropped == 300


def test_a_tier_that_is_down_drops_at_once(make_store):
    fast, slow = DictTier("fast"), DictTier("slow", raises(TierUnavailable))
    store = make_store(fast, slow, breaker=BreakerConfig(failures=1, pause_s=60))
    keys = make_keys(50)
    save(store, keys)
    assert held(fast, keys) == [True] * 50
    use = use_of(store, "slow")
    assert (use.num_dropped, use.num_errors, use.is_down) == (50, 1, True)
    slow.fail = lambda call: None


def test_a_request_waits_no_longer_than_its_deadline(make_store):
    """A tier keeps to the deadline that it is given, and it is given that of the request."""

    class Slow(DictTier):
        def get_many(self, names, outs, *, offsets=None, deadline=None):
            time.sleep(max(0.0, deadline - time.monotonic()))
            return [TierTimeout("slow")] * len(names)

    fast, slow = DictTier("fast"), Slow("slow")
    store = make_store(fast, slow, load_timeout_s=0.2)
    keys = make_keys(4)
    fill(slow, keys)
    fill(fast, keys[:1])
    started = time.monotonic()
    assert [load(store, keys[0]), load(store, keys[1])] == ["fast", None]
    assert 0.15 < time.monotonic() - started < 5
    use = use_of(store, "slow")
    assert (use.num_misses, use.num_errors, use.num_timeouts) == (1, 1, 1)


def test_a_trial_whose_records_all_fail_brings_no_tier_back(make_store):
    tier = DictTier("tier")
    config = BreakerConfig(failures=2, window_s=60, pause_s=0.05, max_pause_s=0.05)
    store = make_store(tier, breaker=config)
    (key,) = make_keys(1)
    fill(tier, [key])
    tier.fail = raises(TierTimeout, "get")  # an outcome of the record, not of the call
    for _ in range(2):
        assert load(store, key) is None
    assert use_of(store, "tier").is_down
    for _ in range(3):
        time.sleep(0.06)
        assert load(store, key) is None
        assert use_of(store, "tier").is_down
    tier.fail = lambda call: None
    time.sleep(0.06)
    assert load(store, key) == "tier"
    assert not use_of(store, "tier").is_down


def test_a_timeout_counts_for_several_failures(make_store):
    tier = DictTier("tier", raises(TierTimeout, "get"))
    store = make_store(tier, breaker=BreakerConfig(failures=5, timeout_failures=3, pause_s=60))
    (key,) = make_keys(1)
    for is_down in (False, True):
        assert load(store, key) is None
        assert use_of(store, "tier").is_down is is_down
    tier.fail = lambda call: None


# ---- what is asked and fetched once --------------------------------------------------------------


def test_absence_is_remembered_for_a_while(make_store):
    slow = DictTier("slow")
    store = make_store(slow, policies={"slow": TierPolicy(negative_ttl_s=60)})
    keys = make_keys(4)
    fill(slow, keys[:1])
    for _ in range(5):
        assert store.contains_many(keys) == ["slow", None, None, None]
    assert slow.calls.count("contains") == 5  # for the one that is there
    assert store.contains_many(keys[1:]) == [None] * 3
    assert slow.calls.count("contains") == 5
    save(store, keys[1:2])
    assert store.contains_many(keys) == ["slow", "slow", None, None]


def test_two_requests_fetch_a_record_once(make_store):
    gate, fetched = threading.Event(), threading.Event()

    def fail(call: str) -> None:
        if call == "get":
            fetched.set()
            assert gate.wait(30)

    fast, slow = DictTier("fast"), DictTier("slow", fail)
    store = make_store(fast, slow)
    keys = make_keys(3)
    fill(slow, keys)
    found: dict[str, list[str | None]] = {}

    def request(name: str) -> None:
        found[name] = [load(store, key) for key in keys[:1]]

    threads = [threading.Thread(target=request, args=(name,)) for name in ("first", "second")]
    threads[0].start()
    assert fetched.wait(30)
    threads[1].start()
    while store.stats().num_coalesced == 0:
        assert threads[1].is_alive()
        time.sleep(0.001)
    gate.set()
    for thread in threads:
        thread.join(30)
    assert found == {"first": ["slow"], "second": ["fast"]}
    assert slow.calls.count("get") == 1


def test_who_waits_for_a_fetch_that_fails_tries_for_itself(make_store):
    gate, fetched = threading.Event(), threading.Event()

    def fail(call: str) -> None:
        if call == "get" and not fetched.is_set():
            fetched.set()
            assert gate.wait(30)
            raise TierUnavailable("cut off")

    fast, slow = DictTier("fast"), DictTier("slow", fail)
    store = make_store(fast, slow)
    keys = make_keys(1)
    fill(slow, keys)
    found = []
    first = threading.Thread(target=lambda: found.append(load(store, keys[0])))
    first.start()
    assert fetched.wait(30)
    second = threading.Thread(target=lambda: found.append(load(store, keys[0])))
    second.start()
    while store.stats().num_coalesced == 0:
        time.sleep(0.001)
    gate.set()
    first.join(30)
    second.join(30)
    assert sorted(found, key=str) == [None, "slow"]


def test_claims_end_whatever_happens(make_store):
    """A wrong buffer raises out of the load; the next one must not wait for it."""
    fast, slow = DictTier("fast"), DictTier("slow")
    store = make_store(fast, slow)
    (key,) = make_keys(1)
    fill(slow, [key])
    with pytest.raises(ValueError, match="block_out: expected 3072 bytes"):
        load_block(store, key, bytearray(3))
    started = time.monotonic()
    assert load(store, key) == "slow"
    assert time.monotonic() - started < 2
    assert store.stats().num_coalesced == 0


def test_threads_that_want_the_same_never_wait_for_each_other_in_a_ring(make_store):
    fast, slow = DictTier("fast"), DictTier("slow")
    store = make_store(fast, slow, queue_bytes=LAYOUT.block_bytes)  # promotions are mostly dropped
    keys = make_keys(64)
    fill(slow, keys)
    problems = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(64)
        for _ in range(5):
            problems.extend(key for key in order if load(store, keys[key]) is None)

    started = time.monotonic()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert time.monotonic() - started < 30


# ---- pins, identities, sweeps --------------------------------------------------------------------


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


# ---- the parts -----------------------------------------------------------------------------------


def test_recent_names_are_bounded_and_age():
    now = [0.0]
    names = [key.name for key in make_keys(6)]
    recent = RecentNames(capacity=4, ttl_s=10, clock=lambda: now[0])
    assert recent.add(names[:4]) == [True] * 4
    now[0] = 5
    assert recent.add(names[2:5]) == [False, False, True]
    assert recent.contains_many(names) == [False, True, True, True, True, False]
    now[0] = 12
    assert recent.contains_many(names) == [False, False, True, True, True, False]
    recent.discard(names[2:4])
    assert recent.contains_many(names) == [False, False, False, False, True, False]


def test_a_claim_has_one_holder_and_wakes_all_who_wait():
    names = [key.name for key in make_keys(3)]
    in_flight = InFlight()
    assert in_flight.claim(names[:2]) == [True, True]
    assert in_flight.claim(names) == [False, False, True]
    assert not in_flight.wait(names, time.monotonic() + 0.01)
    in_flight.release(names[:2])
    in_flight.releaser(names[2])()
    assert in_flight.wait(names, time.monotonic())
    assert in_flight.claim(names) == [True] * 3


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
