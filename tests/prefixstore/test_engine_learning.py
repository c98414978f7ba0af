"""What an engine's planner is told of tiers and passes, and what it plans with."""

import contextlib
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from cached_models import BLOCK_SIZE, tiny_llama
from dict_tier import DictTier
from engines import GREEDY, Numbers, expected, prompt
from failing_tiers import Gate
from restoring_engines import LENGTH, warm, watch

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine import Engine, EngineConfig
from prefixstore.engine.scheduler import Step
from prefixstore.errors import TierTimeout
from prefixstore.store import Store


@pytest.mark.parametrize("codec", ["raw", "q4"])
def test_plans_with_the_bytes_that_are_read(tier, codec, monkeypatch):
    plans, loads = [], []
    model = tiny_llama()
    cache = PrefixCache.open(
        model,
        CacheConfig(block_size=BLOCK_SIZE, pool_tokens=2048, codec=codec, exact_blocks=2),
        store=Store([tier]),
    )
    config = EngineConfig(restore_policy="load")
    with contextlib.closing(cache), Engine(model, Numbers(), cache, config) as engine:
        warm(engine, prompt(LENGTH))
        planner = engine._loop.planner
        watch(monkeypatch, planner, "plan", lambda _, args, __: plans.append(sum(args[3])))
        watch(monkeypatch, planner, "observe_load", lambda _, args, __: loads.append(args[1]))
        engine.submit(prompt(LENGTH), GREEDY).result(60)
    assert plans == [sum(loads)]


def test_a_tier_that_gives_nothing_in_time_is_learnt_as_slow(model, tier, open_engine):
    engine, tokens = open_engine(), prompt(LENGTH)
    warm(engine, tokens)
    before = engine.stats().planner.tiers["slow"]

    def stall(call):
        if call == "get":
            time.sleep(0.1)
            raise TierTimeout("slow: expected an answer in time, got none")

    tier.fail = stall
    output = engine.submit(tokens, GREEDY).result(60)
    assert list(output.token_ids) == expected(model, tokens)
    after = engine.stats().planner.tiers["slow"]
    assert after.latency_s + 1e5 / after.bytes_per_s > 2 * (
        before.latency_s + 1e5 / before.bytes_per_s
    )


@pytest.mark.usefixtures("waits_for_look_ups")
def test_a_call_that_is_not_waited_for_is_learnt_while_it_hangs(model, tier, open_engine):
    engine, tokens = open_engine(restore_policy="planned"), prompt(LENGTH)
    warm(engine, tokens)
    gate = Gate("get")
    tier.fail = gate
    before = engine.stats().planner.tiers["slow"]
    output = engine.submit(tokens, GREEDY).result(60)
    after = engine.stats().planner.tiers["slow"]
    assert gate.entered.is_set(), "nothing was loaded"
    gate.open()
    assert list(output.token_ids) == expected(model, tokens)
    assert output.report.reuse.misses["late"] and output.report.times.load_s > 0
    assert after.latency_s > before.latency_s or after.bytes_per_s < before.bytes_per_s


@pytest.mark.usefixtures("waits_for_look_ups")
def test_a_call_that_is_not_waited_for_and_then_fails_is_learnt_once(
    tier, open_engine, monkeypatch
):
    """For two surprises are a change, and one may be an accident."""
    engine, tokens = open_engine(restore_policy="planned"), prompt(LENGTH)
    warm(engine, tokens)
    gate, learnt, loop = Gate("get"), [], engine._loop
    watch(monkeypatch, loop.planner, "observe_given_up", lambda _, args, __: learnt.append(args))

    def hang_and_fail(call):
        gate(call)
        if call == "get":
            raise TierTimeout("slow: expected an answer in time, got none")

    tier.fail = hang_and_fail
    engine.submit(tokens, GREEDY).result(60)
    assert gate.entered.is_set() and len(learnt) == 1
    gate.open()
    with loop.changed:
        assert loop.changed.wait_for(lambda: loop.loader._calls.num_calls == 0, 30)
    assert len(learnt) == 1


