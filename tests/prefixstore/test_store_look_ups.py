"""Look-ups: tiers that answer for only some records, and which answers are remembered."""

import threading
import time

import pytest
from cached_models import BLOCK_SIZE, random_tokens, run
from dict_tier import DictTier, fill, held, raises
from sample_blocks import make_keys
from stores import save, use_of

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.errors import TierTimeout, TierUnavailable
from prefixstore.store import Store, StoreConfig, TierPolicy
from prefixstore.store.breaker import BreakerConfig
from prefixstore.tiers.remote import RemoteTier
from prefixstore.tiers.remote.config import RemoteTierConfig

AT_ONCE = BreakerConfig(failures=1, pause_s=60)  # one failed call takes a tier down


class PartlySilent(DictTier):
    """Gives no answer for some records."""

    def __init__(self, name: str, silent: set[bytes]) -> None:
        super().__init__(name)
        self.silent = silent

    def contains_many(self, names, *, deadline=None):
        answers = super().contains_many(names, deadline=deadline)
        return [
            TierTimeout("no answer") if name.block_hash in self.silent else answer
            for name, answer in zip(names, answers, strict=True)
        ]


def test_what_got_an_answer_is_found_and_no_tier_is_blamed_for_the_rest(make_store):
    keys = make_keys(6)
    tier = PartlySilent("tier", {key.block_hash for key in keys[1:3]})
    store = make_store(tier, breaker=AT_ONCE)
    fill(tier, keys[:4])
    for num_calls in (1, 2):
        assert store.contains_many(keys) == ["tier", None, None, "tier", None, None]
        use = use_of(store, "tier")
        assert (use.num_errors, use.num_timeouts) == (2 * num_calls, 2 * num_calls)
        assert not use.is_down
    tier.silent.update(key.block_hash for key in keys)
    assert store.contains_many(keys) == [None] * 6
    assert use_of(store, "tier").is_down  # none of these got an answer


def test_what_got_no_answer_is_not_remembered_as_absent(make_store):
    keys = make_keys(3)
    tier = PartlySilent("tier", {keys[0].block_hash})
    store = make_store(tier, policies={"tier": TierPolicy(negative_ttl_s=60)})
    fill(tier, keys[:2])
    assert store.contains_many(keys) == [None, "tier", None]
    tier.silent.clear()
    fill(tier, keys)
    assert store.contains_many(keys) == ["tier", "tier", None]


def test_what_got_no_answer_is_told_from_what_is_not_there(make_store):
    keys = make_keys(6)
    fast, slow = PartlySilent("fast", {keys[0].block_hash, keys[1].block_hash}), DictTier("slow")
    policies = {"slow": TierPolicy(negative_ttl_s=60)}
    store = make_store(fast, slow, policies=policies, breaker=AT_ONCE)
    fill(slow, keys[:1])
    fill(fast, keys[4:5])

    def look_up(deadline):
        return [
            (list(one.tiers), sorted(one.unanswered)) for one in store.look_up(groups, deadline)
        ]

    groups, soon = [keys[:3], keys[3:]], time.monotonic() + 30
    assert look_up(soon) == [(["slow", None, None], [1]), ([None, "fast", None], [])]
    assert look_up(time.monotonic() - 1) == [([None] * 3, [0, 1, 2]), ([None] * 3, [0, 1, 2])]
    slow.fail = raises(TierUnavailable, "contains")
    for _ in range(2):  # the first takes it down, the second skips it
        # The others are still remembered as absent.
        assert look_up(soon) == [([None] * 3, [0, 1]), ([None, "fast", None], [])]


