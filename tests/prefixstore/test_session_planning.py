"""Sessions load what tiers hold only as far as that is faster than computing."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait

import numpy as np
import pytest
import torch
from cached_models import BLOCK_SIZE, calling_first, generate, random_tokens, run
from dict_tier import DictTier
from failing_tiers import Gate

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.errors import ConfigError
from prefixstore.pass_timer import PassTimer
from prefixstore.store import Store

NUM_TOKENS = 100
NUM_WHOLE = 96
NUM_BYTES = 1 << 16
COMPUTE_S = 2.0  # that the model is said to take for the prompt
IN_TIME_S, TOO_LATE_S = 1e-4, 100.0  # that a tier is said to take for as much

pytestmark = pytest.mark.usefixtures("waits_for_look_ups")


@pytest.fixture
def opened(model):
    """Opens a planning cache of the model and these tiers; recounted and closed after the test."""
    caches = []

    def open_one(*tiers: DictTier, **options: object) -> PrefixCache:
        options = {"restore_policy": "planned", "pool_tokens": 512, **options}
        config = CacheConfig(block_size=BLOCK_SIZE, **options)
        caches.append(PrefixCache.open(model, config, store=Store(tiers)))
        return caches[-1]

    yield open_one
    for cache in caches:
        cache.close()
        assert cache.check() == []


def stored(cache: PrefixCache, model: torch.nn.Module, tokens: torch.Tensor) -> list[int]:
    """Compute a prompt, leave it in the tiers alone, and return its answer.

    Nothing is learnt of the model's speed, now or later, but what `believe` says.
    """
    cache._restorer.timer = PassTimer(torch.device("cpu"), lambda *_: None, lambda: False)
    answer, _ = run(cache, model, tokens)
    assert cache.flush(30)
    cache.evict_pool()
    return answer


def believe(cache: PrefixCache, **load_s: float) -> None:
    """Have speeds been measured: of the model, and of tiers by name."""
    planner = cache._restorer.planner
    num_bytes = sum(own.sum() for own in cache.blocks.record_bytes(0, NUM_WHOLE // BLOCK_SIZE))
    for _ in range(10):
        # of several lengths, which tell a token's time from a pass's
        for num_new in (NUM_TOKENS, NUM_TOKENS // 10):
            planner.observe_prefill(num_new, 0, COMPUTE_S * num_new / NUM_TOKENS)
        for name, seconds in load_s.items():
            # Far in the future, so that no probe is due.
            planner.observe_load(name, int(num_bytes), NUM_WHOLE // BLOCK_SIZE, seconds, 1e12)


@pytest.fixture
def wait_little_for_look_ups(waits_for_look_ups, monkeypatch):
    """But longer than a machine stands still."""
    monkeypatch.setattr("prefixstore.prefix_loads._LEAST_LOOKUP_S", 1.0)


def keep_first(num_blocks: int, cache: PrefixCache, tokens: torch.Tensor, tier: DictTier) -> None:
    """Have a tier lose all blocks of a prompt but the first ones."""
    if len(cache.blocks.device.windows) > 1:
        pytest.skip("needs a model without windows, which reach over blocks of both tiers")
    for key in cache.blocks.keys(tokens[0].cpu().numpy().astype(np.uint32), "")[0][num_blocks:]:
        del tier.records[key.block_hash]


def num_free(cache: PrefixCache) -> list[int]:
    return [pool.num_free for pool in cache.stats().pools]


def test_a_tier_that_is_slower_than_computing_is_not_read(model, opened) -> None:
    tier, tokens = DictTier("slow"), random_tokens(NUM_TOKENS)
    cache = opened(tier)
    expected = stored(cache, model, tokens)
    believe(cache, slow=TOO_LATE_S)
    tier.calls.clear()
    answer, report = run(cache, model, tokens)
    assert (answer, report.tokens_by_tier, report.misses) == (expected, {}, {"cheaper": NUM_WHOLE})
    assert "get" not in tier.calls
    cache.evict_pool()
    believe(cache, slow=IN_TIME_S)
    answer, report = run(cache, model, tokens)
    assert (answer, report.tokens_by_tier, report.misses) == (expected, {"slow": NUM_WHOLE}, {})


def test_only_a_slow_tier_is_left_out(opened, model) -> None:
    fast, slow, tokens = DictTier("fast"), DictTier("slow"), random_tokens(NUM_TOKENS)
    cache = opened(fast, slow)
    expected = stored(cache, model, tokens)
    keep_first(2, cache, tokens, fast)
    believe(cache, fast=IN_TIME_S, slow=TOO_LATE_S)
    answer, report = run(cache, model, tokens)
    assert answer == expected
    assert (report.tokens_by_tier, report.misses) == ({"fast": 32}, {"cheaper": 64})


@pytest.mark.parametrize("policy", ["load", "recompute"])
def test_a_policy_stands_whatever_is_believed(model, opened, policy) -> None:
    tier, tokens = DictTier("slow"), random_tokens(NUM_TOKENS)
    cache = opened(tier, restore_policy=policy)
    expected = stored(cache, model, tokens)
    believe(cache, slow=TOO_LATE_S if policy == "load" else IN_TIME_S)
    gate = Gate("get")
    if policy == "load":
        tier.fail = gate
        threading.Thread(target=lambda: gate.entered.wait(30) and gate.open()).start()
    answer, report = run(cache, model, tokens)
    assert answer == expected
    assert report.misses == ({} if policy == "load" else {"cheaper": NUM_WHOLE})


def test_refuses_an_unknown_policy() -> None:
    with pytest.raises(ConfigError, match="restore_policy: expected one of"):
        CacheConfig(restore_policy="always")


def test_a_tier_that_hangs_is_left_and_its_blocks_come_back(model, opened) -> None:
    tier, gate, tokens = DictTier("slow"), Gate("get"), random_tokens(NUM_TOKENS)
    cache = opened(tier)
    expected = stored(cache, model, tokens)
    believe(cache, slow=IN_TIME_S)
    free, believed_s = num_free(cache), cache.planner_stats().tiers["slow"].seconds(NUM_BYTES)
    tier.fail = gate
    answer, report = run(cache, model, tokens)  # the gate is closed all the time
    assert answer == expected
    assert (report.tokens_by_tier, report.misses) == ({}, {"late": NUM_WHOLE})
    cache.evict_pool()
    assert num_free(cache) < free  # of the load that is under way
    gate.open()
    cache._restorer.close()
    assert num_free(cache) == free
    assert cache.check() == []
    # What was waited for in vain was a measurement, of which it takes two for a change.
    assert cache.planner_stats().tiers["slow"].seconds(NUM_BYTES) > believed_s


def test_what_came_before_a_tier_hangs_is_used(model, opened) -> None:
    fast, slow, tokens = DictTier("fast"), DictTier("slow"), random_tokens(NUM_TOKENS)
    cache, gate = opened(fast, slow), Gate("get")
    expected = stored(cache, model, tokens)
    keep_first(2, cache, tokens, fast)
    believe(cache, fast=IN_TIME_S, slow=IN_TIME_S)
    slow.fail = gate
    answer, report = run(cache, model, tokens)
    gate.open()
    assert answer == expected
    assert (report.tokens_by_tier, report.misses) == ({"fast": 32}, {"late": 64})


@pytest.mark.usefixtures("wait_little_for_look_ups")
def test_a_look_up_that_hangs_costs_only_the_hits_of_its_tier(model, opened) -> None:
    fast, slow, tokens = DictTier("fast"), DictTier("slow"), random_tokens(NUM_TOKENS)
    cache, gate = opened(fast, slow), Gate("contains")
    expected = stored(cache, model, tokens)
    keep_first(2, cache, tokens, fast)
    believe(cache, fast=IN_TIME_S, slow=IN_TIME_S)
    slow.fail = gate
    with cache.session(tokens) as session:
        report = session.report
        assert generate(model, tokens, session) == expected
    gate.open()
    assert (report.tokens_by_tier, report.misses) == ({"fast": 32}, {"unreachable": 64})


def test_look_ups_of_a_far_tier_are_waited_for_once_they_are_known(
    model, opened, monkeypatch
) -> None:
    monkeypatch.setattr("prefixstore.prefix_loads._LEAST_LOOKUP_S", 0.0)
    monkeypatch.setattr("prefixstore.prefix_loads._LOOKUP_SHARE", 0.0)
    tier, tokens = DictTier("far"), random_tokens(NUM_TOKENS)
    cache = opened(tier)
    expected = stored(cache, model, tokens)
    believe(cache, far=IN_TIME_S)

    def take_long(call: str) -> None:
        if call == "contains":
            time.sleep(0.05)

    tier.fail = take_long
    answer, report = run(cache, model, tokens)
    assert (answer, report.misses) == (expected, {"unreachable": NUM_WHOLE})
    # It is worth a good part of the two seconds that the model is said to take.
    for _ in range(5):
        cache._restorer.close()  # the look-up is over
        cache.evict_pool()
        answer, report = run(cache, model, tokens)
        assert answer == expected
        if not report.misses:
            break
    assert report.tokens_by_tier == {"far": NUM_WHOLE}
    look_ups = cache.planner_stats().look_ups
    assert look_ups.seconds > 0.02 and look_ups.saved_share > 0.2
    # Of prompts that no tier holds any less is expected.
    for seed in range(9):
        run(cache, model, random_tokens(NUM_TOKENS, 100 + seed))
    assert cache.planner_stats().look_ups.saved_share < 0.1


@pytest.mark.usefixtures("wait_little_for_look_ups")
def test_tiers_are_not_asked_while_too_many_calls_hang(model, opened) -> None:
    tier, gate, tokens = DictTier("slow"), Gate("contains"), random_tokens(NUM_TOKENS)
    cache = opened(tier)
    stored(cache, model, tokens)
    believe(cache, slow=IN_TIME_S)
    tier.fail = gate
    tier.calls.clear()
    for _ in range(6):
        with cache.session(tokens) as session:
            assert session.report.misses == {"unreachable": NUM_WHOLE}
    assert tier.calls == ["contains"] * 4
    gate.open()


def test_a_tier_that_is_left_out_is_measured(model, opened) -> None:
    tier, tokens = DictTier("slow"), random_tokens(NUM_TOKENS)
    cache = opened(tier)
    stored(cache, model, tokens)
    planner = cache._restorer.planner
    for _ in range(5):
        planner.observe_prefill(NUM_TOKENS, 0, 1e-5)  # faster than any tier
    free = num_free(cache)
    with cache.session(tokens) as session:
        assert session.report.misses == {"cheaper": NUM_WHOLE}
    cache._restorer.close()
    has_window = len(cache.blocks.device.windows) > 1
    measured = cache.planner_stats().tiers["slow"]
    assert measured.num_calls == 1 + has_window
    assert measured.num_records == 4 + 3 * has_window  # the window needs the last three
    assert num_free(cache) == free
    assert cache.planner_stats().num_probes == 1


def test_an_interrupted_load_gives_its_blocks_back(model, opened, monkeypatch) -> None:
    tier, gate, tokens = DictTier("slow"), Gate("get"), random_tokens(NUM_TOKENS)
    cache = opened(tier)
    stored(cache, model, tokens)
    believe(cache, slow=IN_TIME_S)
    free = num_free(cache)
    tier.fail = gate
    waits = []

    def interrupt(futures, timeout_s):
        waits.append(timeout_s)
        if len(waits) == 1:  # for the look-up
            return wait(futures, timeout_s)
        assert gate.entered.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixstore.patient_calls.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.session(tokens)
    monkeypatch.undo()
    cache.evict_pool()
    gate.open()
    cache._restorer.close()
    assert num_free(cache) == free


def test_prompts_are_measured_and_answers_are_not(model, opened) -> None:
    cache, tokens = opened(DictTier("tier")), random_tokens(NUM_TOKENS)
    run(cache, model, tokens, num_new=5)
    cache._restorer.timer.collect()
    assert cache.planner_stats().prefill.num_passes == 1


@torch.no_grad()
def test_a_pass_that_failed_is_not_measured(model, opened) -> None:
    cache, tokens = opened(DictTier("tier")), random_tokens(NUM_TOKENS)

    def fail() -> None:
        raise ZeroDivisionError

    with cache.session(tokens) as session:
        with calling_first(model.model.layers[1], fail), pytest.raises(ZeroDivisionError):
            model(tokens, past_key_values=session)
        cache._restorer.timer.collect()
        assert cache.planner_stats().prefill.num_passes == 0
        model(tokens, past_key_values=session)
    cache._restorer.timer.collect()
    assert cache.planner_stats().prefill.num_passes == 1


@torch.no_grad()
def test_a_pass_of_a_compiled_model_is_measured(model, opened) -> None:
    cache = opened(DictTier("tier"))
    compiled = torch.compile(model, backend="eager")
    for num_passes in (1, 2):
        with cache.session(random_tokens(NUM_TOKENS, num_passes)) as session:
            compiled(random_tokens(NUM_TOKENS, num_passes), past_key_values=session)
        cache._restorer.timer.collect()
        assert cache.planner_stats().prefill.num_passes == num_passes