def test_calls_beside_each_other_are_learnt_as_such(tier, open_engine, monkeypatch):
    engine, prompts = open_engine(), [prompt(LENGTH, seed) for seed in (1, 2)]
    for tokens in prompts:
        warm(engine, tokens)
    found, barrier = [], threading.Barrier(2)
    watch(
        monkeypatch,
        engine._loop.planner,
        "observe_load",
        lambda _, __, named: found.append(named["num_beside"]),
    )

    def meet(call):
        if call == "get":
            barrier.wait(30)  # both calls are under way
            time.sleep(0.05)

    tier.fail = meet
    handles = [engine.submit(tokens, GREEDY) for tokens in prompts]
    for handle in handles:
        handle.result(60)
    num_groups = len(engine.cache.blocks.device.groups)
    assert len(found) == 2 * num_groups
    assert all(0 < one <= 1 for one in found) and max(found) > 0.5
    tier.fail = lambda call: None
    engine.cache.evict_pool()
    engine.submit(prompts[0], GREEDY).result(60)
    assert found[2 * num_groups :] == [0.0] * num_groups


def test_what_the_store_gives_up_on_is_not_planned(tier, open_engine, monkeypatch):
    engine, tokens = open_engine(load_timeout_s=5), prompt(LENGTH)
    warm(engine, tokens)
    deadlines = []
    watch(monkeypatch, engine._loop.planner, "plan", lambda _, __, named: deadlines.append(named))
    engine.submit(tokens, GREEDY).result(60)
    assert [0 < one["deadline_s"] <= 5 for one in deadlines] == [True]


def test_a_pass_half_beside_a_load_tells_no_speed(tier, open_engine):
    engine, tokens = open_engine(), prompt(LENGTH)
    warm(engine, tokens)

    def observe(loading_s):
        request = SimpleNamespace(is_decoding=False)
        engine._loop._observe([Step(request, 0, 24)], 1.0, loading_s)
        planner = engine.stats().planner
        return planner.prefill.num_passes, planner.slowdown

    before = observe(0.5)
    assert observe(0.6) == before
    assert observe(0.0) == (before[0] + 1, before[1])
    observe(1.0)  # may be an accident
    beside = observe(1.0)
    assert beside[0] == before[0] + 1 and beside[1] != before[1]


@pytest.mark.usefixtures("waits_for_look_ups")
@pytest.mark.parametrize("is_first", [True, False])
def test_a_tier_believed_slow_is_measured_beside_one_that_is_fast(
    model, tier, open_engine, monkeypatch, is_first
):
    """With the first half of a prompt in it, or the second."""
    fast, tokens = DictTier("fast"), prompt(LENGTH)
    engine = open_engine(restore_policy="planned", first_tier=fast)
    engine.submit(tokens, GREEDY).result(60)
    assert engine.cache.flush()
    for keys in engine.cache.blocks.keys(np.array(tokens, dtype=np.uint32), ""):
        own, others = (keys[:15], keys[15:]) if is_first else (keys[15:], keys[:15])
        for records, gone in ((fast.records, own), (tier.records, others)):
            for key in gone:
                records.pop(key.block_hash, None)
    engine.cache.evict_pool()
    long_ago = time.monotonic() - 100
    for _ in range(5):
        engine._loop.planner.observe_given_up("slow", 1 << 20, 60.0, long_ago)
    watch(monkeypatch, engine._loop.runner, "run", lambda *_: time.sleep(0.05))
    output = engine.submit(tokens, GREEDY).result(60)
    assert list(output.token_ids) == expected(model, tokens)
    assert engine.drain(60)
    stats = engine.stats().planner
    assert stats.num_probes == 1 and stats.tiers["slow"].num_records >= 4
