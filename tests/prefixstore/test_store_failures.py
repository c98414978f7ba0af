"""Tiers that raise, time out or have bugs: what that costs, and when they are called again."""

import logging
import time
from functools import partial

import pytest
from dict_tier import DictTier, fill, held, raises
from sample_blocks import make_keys, make_payload
from stores import load, save, use_of

from prefixstore.errors import BlockCorrupted, TierFull, TierTimeout, TierUnavailable
from prefixstore.store.block_sources import HostBlock
from prefixstore.store.breaker import Breaker, BreakerConfig, Leave


@pytest.mark.parametrize("error", [TierUnavailable, TierTimeout, TierFull, BlockCorrupted])
def test_a_tier_that_raises_costs_only_its_hits(make_store, error):
    broken, good = DictTier("broken", raises(error)), DictTier("good")
    store = make_store(broken, good)
    keys = make_keys(20)
    save(store, keys)
    assert [load(store, key) for key in keys] == ["good"] * 20
    assert store.contains_many(keys) == ["good"] * 20
    assert use_of(store, "broken").num_hits == 0
    broken.fail = lambda call: None


def test_a_failing_tier_is_left_alone_and_comes_back(make_store, monkeypatch, caplog):
    now = [0.0]
    breaker = partial(Breaker, clock=lambda: now[0])
    monkeypatch.setattr("prefixstore.store.tier_calls.Breaker", breaker)
    tier = DictTier("flaky")
    config = BreakerConfig(failures=3, window_s=10, pause_s=0.2, max_pause_s=1)
    store = make_store(tier, breaker=config)
    (key,) = make_keys(1)
    save(store, [key])
    tier.fail = raises(TierUnavailable)
    tier.calls.clear()
    with caplog.at_level(logging.WARNING, "prefixstore"):
        for _ in range(50):
            assert load(store, key) is None
        assert len(tier.calls) == 3
        use = use_of(store, "flaky")
        assert (use.is_down, use.num_errors, use.num_skipped) == (True, 3, 47)
        tier.fail = lambda call: None
        now[0] += 0.25
        assert load(store, key) == "flaky"
    assert not use_of(store, "flaky").is_down
    assert [record.message.split(":")[1] for record in caplog.records] == [
        " down for 0.2 s",
        " back",
    ]


def test_a_full_tier_is_still_read(make_store):
    tier = DictTier("full")
    store = make_store(tier, breaker=BreakerConfig(failures=1))
    keys = make_keys(3)
    save(store, keys[:1])
    tier.fail = raises(TierFull, "put")
    save(store, keys[1:])
    assert load(store, keys[0]) == "full"
    use = use_of(store, "full")
    assert (use.num_full, use.num_errors, use.is_down) == (2, 0, False)


def test_a_bug_in_a_tier_marks_it_down_and_writing_goes_on(make_store, caplog):
    def fail(call: str) -> None:
        if call == "put":
            raise ZeroDivisionError("a bug")

    buggy, good = DictTier("buggy", fail), DictTier("good")
    store = make_store(good, buggy)
    keys = make_keys(3)
    save(store, keys)
    assert [load(store, key) for key in keys] == ["good"] * 3
    assert use_of(store, "buggy").is_down and not use_of(store, "good").is_down
    assert "a bug" in caplog.text


def test_a_bug_in_a_callback_does_not_end_the_writing(make_store, caplog):
    tier = DictTier("dict")
    store = make_store(tier)
    first, second = make_keys(2)

    def done() -> None:
        raise ZeroDivisionError("in done")

    assert store.save(first, HostBlock(make_payload(first)), done)
    save(store, [second])
    assert load(store, second) == "dict"
    assert "in done" in caplog.text
    assert not use_of(store, "dict").is_down


def test_a_slower_tier_gets_what_the_fastest_does_not_take(make_store):
    broken, slow = DictTier("broken", raises(TierUnavailable)), DictTier("slow")
    store = make_store(broken, slow)
    keys = make_keys(12)
    save(store, keys)
    assert held(slow, keys) == [True] * 12
    assert [load(store, key) for key in keys] == ["slow"] * 12
    broken.fail = lambda call: None


def test_a_tier_that_is_down_drops_at_once(make_store):
    fast, slow = DictTier("fast"), DictTier("slow", raises(TierUnavailable))
    store = make_store(fast, slow, breaker=BreakerConfig(failures=1, pause_s=60))
    keys = make_keys(50)
    save(store, keys)
    assert held(fast, keys) == [True] * 50
    use = use_of(store, "slow")
    assert (use.num_dropped, use.num_errors, use.is_down) == (50, 1, True)
    slow.fail = lambda call: None


@pytest.mark.parametrize("call", ["contains", "put"])
@pytest.mark.parametrize("num_slower", [0, 1])
def test_what_the_fastest_tier_gives_no_answer_for_is_counted_as_dropped(
    make_store, call, num_slower
):
    tiers = [DictTier("fast", raises(TierUnavailable, call)), DictTier("slow")][: 1 + num_slower]
    store = make_store(*tiers, breaker=BreakerConfig(failures=1, pause_s=60))
    keys = make_keys(5)
    save(store, keys)
    assert store.stats().num_saved == 5
    use = use_of(store, "fast")
    assert (use.num_dropped, use.num_written, use.num_errors) == (5, 0, 1)
    for slow in tiers[1:]:
        assert held(slow, keys) == [True] * 5


