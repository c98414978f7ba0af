"""Restoring prompts from tiers: late answers, slow and hanging tiers, what is learnt."""

import contextlib
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cached_models import BLOCK_SIZE, tiny_gemma3, tiny_llama
from dict_tier import DictTier, raises
from engines import GREEDY, Numbers, expected, open_over, prompt
from failing_tiers import Gate

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine import Engine, EngineConfig
from prefixstore.engine.restorer import Restorer
from prefixstore.engine.scheduler import Step
from prefixstore.errors import TierTimeout, TierUnavailable
from prefixstore.store import Store, StoreConfig

LENGTH = 30 * BLOCK_SIZE + 5


@pytest.fixture(params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def model(request):
    torch.manual_seed(1)
    return request.param()


@pytest.fixture
def tier():
    return DictTier("slow")


@pytest.fixture
def open_engine(model, tier):
    """Opens an engine with only the given tier; checks and closes it after the test."""
    engines = []

    def open_one(load_timeout_s=5.0, first_tier=None, **settings):
        tiers = [tier] if first_tier is None else [first_tier, tier]
        store = Store(tiers, StoreConfig(load_timeout_s=load_timeout_s))
        config = CacheConfig(block_size=BLOCK_SIZE, pool_tokens=2048)
        cache = PrefixCache.open(model, config, store=store)
        settings = {"max_batch_tokens": 24, "restore_policy": "load", **settings}
        engines.append(Engine(model, Numbers(), cache, EngineConfig(**settings)))
        return engines[-1]

    yield open_one
    tier.fail = lambda call: None
    for engine in engines:
        assert engine.drain(60)
        engine.close()
        assert engine.check() == []
        stats = engine.cache.stats()
        engine.cache.close()
        assert stats.pool_free_blocks + stats.index.num_blocks == stats.pool_blocks


def warm(engine, tokens):
    """Get the prompt into the tier, and empty the pool."""
    engine.submit(tokens, GREEDY).result(60)
    assert engine.cache.flush()
    engine.cache.evict_pool()


def watch(monkeypatch, owner, name, then):
    """Run `then(result, arguments)` after each call of a method."""
    method = getattr(owner, name)

    def watched(*args, **kwargs):
        answer = method(*args, **kwargs)
        then(answer, args, kwargs)
        return answer

    monkeypatch.setattr(owner, name, watched)


def wait_little(monkeypatch):
    """Make the engine wait only 20 ms for look-ups."""
    monkeypatch.setattr(Restorer, "look_up_until", lambda self, restoring: restoring.began + 0.02)


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


def test_an_answer_that_comes_late_saves_what_is_left(model, tier, open_engine, monkeypatch):
    wait_little(monkeypatch)
    engine, tokens, gate = open_engine(), prompt(LENGTH), Gate("contains")
    warm(engine, tokens)
    has_answer = threading.Event()

    def let_answer(_, args, __):
        if args[0][0].stop >= 2 * BLOCK_SIZE:
            gate.open()
            assert has_answer.wait(30)

    watch(monkeypatch, engine._loop.restorer, "_look_up", lambda *_: has_answer.set())
    watch(monkeypatch, engine._loop.runner, "run", let_answer)
    tier.fail = gate
    output = engine.submit(tokens, GREEDY).result(60)
    assert list(output.token_ids) == expected(model, tokens)
    reuse = output.report.reuse
    assert reuse.tokens_by_tier["slow"] >= 20 * BLOCK_SIZE
    assert reuse.misses.keys() <= {"late"} and sum(reuse.misses.values()) >= 2 * BLOCK_SIZE


def test_what_was_computed_before_its_answer_came_is_late_though_nothing_is_left_to_load(
    model, tier, open_engine, monkeypatch
):
    wait_little(monkeypatch)
    engine, tokens, gate = open_engine(), prompt(LENGTH), Gate("contains")
    warm(engine, tokens[: 4 * BLOCK_SIZE + 1])
    has_answer = threading.Event()

    def let_answer(_, args, __):
        if args[0][0].stop >= 6 * BLOCK_SIZE:
            gate.open()
            assert has_answer.wait(30)

    restorer = engine._loop.restorer
    watch(monkeypatch, restorer, "_look_up_and_load", lambda *_: has_answer.set())
    watch(monkeypatch, engine._loop.runner, "run", let_answer)
    tier.fail = gate
    output = engine.submit(tokens, GREEDY).result(60)
    assert list(output.token_ids) == expected(model, tokens)
    misses = {"late": 4 * BLOCK_SIZE, "new": 26 * BLOCK_SIZE}
    assert output.report.reuse.misses == misses


def test_a_late_answer_delays_nobody_whose_loads_find_no_thread(
    model, tier, open_engine, monkeypatch
):
    wait_little(monkeypatch)
    engine, tokens = open_engine(num_loaders=1, restore_policy="planned"), prompt(LENGTH)
    warm(engine, tokens)
    late, hanging, has_answer = Gate("contains"), Gate("contains"), threading.Event()

    def hold(call):
        if threading.current_thread().name.startswith("kv-loader"):
            (hanging if has_answer.is_set() else late)(call)

    def let_answer(_, args, __):
        if args[0][0].stop >= 2 * BLOCK_SIZE:
            late.open()
            assert has_answer.wait(30)

    watch(monkeypatch, engine._loop.restorer, "_look_up", lambda *_: has_answer.set())
    watch(monkeypatch, engine._loop.runner, "run", let_answer)
    tier.fail = hold
    with engine._loop.changed:  # the second look-up is queued before the first ends
        handles = [engine.submit(tokens, GREEDY), engine.submit(prompt(LENGTH, 1), GREEDY)]
    output = handles[0].result(20)
    assert hanging.entered.is_set(), "the thread was free"
    hanging.open()
    assert list(output.token_ids) == expected(model, tokens)
    assert output.report.reuse.tokens_by_tier == {}
    assert output.report.reuse.misses["late"] >= 20 * BLOCK_SIZE
    handles[1].result(60)


def test_a_hanging_look_up_delays_no_answer(model, tier, open_engine, monkeypatch):
    wait_little(monkeypatch)
    engine, tokens, gate = open_engine(), prompt(LENGTH), Gate("contains")
    warm(engine, tokens)
    tier.fail = gate
    output = engine.submit(tokens, GREEDY).result(60)
    gate.open()
    assert list(output.token_ids) == expected(model, tokens)
    assert output.report.reuse.misses == {"unreachable": 30 * BLOCK_SIZE}


def test_what_a_tier_that_is_down_may_hold_is_neither_new_nor_evicted(model, tier, open_engine):
    engine, tokens = open_engine(), prompt(LENGTH)
    warm(engine, tokens)
    tier.fail = raises(TierUnavailable, "contains", "get")
    for _ in range(7):  # after some failures it is not asked
        output = engine.submit(tokens, GREEDY).result(60)
        assert list(output.token_ids) == expected(model, tokens)
        assert output.report.reuse.misses == {"unreachable": 30 * BLOCK_SIZE}
        engine.cache.evict_pool()
    assert engine.cache.stats().store.tiers[0].is_down


def test_what_was_loaded_and_then_went_everywhere_is_evicted(model, tier, open_engine):
    tokens, before = prompt(LENGTH), DictTier("slow")
    with open_over(model, before) as first:
        warm(first, tokens)
        tier.records = dict(before.records)
    engine = open_engine()
    warm(engine, tokens)
    tier.records.clear()
    output = engine.submit(tokens, GREEDY).result(60)
    assert output.report.reuse.misses == {"evicted": 30 * BLOCK_SIZE}


def test_what_was_found_wrong_is_quarantined_whoever_holds_it(model, tier, open_engine):
    engine, tokens = open_engine(), prompt(LENGTH)
    warm(engine, tokens)
    num_records, blocks = len(tier.records), engine.cache.blocks
    whole = np.array(tokens, dtype=np.uint32)
    blocks.quarantine(whole, "", blocks.keys(whole, ""), num_kept=10)
    output = engine.submit(tokens, GREEDY).result(60)
    assert list(output.token_ids) == expected(model, tokens)
    assert len(tier.records) == num_records
    assert output.report.reuse.misses == {"quarantined": 20 * BLOCK_SIZE}


@pytest.mark.parametrize("missing", [[0], [20], [3, 4, 17, 29]], ids=str)
def test_what_lies_behind_a_missing_block_is_loaded_unless_windows_need_it(
    model, tier, open_engine, missing
):
    engine, tokens = open_engine(), prompt(LENGTH)
    warm(engine, tokens)
    for keys in engine.cache.blocks.keys(np.array(tokens, dtype=np.uint32), ""):
        for number in missing:
            del tier.records[keys[number].block_hash]
    output = engine.submit(tokens, GREEDY).result(60)
    assert list(output.token_ids) == expected(model, tokens)
    reuse, has_windows = output.report.reuse, len(engine.cache.blocks.device.windows) > 1
    num_loaded = missing[0] if has_windows else 30 - len(missing)
    assert reuse.tokens_by_tier.get("slow", 0) == num_loaded * BLOCK_SIZE
    num_cut_off = 30 - missing[0] - len(missing) if has_windows else 0
    assert reuse.misses["evicted"] == len(missing) * BLOCK_SIZE
    assert reuse.misses.get("window", 0) == num_cut_off * BLOCK_SIZE


@pytest.mark.parametrize("num_first", [0, 15])
def test_what_lies_before_a_lost_block_is_said_to_be_cut_off_by_windows(
    model, tier, open_engine, num_first
):
    """Be it that it came in vain, or that another tier was not asked for it any more."""
    first_tier = DictTier("first") if num_first else None
    engine, tokens, number = open_engine(first_tier=first_tier), prompt(LENGTH), 20
    warm(engine, tokens)
    for keys in engine.cache.blocks.keys(np.array(tokens, dtype=np.uint32), ""):
        for key in keys[num_first:] if num_first else ():
            del first_tier.records[key.block_hash]
        damaged = bytearray(tier.records[keys[number].block_hash])
        damaged[-100] ^= 1
        tier.records[keys[number].block_hash] = bytes(damaged)
    output = engine.submit(tokens, GREEDY).result(60)
    assert list(output.token_ids) == expected(model, tokens)
    has_windows = len(engine.cache.blocks.device.windows) > 1
    cut_off = {"window": number * BLOCK_SIZE} if has_windows else {}
    assert output.report.reuse.misses == {"lost": BLOCK_SIZE, **cut_off}


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
        assert loop.changed.wait_for(lambda: loop.restorer._num_loading == 0, 30)
    assert len(learnt) == 1


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
def test_the_policy_to_load_loads_what_one_pass_would_compute(tier, open_engine):
    engine, tokens = open_engine(max_batch_tokens=512), prompt(5 * BLOCK_SIZE + 5)
    warm(engine, tokens)
    report = engine.submit(tokens, GREEDY).result(60).report
    assert report.plan == "load"


def test_a_tier_that_writes_slowly_holds_up_only_who_needs_its_blocks(
    model, tier, open_engine, monkeypatch
):
    engine, gate, has_no_room = (
        open_engine(max_batch_tokens=256),
        Gate("contains"),
        threading.Event(),
    )

    def hold_writer(call):
        if threading.current_thread().name == "prefixstore-writer":
            gate(call)

    tier.fail = hold_writer
    engine.submit(prompt(3 * LENGTH), GREEDY).result(60)
    watch(monkeypatch, engine._loop.scheduler, "_give_way", lambda *_: has_no_room.set())
    tokens = prompt(3 * LENGTH, 1)
    try:
        waiting = engine.submit(tokens, GREEDY)
        assert has_no_room.wait(30)
        # The lock that submit, cancel and stats take.
        assert engine._loop.changed.acquire(timeout=5), "the engine waits under its lock"
        engine._loop.changed.release()
        assert not waiting.is_finished
    finally:
        gate.open()
    assert list(waiting.result(60).token_ids) == expected(model, tokens)


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