@pytest.mark.parametrize("is_there_late", [False, True])
def test_what_is_written_during_a_look_up_is_not_remembered_as_absent(make_store, is_there_late):
    """Even if the write failed but the record was kept."""
    answered, go_on = threading.Event(), threading.Event()

    class Slow(DictTier):
        def contains_many(self, names, *, deadline=None):
            answers = super().contains_many(names, deadline=deadline)
            if threading.current_thread() is looking:  # the look-up's answer is on its way
                answered.set()
                assert go_on.wait(30)
            return answers

        def put_many(self, names, records, *, priority=0, deadline=None):
            outcomes = super().put_many(names, records, priority=priority, deadline=deadline)
            if is_there_late:
                raise TierTimeout("late")
            return outcomes

    key, other = make_keys(2)
    store = make_store(Slow("slow"), policies={"slow": TierPolicy(negative_ttl_s=60)})
    found: list[list[str | None]] = []
    looking = threading.Thread(target=lambda: found.append(store.contains_many([key, other])))
    looking.start()
    assert answered.wait(30)
    save(store, [key])
    go_on.set()
    looking.join(30)
    assert found == [[None, None]]
    fill(store._tiers[0]._tier, [other])  # by another process
    assert store.contains_many([key, other]) == ["slow", None]


@pytest.mark.parametrize("number", [0, 1])
def test_what_got_no_answer_is_not_written_and_the_rest_is(make_store, number):
    keys = make_keys(4)
    tiers = [DictTier("other"), DictTier("other")]
    tiers[number] = PartlySilent("silent", {key.block_hash for key in keys[:2]})
    store = make_store(*tiers)
    save(store, keys)
    assert held(tiers[number], keys) == [False, False, True, True]
    assert held(tiers[1 - number], keys) == [True] * 4
    use = use_of(store, "silent")
    assert (use.num_dropped, use.num_written, use.num_errors) == (2, 2, 2)


def test_a_request_of_an_object_store_that_hangs_costs_its_own_hit_alone(scripted):
    keys = make_keys(6)
    lost = keys[2].block_hash.hex()
    there = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": '"1"'}
    scripted.answer = lambda method, path, headers: None if lost in path else (200, there, b"x")
    place = {"region": "us-east-1", "endpoint": scripted.endpoint}
    expected = [None if key is keys[2] else "remote" for key in keys]
    for load_timeout_s in (1, 5, 20):  # on a stalled machine others may be late, too
        tier = RemoteTier(RemoteTierConfig("s3", "bucket", **place))
        config = StoreConfig(load_timeout_s=load_timeout_s, breaker=AT_ONCE)
        with Store([tier], config) as store:
            found = store.contains_many(keys)
            use = use_of(store, "remote")
        if found == expected:
            break
    assert found == expected
    assert (use.num_timeouts, use.is_down) == (1, False)


def test_a_tier_that_is_slow_to_tell_what_it_holds_is_loaded_from_all_the_same(model):
    class SlowToTell(PartlySilent):
        def contains_many(self, names, *, deadline=None):
            if self.silent:
                time.sleep(min(max(0.0, deadline - time.monotonic()), 2.0))
            return super().contains_many(names, deadline=deadline)

    tier = SlowToTell("slow", set())
    config = CacheConfig(block_size=BLOCK_SIZE, pool_tokens=1024)
    store = Store([tier], StoreConfig(load_timeout_s=2.0))
    with PrefixCache.open(model, config, store=store) as cache:
        tokens = random_tokens(10 * BLOCK_SIZE + 1)
        cold, _ = run(cache, model, tokens)
        assert cache.flush(30)
        cache.evict_pool()
        keys = cache.blocks.keys(*cache.checked_prompt(tokens[: 10 * BLOCK_SIZE], None))
        tier.silent = {key.block_hash for own in keys for key in own[5:]}
        warm, report = run(cache, model, tokens)
        assert warm == cold
        assert report.tokens_by_tier == {"slow": 5 * BLOCK_SIZE}


def test_what_faster_tiers_hold_is_known_while_a_slower_one_is_asked(make_store):
    keys, heard = make_keys(3), []
    fast, slow = DictTier("fast"), DictTier("slow")
    store = make_store(fast, slow)
    fill(fast, keys[:1])
    fill(slow, keys[1:2])
    found = store.look_up([keys[:2], keys[2:]], time.monotonic() + 60, heard.append)
    assert [own.tiers for own in found] == [["fast", "slow"], [None]]
    assert [(one.tiers, sorted(one.unanswered)) for one in heard] == [
        ([None] * 3, [0, 1, 2]),
        (["fast", None, None], [1, 2]),
    ]