def test_a_trial_whose_records_all_fail_brings_no_tier_back(make_store):
    tier = DictTier("tier")
    config = BreakerConfig(failures=2, window_s=60, pause_s=0.05, max_pause_s=0.05)
    store = make_store(tier, breaker=config)
    (key,) = make_keys(1)
    fill(tier, [key])
    tier.fail = raises(TierTimeout, "get")  # the outcome of a record, not of the call
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


def begin(breaker: Breaker) -> Leave:
    """Begin a call of the tier, which must be allowed."""
    leave = breaker.allows()
    assert leave is not None
    return leave


def test_breaker_pauses_grow_and_shrink_back():
    now = [0.0]
    breaker = Breaker("x", BreakerConfig(2, 10, 1, 4), clock=lambda: now[0])
    error = TierUnavailable("x")
    breaker.failed(error, begin(breaker))
    now[0] = 11
    breaker.failed(error, begin(breaker))
    leave = begin(breaker)  # two failures, but not within the window
    breaker.failed(error, leave)
    assert not breaker.allows()
    for pause in (1, 2, 4, 4):
        now[0] += pause - 0.01
        assert not breaker.allows()
        now[0] += 0.02
        trial = begin(breaker)
        assert not breaker.allows()  # one at a time
        breaker.failed(error, trial)
    now[0] += 5
    breaker.succeeded(begin(breaker))
    assert breaker.allows() and breaker.allows()
    breaker.failed(error, begin(breaker))
    breaker.failed(error, begin(breaker))
    now[0] += 1.01
    assert breaker.allows()  # the first pause is short again


def test_calls_that_began_before_a_tier_went_down_neither_lengthen_nor_end_the_pause():
    now = [0.0]
    breaker = Breaker("x", BreakerConfig(pause_s=1, max_pause_s=60), clock=lambda: now[0])
    error = TierTimeout("x")
    under_way = [begin(breaker) for _ in range(8)]
    for leave in under_way[:6]:
        breaker.failed(error, leave)
    now[0] += 1.01
    trial = begin(breaker)
    breaker.failed(error, under_way[6])  # not the trial, which is still under way
    breaker.failed(error, trial)
    now[0] += 1.99
    assert not breaker.allows()
    now[0] += 0.02
    ended = begin(breaker)  # hangs
    now[0] += 2.01
    breaker.succeeded(under_way[7])  # it began before the outage
    assert breaker.is_down
    breaker.succeeded(begin(breaker))
    assert not breaker.is_down
    for _ in range(2):
        breaker.failed(error, begin(breaker))
    assert breaker.is_down
    breaker.failed(error, ended)  # a trial of the outage before
    breaker.succeeded(ended)
    assert breaker.is_down
    now[0] += 1.01
    assert breaker.allows()


def test_a_trial_that_tells_nothing_leaves_its_place_to_the_next_call():
    now = [0.0]
    breaker = Breaker("x", BreakerConfig(failures=1, pause_s=1), clock=lambda: now[0])
    error = TierUnavailable("x")
    before = begin(breaker)
    breaker.failed(error, begin(breaker))
    now[0] += 1
    for _ in range(3):
        trial = begin(breaker)
        assert not breaker.allows()
        breaker.told_nothing(before)
        assert not breaker.allows()
        breaker.told_nothing(trial)
        assert breaker.is_down
    trial = begin(breaker)
    now[0] += 1
    breaker.failed(error, begin(breaker))  # the one before hangs, and ends in the next pause
    breaker.told_nothing(trial)
    assert not breaker.allows()
    now[0] += 2
    breaker.succeeded(begin(breaker))
    breaker.told_nothing(trial)
    assert not breaker.is_down


def test_a_tier_whose_turn_comes_too_late_is_not_blamed(make_store):
    class Slow(DictTier):
        """Answers at the deadline that nothing is there."""

        def get_many(self, names, outs, *, offsets=None, deadline=None):
            self._wait(deadline)
            return [TierTimeout("late")] * len(names)

        def contains_many(self, names, *, deadline=None):
            self._wait(deadline)
            return [False] * len(names)

        def _wait(self, deadline):
            time.sleep(max(0.0, deadline - time.monotonic()) + 0.01)

    slow, healthy = Slow("slow"), DictTier("healthy", raises(TierTimeout, "get", "contains"))
    store = make_store(slow, healthy, load_timeout_s=0.3)
    keys = make_keys(2)
    fill(healthy, keys)
    assert store.contains_many(keys) == [None, None]
    assert [load(store, key) for key in keys] == [None, None]
    assert healthy.calls == []
    use = use_of(store, "healthy")
    assert (use.num_misses, use.num_errors, use.is_down) == (2, 0, False)
    assert use_of(store, "slow").is_down
