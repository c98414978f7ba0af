"""Meetings: which side does which block while speeds and answers differ from the plan."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_simulation import Run, World, one_tier, recompute_s, simulate

from prefixstore.planner import (
    Contention,
    Meeting,
    PlanInputs,
    PrefillEstimate,
    TierEstimate,
    plan_restore,
)
from prefixstore.planner.overlap import layer_step_s
from prefixstore.planner.plan import PlanMode, plan_probe, unmeasured_tiers

MODEL = PrefillEstimate(pass_s=5e-3, token_s=1e-3, pair_s=1e-7)
FAST = TierEstimate(latency_s=1e-3, bytes_per_s=10e9, spread=0.1)
BESIDE = TierEstimate(latency_s=1e-3, bytes_per_s=6e7, spread=0.1)
NEVER = TierEstimate(latency_s=1e3)
EVEN = TierEstimate(latency_s=1e-3, bytes_per_s=1.5e7, spread=0.1)  # about as fast as the model


def check_once(run: Run, inputs: PlanInputs) -> None:
    """Check that every token not on the device was computed or loaded exactly once."""
    size, start = inputs.block_size, inputs.num_device_blocks * inputs.block_size
    times = run.computed + np.repeat(run.loaded, size)[: inputs.num_tokens]
    assert (times[:start] == 0).all()
    assert (times[start:] == 1).all()
    counts = run.meeting.counts()
    assert counts.num_loaded_blocks == run.loaded.sum()
    assert counts.num_computed_blocks == sum(
        bool(run.computed[i : i + size].all()) for i in range(start, inputs.num_tokens, size)
    )


@st.composite
def restores(draw: st.DrawFn) -> tuple[PlanInputs, World]:
    runs = draw(
        st.lists(st.tuples(st.sampled_from([-1, 0, 0, 0, 1]), st.integers(1, 30)), max_size=5)
    )
    tiers = np.array([tier for tier, length in runs for _ in range(length)], dtype=np.int64)
    num_device_blocks = draw(st.integers(0, 5))
    speed = st.floats(1e-3, 1e3)
    inputs = PlanInputs(
        num_tokens=(num_device_blocks + len(tiers)) * 64 + draw(st.integers(1, 200)),
        block_size=64,
        num_device_blocks=num_device_blocks,
        tiers=tiers,
        record_bytes=np.full(len(tiers), 1 << 20),
        estimates=[draw(st.sampled_from([FAST, EVEN])), NEVER],
        prefill=MODEL,
        chunk_tokens=draw(st.sampled_from([40, 64, 100, 512])),
        slowdown=draw(st.sampled_from([1.0, 1.5])),
        has_windows=draw(st.booleans()),
        is_layered=[draw(st.booleans()), False],
    )
    tier = inputs.estimates[0]
    change_at = draw(st.floats(0, 2))
    later = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))
    world = World(
        prefill=MODEL,
        tier=TierEstimate(tier.latency_s, tier.bytes_per_s * draw(speed)),
        slowdown=draw(st.sampled_from([1.0, 1.5])),
        load_speed=lambda now: 1.0 if now < change_at else later,
        missing=draw(st.frozensets(st.integers(0, 100), max_size=3)),
    )
    return inputs, world


@given(restores())
@settings(max_examples=300, deadline=None)
def test_every_token_is_computed_or_loaded_once(restore: tuple[PlanInputs, World]) -> None:
    inputs, world = restore
    plan = plan_restore(inputs)
    check_once(simulate(plan, world, step_s=0.05), inputs)
    for tier in unmeasured_tiers(plan):
        check_once(simulate(plan_probe(plan, tier, 4), world, step_s=0.05), inputs)


@pytest.mark.parametrize("num_device_blocks", [0, 7])
def test_both_sides_meet_at_a_whole_block(num_device_blocks: int) -> None:
    inputs = one_tier(4096, EVEN, MODEL, num_device_blocks=num_device_blocks)
    run = simulate(plan_restore(inputs), World(MODEL, EVEN))
    check_once(run, inputs)
    met = num_device_blocks + 64 - int(run.loaded.sum())
    assert num_device_blocks < met < num_device_blocks + 64
    assert met * 64 in [chunk.what.stop for chunk in run.chunks]
    assert run.loaded[met : num_device_blocks + 64].all()
    assert not run.meeting.counts().is_given_up


def test_asks_for_the_last_blocks_first_in_calls_that_outweigh_their_latency() -> None:
    inputs = one_tier(4096, EVEN, MODEL)
    run = simulate(plan_restore(inputs), World(MODEL, EVEN))
    calls = [call.what for call in run.calls]
    assert calls[0].stop == 64
    assert all(later.stop == sooner.start for sooner, later in itertools.pairwise(calls))
    far = TierEstimate(latency_s=5e-2, bytes_per_s=1e9)
    assert len(simulate(plan_restore(one_tier(4096, far, MODEL)), World(MODEL, far)).calls) == 1


def test_loads_more_where_the_tier_is_faster_than_thought_and_less_where_slower() -> None:
    inputs = one_tier(7168, EVEN, MODEL)
    plan = plan_restore(inputs)
    faster, slower = (
        simulate(plan, World(MODEL, TierEstimate(EVEN.latency_s, EVEN.bytes_per_s * factor)))
        for factor in (4, 0.25)
    )
    assert faster.loaded.sum() > 1.5 * plan.num_load_blocks
    assert slower.loaded.sum() < 0.7 * plan.num_load_blocks


def test_takes_blocks_back_from_a_call_that_stalls_and_cancels_it() -> None:
    inputs = one_tier(4096, FAST, MODEL)
    plan = plan_restore(inputs)
    assert plan.mode == PlanMode.LOAD
    run = simulate(plan, World(MODEL, FAST, load_speed=lambda now: 0.0))
    check_once(run, inputs)
    assert run.meeting.counts().is_given_up
    assert run.given_up is not None
    assert run.chunks[0].what.start == 0
    assert run.ttft_s < 1.2 * recompute_s(inputs, World(MODEL, FAST))


@pytest.mark.parametrize("num_called", [0, 1])
def test_does_not_wait_for_ever_for_a_call_that_nobody_begins(num_called: int) -> None:
    """There may be no free thread to load, before the first call or between two."""
    near = dataclasses.replace(FAST, latency_s=1e-5)
    inputs = one_tier(8192, near, MODEL)
    plan = plan_restore(inputs)
    assert plan.mode == PlanMode.LOAD
    meeting, now = Meeting(plan), 0.0
    if num_called:
        call = meeting.next_call(now)
        assert call is not None and call.start > 0
        now += near.seconds(len(call) << 20)
        meeting.call_done(now)
    while not meeting.is_done:
        chunk = meeting.next_chunk(now)
        if chunk is None:
            assert meeting.wake_at is not None and meeting.wake_at > now
            now = meeting.wake_at
        else:
            now += MODEL.seconds(len(chunk), chunk.start, len(chunk))
            meeting.chunk_done(now)
    assert now < 1.6 * recompute_s(inputs, World(MODEL, near))
    assert meeting.counts().is_given_up
    assert meeting.next_call(now) is None


def test_loads_what_is_left_once_a_call_begins_late() -> None:
    inputs = one_tier(1024, FAST, MODEL)
    meeting = Meeting(plan_restore(inputs))
    assert meeting.next_chunk(0.0) is None and meeting.wake_at is not None
    now = meeting.wake_at
    assert meeting.next_chunk(now) == range(64)
    assert meeting.next_call(now) == range(1, 16)
    assert meeting.call_done(now + 0.01) == list(range(1, 16))
    meeting.chunk_done(now + 0.1)
    assert meeting.next_chunk(now + 0.1) == range(1024, 1056)
    assert set(meeting.overtaken) == {0}


def test_does_not_wait_for_blocks_that_no_tier_holds() -> None:
    tiers = np.array([-1] + [0] * 15)
    inputs = dataclasses.replace(one_tier(1024, FAST, MODEL), tiers=tiers)
    meeting = Meeting(plan_restore(inputs))
    assert meeting.next_call(0.0) == range(1, 16)
    meeting.call_done(0.01)
    assert meeting.next_chunk(0.01) == range(64)  # no further call was requested yet


def test_drops_what_arrives_too_late() -> None:
    inputs = one_tier(1024, FAST, MODEL)
    meeting = Meeting(plan_restore(inputs))
    call = meeting.next_call(0.0)
    assert call == range(16)
    assert meeting.next_chunk(0.0) is None
    wake_at = meeting.wake_at
    assert wake_at is not None
    assert meeting.next_chunk(wake_at) == range(64)
    assert meeting.call_done(wake_at + 0.01) == list(range(1, 16))
    assert meeting.counts().num_dropped_blocks == 1
    meeting.chunk_done(wake_at + 0.1)
    assert meeting.next_call(wake_at + 0.1) is None
    assert meeting.next_chunk(wake_at + 0.1) == range(1024, 1056)


@pytest.mark.parametrize("has_windows", [False, True])
def test_computes_a_block_that_was_missing(has_windows: bool) -> None:
    """With a window, computing cannot begin between loaded blocks: all before it is computed."""
    inputs = one_tier(1024, FAST, MODEL, has_windows=has_windows)
    run = simulate(plan_restore(inputs), World(MODEL, FAST, missing=frozenset([5])))
    check_once(run, inputs)
    assert run.loaded.tolist()[:16] == [
        0 if i == 5 or (has_windows and i < 5) else 1 for i in range(16)
    ]


def beside_last_load(num_tail: int = 256) -> PlanInputs:
    """A prefix worth loading in one call, and a tail that takes about as long to compute."""
    return one_tier(1024, BESIDE, MODEL, num_tail=num_tail, is_layered=True)


def test_computes_what_follows_beside_the_last_load() -> None:
    inputs = beside_last_load()
    plan = plan_restore(inputs)
    run = simulate(plan, World(MODEL, BESIDE))
    check_once(run, inputs)
    assert [(call.what, call.num_steps) for call in run.calls] == [(range(16), 8)]
    assert [chunk.what for chunk in run.chunks] == [range(1024, 1280)]
    assert math.isclose(run.ttft_s, plan.predicted_s, rel_tol=0.03)
    assert run.ttft_s < 0.7 * (run.calls[0].took_s + MODEL.seconds(256, 1024, 256))


@pytest.mark.parametrize("num_missing", [1, 16])
def test_what_was_computed_beside_a_block_that_did_not_come_counts_nothing(
    num_missing: int,
) -> None:
    inputs = beside_last_load()
    run = simulate(
        plan_restore(inputs), World(MODEL, BESIDE, missing=frozenset(range(num_missing)))
    )
    check_once(run, inputs)
    assert run.voids == [range(1024, 1280)]


def test_what_is_computed_beside_a_load_that_stalls_is_given_up() -> None:
    inputs = beside_last_load()
    world = World(MODEL, BESIDE, load_speed=lambda now: 1.0 if now < 0.1 else 0.0)
    run = simulate(plan_restore(inputs), world)
    check_once(run, inputs)
    assert run.given_up is not None and run.meeting.counts().is_given_up
    assert run.ttft_s < 1.7 * recompute_s(inputs, world)


def test_who_is_not_alone_waits_until_the_layers_come_sooner_than_they_are_needed() -> None:
    inputs = beside_last_load(num_tail=100)
    meeting = Meeting(plan_restore(inputs))
    now = 0.0
    while (call := meeting.next_call(now)) is not None and meeting.num_layer_steps == 1:
        now += BESIDE.seconds(len(call) << 20)
        meeting.call_done(now)
    assert call is not None and meeting.next_chunk(now) is None
    assert meeting.next_overlapped_chunk(now, is_alone=False) is None
    wake_at = meeting.wake_at
    assert wake_at is not None
    steps_s = 7 * layer_step_s(BESIDE.latency_s, len(call))
    over_at = now + BESIDE.seconds(len(call) << 20) + steps_s
    pass_s = MODEL.seconds(100, 1024, 100)
    assert math.isclose(wake_at, over_at - pass_s * 7 / 8)
    assert meeting.next_overlapped_chunk(wake_at, is_alone=False) == range(1024, 1124)
    meeting.call_done(over_at)
    assert meeting.is_chunk_valid
    meeting.chunk_done(over_at + pass_s / 8)
    assert meeting.is_done


@pytest.mark.parametrize(
    ("bytes_per_s", "restore_bytes_per_s", "num_steps"),
    [
        (3.9e9, math.inf, 4),  # others copy and decode: all of the load can be hidden
        (3.9e9, 4e9, 1),  # the cores that compute are busy all the time
        (1e9, 4e9, 8),  # or a quarter of it
        (5e7, 4e9, 8),
    ],
)
def test_brings_layers_as_far_as_the_cores_wait_for_them(
    bytes_per_s: float, restore_bytes_per_s: float, num_steps: int
) -> None:
    tier = TierEstimate(latency_s=1e-4, bytes_per_s=bytes_per_s, spread=0.1)
    inputs = one_tier(2048, tier, MODEL, num_tail=64, is_layered=True)
    inputs = dataclasses.replace(inputs, restore_bytes_per_s=restore_bytes_per_s)
    meeting = Meeting(plan_restore(inputs))
    now = 0.0
    while (call := meeting.next_call(now)) is not None and call.start > 0:
        now += tier.seconds(len(call) << 20)
        meeting.call_done(now)
    assert call is not None and meeting.num_layer_steps == num_steps


def test_computes_the_rest_once_loading_is_stopped() -> None:
    inputs = one_tier(1024, FAST, MODEL)
    meeting = Meeting(plan_restore(inputs))
    assert meeting.next_call(0.0) is not None
    meeting.stop_loading(0.001)
    assert meeting.next_call(0.001) is None
    assert meeting.next_chunk(0.001) == range(384)
    assert meeting.counts().is_given_up


@pytest.mark.parametrize(
    ("max_tokens", "chunks"),
    [
        (2000, [1056]),
        (1056, [1056]),
        (1024, [576, 480]),  # not 1024 and 32
        (500, [384, 384, 288]),
        (48, [48] * 22),
    ],
)
def test_chunks_are_even_and_no_more_than_have_to_be(max_tokens: int, chunks: list[int]) -> None:
    meeting = Meeting(plan_restore(one_tier(1024, TierEstimate(latency_s=100.0), MODEL)))
    lengths = []
    while (chunk := meeting.next_chunk(0.0, max_tokens)) is not None:
        lengths.append(len(chunk))
        meeting.chunk_done(0.0)
    assert lengths == chunks


def test_chunks_are_no_longer_than_the_caller_has_room_for() -> None:
    inputs = one_tier(1024, TierEstimate(latency_s=100.0), MODEL)
    meeting = Meeting(plan_restore(inputs))
    assert meeting.next_chunk(0.0, max_tokens=100) == range(100)
    meeting.chunk_done(0.1)
    assert meeting.next_chunk(0.1, max_tokens=7) == range(100, 107)
    meeting.chunk_done(0.2)
    assert meeting.next_chunk(0.2) == range(107, 619)


@pytest.mark.parametrize("answers", [True, False])
def test_nobody_waits_for_a_probe(answers: bool) -> None:
    slow = TierEstimate(latency_s=20.0)
    inputs = one_tier(1024, slow, MODEL)
    plan = plan_probe(plan_restore(inputs), 0, 4)
    tier = FAST if answers else slow
    world = World(MODEL, tier)
    run = simulate(plan, world)
    check_once(run, inputs)
    assert [call.what for call in run.calls] == ([range(12, 16)] if answers else [])
    assert run.loaded.sum() == (4 if answers else 0)
    assert run.ttft_s <= recompute_s(inputs, world) + MODEL.pass_s
    assert not run.meeting.counts().is_given_up


@pytest.mark.parametrize(
    ("tiers", "calls", "num_probed"),
    [
        ([0] * 8 + [1] * 8, [range(8), range(12, 16)], 3),  # after it; one is overtaken
        ([1] * 8 + [0] * 8, [range(8, 16), range(4, 8)], 4),  # before it
    ],
)
def test_measures_a_tier_once_what_is_worth_loading_is_there(
    tiers: list[int], calls: list[range], num_probed: int
) -> None:
    inputs = one_tier(1024, FAST, MODEL, chunk_tokens=300)
    inputs = dataclasses.replace(inputs, tiers=np.array(tiers), estimates=[FAST, NEVER])
    plan = plan_restore(inputs)
    assert plan.num_load_blocks == 8 and unmeasured_tiers(plan) == [1]
    without, run = (
        simulate(plan, World(MODEL, FAST)),
        simulate(plan_probe(plan, 1, 4), World(MODEL, FAST)),
    )
    check_once(run, inputs)
    assert [call.what for call in run.calls] == calls
    assert run.loaded.sum() == 8 + num_probed
    assert run.ttft_s < without.ttft_s
    assert not run.meeting.counts().is_given_up


def test_a_call_brings_blocks_of_one_tier() -> None:
    tiers = np.array([0] * 6 + [1] * 4 + [0] * 6)
    inputs = dataclasses.replace(one_tier(1024, FAST, MODEL), tiers=tiers, estimates=[FAST, FAST])
    run = simulate(plan_restore(inputs), World(MODEL, FAST))
    assert [call.what for call in run.calls] == [range(10, 16), range(6, 10), range(6)]
    assert math.isclose(run.ttft_s, plan_restore(inputs).predicted_s)


@settings(deadline=None)
@given(restores())
def test_says_what_is_left_and_what_of_that_is_loaded(case: tuple[PlanInputs, World]) -> None:
    inputs, world = case
    meeting = Meeting(plan_restore(inputs))
    start = inputs.num_device_blocks * inputs.block_size
    there = np.arange(inputs.num_tokens) < start
    now = 0.0
    while not meeting.is_done:
        assert meeting.num_left == (~there).sum()
        following, call = meeting.next_load(), meeting.next_call(now)
        assert (meeting.call_left_s(now) is not None) == (call is not None)
        if call is not None:
            assert following is not None and following.last_block == call.stop - 1
            assert 0 < following.call_s <= following.left_s * (1 + 1e-9)
        ahead = meeting.load_ahead(now)
        assert (meeting.wake_at is not None) == (ahead is not None and ahead.is_on_time)
        if ahead is not None:
            first = -(-meeting._blocks.next_token // inputs.block_size) - inputs.num_device_blocks
            assert not ahead.front_tokens or inputs.tiers[first] >= 0
            assert ahead.front_tokens <= meeting.num_left
            assert 0 <= ahead.front_load_s <= ahead.load_s
        if (chunk := meeting.next_chunk(now)) is not None:
            meeting.chunk_done(now := now + 0.1)
            there[chunk.start : chunk.stop] = True
        elif meeting.wake_at is not None:
            now = max(now, meeting.wake_at)
        if call is not None:
            size = inputs.block_size
            for block in meeting.call_done(now := now + 0.01, world.missing & set(call)):
                there[block * size : (block + 1) * size] = True
    assert meeting.num_left == 0 and there.all()


def test_says_what_it_still_loads_until_that_is_overdue() -> None:
    inputs = one_tier(1024, BESIDE, MODEL)
    meeting = Meeting(plan_restore(inputs))
    ahead = meeting.load_ahead(0.0)
    assert (
        ahead is not None
        and ahead.is_on_time
        and ahead.front_tokens
        == 64 * (meeting._plan.num_compute_blocks + meeting._plan.num_load_blocks)
    )
    assert ahead.front_load_s == pytest.approx(ahead.load_s)
    call = meeting.next_call(0.0)
    assert call is not None
    begun = meeting.load_ahead(0.0)
    assert begun is not None and begun.load_s == pytest.approx(ahead.load_s, rel=0.1)
    assert begun.front_tokens == ahead.front_tokens - 64 * len(call)
    overdue_at = meeting.wake_at
    assert overdue_at is not None and overdue_at == pytest.approx(meeting.overdue_at(0.0))
    later = meeting.load_ahead(overdue_at / 2)
    assert later is not None and later.load_s < begun.load_s
    assert meeting.load_ahead(overdue_at) is None
    meeting.stop_loading(overdue_at)
    assert meeting.load_ahead(overdue_at) is None


def test_a_call_among_others_is_waited_for_longer() -> None:
    inputs = one_tier(1024, BESIDE, MODEL)
    meeting, contention = Meeting(plan_restore(inputs)), Contention("tier")
    assert meeting.next_call(0.0) is not None
    meeting.contend(contention.begin(0.0))
    alone_s = meeting.overdue_at(0.0)
    others = [contention.begin(0.0) for _ in range(2)]
    among_s = meeting.overdue_at(0.0)
    assert alone_s < among_s <= 3 * alone_s
    for other in others:
        contention.end(other, 0.0)
    assert meeting.overdue_at(0.0) == among_s, "it may have been the last in line"


def test_a_load_that_nobody_begins_is_not_on_time_for_ever() -> None:
    meeting = Meeting(plan_restore(one_tier(1024, BESIDE, MODEL)))
    first = meeting.load_ahead(0.0)
    assert first is not None and first.is_on_time and meeting.wake_at is not None
    late = meeting.load_ahead(meeting.wake_at + 1e-3)
    assert late is not None and not late.is_on_time and meeting.wake_at is None


def test_what_no_tier_holds_does_not_wait_for_loads() -> None:
    inputs = dataclasses.replace(one_tier(1024, BESIDE, MODEL), tiers=np.array([-1] * 4 + [0] * 12))
    meeting = Meeting(plan_restore(inputs))
    assert meeting.next_call(0.0) is not None
    ahead = meeting.load_ahead(0.0)
    assert ahead is not None and ahead.front_tokens == 0 and ahead.load_s > 0
    assert meeting.next_chunk(0.0, 256) == range(256)
    meeting.chunk_done(0.01)
    ahead = meeting.load_ahead(0.01)
    assert ahead is not None and ahead.front_tokens > 0
