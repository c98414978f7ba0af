"""Who runs and who waits, while others hold places, blocks or the tokens of a pass."""

import time

from cached_models import BLOCK_SIZE
from dict_tier import DictTier
from engines import GREEDY, open_engine, open_over, prompt
from failing_tiers import Gate

from prefixstore.engine import SamplingParams

LONG = SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True)


def count_calls(monkeypatch, owner, name):
    """A list that grows with each call of a method."""
    method, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def wait_until(is_so):
    for _ in range(3000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("expected it within 30 s")


def test_the_engine_sleeps_when_who_found_no_room_has_left(model, monkeypatch):
    tier, gate = DictTier("slow"), Gate("get")
    tokens = prompt(30 * BLOCK_SIZE + 5)
    with open_over(model, tier, restore_policy="load") as engine:
        scheduler = engine._loop.scheduler
        engine.submit(tokens, GREEDY).result(60)
        assert engine.cache.flush()
        engine.cache.evict_pool()
        tier.fail = gate
        handles = [engine.submit(tokens, GREEDY)]
        assert gate.entered.wait(30)
        too_long = engine.submit(prompt(120 * BLOCK_SIZE, 1), GREEDY)
        wait_until(lambda: scheduler.retry_at is not None)
        too_long.cancel()
        too_long.result(60)
        handles.append(engine.submit(tokens[:300] + prompt(20, 2), GREEDY))
        wait_until(lambda: scheduler.num_waiting == 1)  # for what the first begins with
        calls = count_calls(monkeypatch, scheduler, "admit")
        time.sleep(0.5)
        num_calls = len(calls)
        gate.open()
        for handle in handles:
            handle.result(60)
    assert num_calls <= 2


def test_who_waits_for_a_place_costs_nothing(model, monkeypatch):
    with open_engine(model, max_running=1) as engine:
        running = engine.submit(prompt(40), LONG)
        next(iter(running))
        calls = count_calls(monkeypatch, engine._loop.scheduler, "_producing")
        waiting, num_steps = engine.submit(prompt(50, 1), GREEDY), engine.stats().num_steps
        wait_until(lambda: engine.stats().num_steps > num_steps + 10)
        num_calls = len(calls)
        running.cancel()
        waiting.result(60)
    assert num_calls == 0
