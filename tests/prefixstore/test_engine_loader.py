"""Calls of several prompts' loads: how many at once, and what one that hangs does to the others."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time

import pytest
from cached_models import BLOCK_SIZE
from engines import GREEDY, expected, prompt
from failing_tiers import Gate
from restoring_engines import LENGTH, warm

from prefixstore.engine.load_call import LoadCall
from prefixstore.planner import Meeting


def teach(engine, sharing: float) -> None:
    """Have the planner measure calls that share their tier so much."""
    planner = engine._loop.planner
    for number in range(40):
        num_beside = number % 2 * 3
        seconds = 1e-3 * (1 + sharing * num_beside)
        planner.observe_load("slow", 1 << 16, 8, seconds, time.monotonic(), num_beside=num_beside)
    known = planner.tiers()["slow"]
    assert known.sharing == pytest.approx(sharing, abs=0.1)


@pytest.mark.parametrize("sharing", [1.0, 0.0])
def test_as_many_calls_are_made_at_once_as_pay_off(model, open_engine, monkeypatch, sharing):
    engine, prompts = open_engine(), [prompt(LENGTH, seed) for seed in range(3)]
    for tokens in prompts:
        warm(engine, tokens)
    teach(engine, sharing)
    monkeypatch.setattr(Meeting, "call_left_s", lambda self, now: 0.0)  # never late
    run, all_began, nums = LoadCall.run, threading.Barrier(3), []

    def watched(self, *args):
        with engine._loop.changed:
            nums.append(engine._loop.loader._calls.num_calls)
        if sharing:
            time.sleep(0.05)  # others would begin
        else:
            all_began.wait(30)
        return run(self, *args)

    monkeypatch.setattr(LoadCall, "run", watched)
    handles = [engine.submit(tokens, GREEDY) for tokens in prompts]
    for handle, tokens in zip(handles, prompts, strict=True):
        output = handle.result(60)
        assert list(output.token_ids) == expected(model, tokens)
        assert output.report.reuse.tokens_by_tier["slow"] == 30 * BLOCK_SIZE
    assert len(nums) == 3 and max(nums) == (1 if sharing else 3)


@pytest.mark.usefixtures("waits_for_look_ups")
def test_a_call_that_hangs_does_not_keep_others_from_loading(model, tier, open_engine):
    engine = open_engine(num_loaders=2, restore_policy="planned")
    prompts = [prompt(LENGTH, seed) for seed in range(2)]
    for tokens in prompts:
        warm(engine, tokens)
    teach(engine, 1.0)
    gate = Gate("get")
    tier.fail = gate
    first = engine.submit(prompts[0], GREEDY)
    assert gate.entered.wait(30)
    tier.fail = lambda call: None
    second = engine.submit(prompts[1], GREEDY).result(60)
    assert second.report.reuse.tokens_by_tier.get("slow"), "nothing was loaded"
    assert list(second.token_ids) == expected(model, prompts[1])
    assert list(first.result(60).token_ids) == expected(model, prompts[0])  # computed
    gate.open()


def test_what_a_fault_of_the_loader_keeps_from_coming_is_computed(
    model, open_engine, monkeypatch, caplog
):
    engine, prompts = open_engine(), [prompt(LENGTH, seed) for seed in range(3)]
    for tokens in prompts:
        warm(engine, tokens)
    run, num_calls = LoadCall.run, iter(range(100))

    def fail_once(self, *args):
        if next(num_calls) == 0:
            raise RuntimeError("a bug")
        return run(self, *args)

    monkeypatch.setattr(LoadCall, "run", fail_once)
    with caplog.at_level(logging.ERROR):
        handles = [engine.submit(tokens, GREEDY) for tokens in prompts]
        outputs = [handle.result(60) for handle in handles]
    assert "loading blocks failed" in caplog.text and "a bug" in caplog.text
    for output, tokens in zip(outputs, prompts, strict=True):
        assert list(output.token_ids) == expected(model, tokens)
    loaded = sorted(output.report.reuse.tokens_by_tier.get("slow", 0) for output in outputs)
    assert loaded[0] < loaded[1] == loaded[2]


def test_prompts_are_computed_where_no_thread_can_be_started(
    model, open_engine, monkeypatch, caplog
):
    engine, tokens = open_engine(restore_policy="planned"), prompt(LENGTH)
    warm(engine, tokens)
    teach(engine, 1.0)

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(engine._loop.loader._threads, "submit", refuse)
    output = engine.submit(tokens, GREEDY).result(60)
    assert list(output.token_ids) == expected(model, tokens)
    assert output.report.reuse.tokens_by_tier == {}
    assert caplog.text.count("no thread to load blocks: can't start new thread") == 1
    monkeypatch.undo()
    engine.cache.evict_pool()
    assert list(engine.submit(tokens, GREEDY).result(60).token_ids) == expected(model, tokens)


def test_a_request_that_is_cancelled_while_it_waits_for_its_turn_loads_nothing(
    model, tier, open_engine, monkeypatch
):
    engine, prompts = open_engine(), [prompt(LENGTH, seed) for seed in range(2)]
    for tokens in prompts:
        warm(engine, tokens)
    teach(engine, 1.0)
    monkeypatch.setattr(Meeting, "call_left_s", lambda self, now: 0.0)  # never late
    gate, run, calls = Gate("get"), LoadCall.run, []

    def watched(self, *args):
        calls.append(self)
        return run(self, *args)

    monkeypatch.setattr(LoadCall, "run", watched)
    tier.fail = gate
    first = engine.submit(prompts[0], GREEDY)
    assert gate.entered.wait(30)
    second = engine.submit(prompts[1], GREEDY)
    loop = engine._loop
    with loop.changed:
        assert loop.changed.wait_for(lambda: len(loop.loader._loads) == 2, 30)
    second.cancel()
    second.result(60)
    gate.open()
    assert list(first.result(60).token_ids) == expected(model, prompts[0])
    with loop.changed:
        assert loop.changed.wait_for(lambda: not loop.loader._loads, 30)
    assert len(calls) == 1


def test_a_prompt_waits_for_one_with_its_prefix_whose_load_waits_for_its_turn(
    model, tier, open_engine, monkeypatch
):
    engine, others, tokens = open_engine(), prompt(LENGTH, 1), prompt(LENGTH)
    for one in (tokens, others):
        warm(engine, one)
    teach(engine, 1.0)
    monkeypatch.setattr(Meeting, "call_left_s", lambda self, now: 0.0)  # never late
    # Nor does anything of a pass pay off for them.
    monkeypatch.setattr("prefixstore.engine.prefill_turns.front_budget", lambda *_: 0)
    gate, loop = Gate("get"), engine._loop
    tier.fail = gate
    handles = [engine.submit(others, GREEDY)]
    assert gate.entered.wait(30)
    handles.append(engine.submit(tokens, GREEDY))
    with loop.changed:
        assert loop.changed.wait_for(lambda: len(loop.loader._loads) == 2, 30)
    handles.append(engine.submit(tokens, GREEDY))
    # Many passes in which neither has a turn.
    engine.submit(prompt(20, 2), dataclasses.replace(GREEDY, max_tokens=30)).result(60)
    with loop.changed:
        assert loop.scheduler.num_waiting == 1
    gate.open()
    first, second, third = (handle.result(60) for handle in handles)
    assert list(first.token_ids) == expected(model, others)
    assert list(second.token_ids) == list(third.token_ids) == expected(model, tokens)
    assert second.report.reuse.tokens_by_tier == {"slow": 30 * BLOCK_SIZE}
    assert third.report.reuse.tokens_by_tier == {"device": 30 * BLOCK_SIZE}
