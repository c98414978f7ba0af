"""Which requests run and wait while others hold places, blocks or the tokens of a pass."""

import time

import pytest
from cached_models import BLOCK_SIZE
from dict_tier import DictTier
from engines import GREEDY, expected, open_engine, open_over, prompt
from failing_tiers import Gate

from prefixstore.engine import SamplingParams

LONG = SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True)


def count_calls(monkeypatch, owner, name):
    """A list that gets an entry with each call of a method."""
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
        wait_until(lambda: scheduler.num_waiting == 1)  # for the prefix that the first computes
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


@pytest.mark.parametrize("tenants", ["ab", "aa"])
def test_a_short_prompt_does_not_wait_for_a_long_one(model, tenants):
    long, short = prompt(1900), prompt(20, 1)
    with open_engine(model, max_batch_tokens=40) as engine:
        with engine._loop.changed:  # so that they are admitted together
            handles = [
                engine.submit(tokens, GREEDY, tenant=tenant)
                for tokens, tenant in zip((long, short), tenants, strict=True)
            ]
        outputs = [handle.result(60) for handle in handles]
        ended = [report.reuse.num_prompt_tokens for report in engine.recent()]
    assert list(outputs[1].token_ids) == expected(model, short)
    assert list(outputs[0].token_ids) == expected(model, long)
    assert ended == [20, 1900]


def test_a_long_prompt_is_computed_while_short_ones_of_many_tenants_keep_coming(model):
    """Each pass has room for chunks of only two tenants."""
    with open_engine(model, max_batch_tokens=64, memory_bytes=0) as engine:
        with engine._loop.changed:
            handles = [engine.submit(prompt(600), GREEDY, tenant="long")]
            for number in range(100):
                tokens = prompt(60, 1 + number)
                handles.append(engine.submit(tokens, GREEDY, tenant=f"short {number % 5}"))
        handles[0].result(60)
        num_left = sum(not handle.is_finished for handle in handles)
        for handle in handles:
            handle.result(60)
    # Tenants have equal shares: when the long one is done, so are about half of the others.
    assert num_left >= 30


def test_every_pass_is_full_while_prompts_are_left(model, monkeypatch):
    with open_engine(model, max_batch_tokens=40, memory_bytes=0) as engine:
        scheduler, sums = engine._loop.scheduler, []
        next_steps = scheduler.next_steps

        def watched(now):
            steps = next_steps(now)
            left = sum(one.num_tokens - one.num_computed for one in scheduler.running)
            sums.append((sum(step.stop - step.start for step in steps), min(left, 40)))
            return steps

        monkeypatch.setattr(scheduler, "next_steps", watched)
        with engine._loop.changed:
            handles = [
                engine.submit(prompt(length, seed), GREEDY, tenant=tenant)
                for seed, (tenant, length) in enumerate([("a", 300), ("b", 50), ("a", 70)])
            ]
        for handle in handles:
            handle.result(60)
    assert [num_tokens for num_tokens, most in sums if num_tokens < most - BLOCK_SIZE] == []


def test_who_waited_for_a_common_prefix_does_not_go_before_other_tenants(model):
    prefix = prompt(200)
    with open_engine(model, max_running=2, memory_bytes=0) as engine:
        with engine._loop.changed:
            handles = [
                engine.submit(prefix + prompt(20, 1 + number), GREEDY, tenant="busy")
                for number in range(12)
            ]
        handles[0].result(60)
        num_before = len(engine.recent())
        engine.submit(prompt(30, 99), GREEDY, tenant="calm", request_id="calm").result(60)
        done = [report.request_id for report in engine.recent()]
        for handle in handles:
            handle.result(60)
    # Two that run by then, and one whose turn was before.
    assert done.index("calm") <= num_before + 3


def test_nobody_waits_for_a_prompt_that_gets_no_turn(model):
    """A tenant's prompt that is neither its oldest nor its shortest is computed last."""
    prefix = prompt(32, 1)
    long = [prompt(1500, 2), prefix + prompt(1500, 3), prompt(1400, 4)]
    short = prefix + prompt(20, 5)
    with open_engine(model, pool_tokens=8192, memory_bytes=0) as engine:
        with engine._loop.changed:
            handles = [engine.submit(tokens, GREEDY, tenant="busy") for tokens in long]
            engine._loop.scheduler.admit(time.monotonic())
            calm = engine.submit(short, GREEDY, tenant="calm")
        assert list(calm.result(60).token_ids) == expected(model, short)
        assert not any(handle.is_finished for handle in handles)
