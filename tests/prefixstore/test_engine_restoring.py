"""Restoring prompts from tiers: late answers, slow and hanging tiers, what is learnt."""

import threading

import numpy as np
import pytest
from cached_models import BLOCK_SIZE
from dict_tier import DictTier, raises
from engines import GREEDY, expected, open_over, prompt
from failing_tiers import Gate
from restoring_engines import LENGTH, warm, watch

from prefixstore.engine.restorer import Restorer
from prefixstore.errors import TierUnavailable


def wait_little(monkeypatch):
    """Make the engine wait only 20 ms for look-ups."""
    monkeypatch.setattr(Restorer, "look_up_until", lambda self, restoring: restoring.began + 0.02)


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
    watch(monkeypatch, restorer, "_look_up_and_plan", lambda *_: has_answer.set())
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
    late, has_answer, is_over = Gate("contains"), threading.Event(), threading.Event()
    restorer = engine._loop.restorer
    engine._loop.loader._threads.submit(is_over.wait, 60)  # another's load has the only thread

    def let_answer(_, args, __):
        if args[0][0].stop >= 2 * BLOCK_SIZE:
            late.open()
            assert has_answer.wait(30)

    watch(monkeypatch, restorer, "_look_up", lambda *_: has_answer.set())
    watch(monkeypatch, engine._loop.runner, "run", let_answer)
    tier.fail = late
    output = engine.submit(tokens, GREEDY).result(20)
    assert not is_over.is_set()
    is_over.set()
    assert list(output.token_ids) == expected(model, tokens)
    assert output.report.reuse.tokens_by_tier == {}
    assert output.report.reuse.misses["late"] >= 20 * BLOCK_SIZE


def test_a_look_up_does_not_wait_for_the_loads_of_others(model, tier, open_engine, monkeypatch):
    engine, prompts = open_engine(num_loaders=1), [prompt(LENGTH), prompt(LENGTH, 1)]
    for tokens in prompts:
        warm(engine, tokens)
    gate, num_answers = Gate("get"), threading.Semaphore(0)
    watch(monkeypatch, engine._loop.restorer, "_look_up", lambda *_: num_answers.release())
    tier.fail = gate
    handles = [engine.submit(prompts[0], GREEDY)]
    assert gate.entered.wait(30) and num_answers.acquire(timeout=30)
    handles.append(engine.submit(prompts[1], GREEDY))
    has_answer = num_answers.acquire(timeout=30)  # while the first load has the only thread
    gate.open()
    assert has_answer
    for handle, tokens in zip(handles, prompts, strict=True):
        output = handle.result(60)
        assert list(output.token_ids) == expected(model, tokens)
        assert output.report.reuse.tokens_by_tier == {"slow": 30 * BLOCK_SIZE}


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
