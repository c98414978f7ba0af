"""A planner over many requests: it explores, learns, and counts its errors."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from planner_simulation import Run, World, load_s, recompute_s, simulate

from prefixstore.planner import (
    Meeting,
    PlanMode,
    Planner,
    PlannerConfig,
    PrefillEstimate,
    RestorePlan,
    TierEstimate,
)

MODEL = PrefillEstimate(pass_s=5e-3, token_s=2e-4, pair_s=1e-8)
SLOW = TierEstimate(latency_s=5e-2, bytes_per_s=1e7)
FAST = TierEstimate(latency_s=1e-4, bytes_per_s=5e9)
NUM_BLOCKS = 64
BLOCK_BYTES = 1 << 20


def serve(planner: Planner, world: World, now: float) -> tuple[RestorePlan, Run]:
    """Serve one request, and report its measurements to the planner."""
    plan = planner.plan(
        NUM_BLOCKS * 64 + 32, 0, ["disk"] * NUM_BLOCKS, [BLOCK_BYTES] * NUM_BLOCKS, now
    )
    run = simulate(plan, world)
    for chunk in run.chunks:
        if chunk.beside_s in (0.0, pytest.approx(chunk.took_s)):
            planner.observe_prefill(
                len(chunk.what), chunk.what.start, chunk.took_s, is_loading=chunk.beside_s > 0
            )
    for call in run.calls:
        num_bytes, is_computing = len(call.what) * BLOCK_BYTES, call.beside_s > call.took_s / 2
        planner.observe_load(
            *("disk", num_bytes, len(call.what), call.took_s, now + call.ended_at),
            is_computing=is_computing,
        )
    if run.given_up is not None and run.given_up.took_s > 0:
        num_bytes = len(run.given_up.what) * BLOCK_BYTES
        planner.observe_given_up("disk", num_bytes, run.given_up.took_s, now + run.ttft_s)
    planner.finished(plan, run.ttft_s, run.meeting.counts())
    return plan, run


def a_planner(**settings: float) -> Planner:
    return Planner(["disk"], 64, 512, config=PlannerConfig(**settings))


def test_a_new_tier_is_tried_and_found_out() -> None:
    for tier in (FAST, SLOW):
        planner, world = a_planner(), World(MODEL, tier)
        ratios = []
        for i in range(8):
            plan, run = serve(planner, world, float(i))
            inputs = plan.costs.inputs
            ratios.append(run.ttft_s / min(recompute_s(inputs, world), load_s(inputs, world)))
        assert max(ratios) <= 2.5
        assert max(ratios[4:]) <= 1.15


def test_a_slow_tier_costs_next_to_nothing_for_ever_after() -> None:
    planner = a_planner()
    world = World(MODEL, dataclasses.replace(SLOW, bytes_per_s=1e5), slowdown=1.3)
    runs = [serve(planner, world, float(i)) for i in range(100)]
    ideal_s = recompute_s(runs[0][0].costs.inputs, world)
    assert sum(run.ttft_s for _, run in runs[5:]) <= 1.05 * 95 * ideal_s
    assert all(plan.mode == PlanMode.RECOMPUTE for plan, _ in runs[5:])
    assert 5 <= sum(plan.is_probe for plan, _ in runs) <= 11  # one probe every ten seconds


def test_a_tier_that_is_fast_again_is_used_again_within_a_probe() -> None:
    planner = a_planner(probe_interval_s=10.0)
    for i in range(30):
        serve(planner, World(MODEL, SLOW), float(i))
    modes = [serve(planner, World(MODEL, FAST), 30.0 + i)[0].mode for i in range(30)]
    assert modes[0] != PlanMode.LOAD
    assert modes[14:] == [PlanMode.LOAD] * 16


@pytest.mark.parametrize("tiers", [["memory", "disk"], ["disk", "memory"]], ids=str)
def test_a_tier_is_found_again_beside_one_that_is_worth_loading(tiers: list[str]) -> None:
    planner, held = (
        Planner(["memory", "disk"], 64, 512),
        [name for name in tiers for _ in range(16)],
    )
    for context in range(0, 4096, 512):
        planner.observe_prefill(512, context, MODEL.seconds(512, context, 512))
    for i in range(3):
        planner.observe_load(
            "memory", 16 * BLOCK_BYTES, 16, FAST.seconds(16 * BLOCK_BYTES), float(i)
        )
        planner.observe_given_up("disk", 16 * BLOCK_BYTES, 30.0, float(i))
    plans = []
    for i in range(30):
        plan = planner.plan(32 * 64 + 32, 0, held, [BLOCK_BYTES] * 32, 3.0 + i)
        plans.append(plan)
        first = plan.num_compute_blocks
        for blocks in (range(first, first + plan.num_load_blocks), plan.probe):
            for name, number in (("memory", 0), ("disk", 1)):
                num_bytes = sum(plan.costs.tiers[blocks] == number) * BLOCK_BYTES
                if num_bytes:
                    planner.observe_load(name, num_bytes, 1, FAST.seconds(num_bytes), 3.0 + i)
    assert plans[0].num_load_blocks == 16 and not plans[0].is_probe
    assert sum(plan.is_probe for plan in plans) <= 3
    assert all(plan.num_load_blocks == 32 for plan in plans[-8:])


def test_a_dead_tier_is_given_up_and_then_left_alone() -> None:
    planner = a_planner()
    for i in range(5):
        serve(planner, World(MODEL, FAST), float(i))
    dead = World(MODEL, FAST, load_speed=lambda now: 0.0)
    runs = [serve(planner, dead, 5.0 + i) for i in range(30)]
    ideal_s = recompute_s(runs[0][0].costs.inputs, dead)
    assert runs[0][0].mode == PlanMode.LOAD
    assert all(run.ttft_s <= 2.25 * ideal_s for _, run in runs)
    assert all(plan.mode == PlanMode.RECOMPUTE for plan, _ in runs[20:])
    assert planner.stats().num_given_up >= 1


def a_planner_of_even_speeds(slowdown: float = 1.1, load_s: float = 1.0) -> tuple[Planner, World]:
    """A planner that has learnt the model's speed, and a tier that is about as fast."""
    planner, even = a_planner(), TierEstimate(1e-3, NUM_BLOCKS * BLOCK_BYTES / load_s)
    for context in range(0, 4096, 512):
        planner.observe_prefill(512, context, MODEL.seconds(512, context, 512))
    return planner, World(MODEL, even, slowdown=slowdown)


def test_learns_how_much_loading_slows_computing() -> None:
    planner, world = a_planner_of_even_speeds(slowdown=1.4)
    for i in range(40):
        serve(planner, world, float(i))
    assert planner.stats().slowdown == pytest.approx(1.4, rel=0.1)


def test_both_is_done_again_after_a_time_in_which_loading_slowed_computing() -> None:
    planner, world = a_planner_of_even_speeds(load_s=1.3)
    for i in range(20):
        serve(planner, world, float(i))
    for _ in range(6):  # another process took the cores
        planner.observe_prefill(512, 0, 5 * MODEL.seconds(512, 0, 512), is_loading=True)
    assert planner.stats().slowdown > 2
    modes = [serve(planner, world, 20.0 + 120 * i)[0].mode for i in range(30)]
    assert modes[0] != PlanMode.BOTH
    assert modes[20:] == [PlanMode.BOTH] * 10
    assert planner.stats().slowdown == pytest.approx(1.1, rel=0.1)


def test_to_try_both_again_where_it_gains_nothing_costs_little() -> None:
    planner, world = a_planner_of_even_speeds(slowdown=3.0)
    runs = [serve(planner, world, 60.0 * i) for i in range(60)]
    inputs = runs[0][0].costs.inputs
    best_s = min(recompute_s(inputs, world), load_s(inputs, world))
    assert sum(run.ttft_s for _, run in runs[10:]) <= 1.1 * 50 * best_s


def test_predicts_what_a_prompt_costs_in_chunks() -> None:
    planner = a_planner()
    for context in range(0, 8192, 512):
        planner.observe_prefill(512, context, MODEL.seconds(512, context, 512))
    assert planner.prefill_s(4096, 512) == pytest.approx(MODEL.seconds(4096, 512, 512), rel=0.1)


def test_counts_what_was_chosen_and_how_right_it_was() -> None:
    planner = a_planner()
    runs = [serve(planner, World(MODEL, FAST), float(i)) for i in range(20)]
    stats = planner.stats()
    load = stats.modes["load"]
    chosen = [(plan, run) for plan, run in runs if plan.mode == PlanMode.LOAD]
    errors = sorted(abs(run.ttft_s / plan.predicted_s - 1) for plan, run in chosen)
    assert load.num_plans == load.num_finished == len(chosen) > 10
    assert load.predicted_s == pytest.approx(sum(plan.predicted_s for plan, _ in chosen))
    assert load.measured_s == pytest.approx(sum(run.ttft_s for _, run in chosen))
    assert load.saved_s == pytest.approx(sum(p.recompute_s - r.ttft_s for p, r in chosen))
    assert load.mean_error == pytest.approx(np.mean(errors))
    assert load.p50_error == pytest.approx(errors[math.ceil(len(errors) / 2) - 1])
    assert load.p90_error == pytest.approx(errors[math.ceil(len(errors) * 0.9) - 1])
    assert stats.loaded_blocks == sum(int(run.loaded.sum()) for _, run in runs)
    assert stats.loaded_blocks + stats.computed_blocks == 20 * (NUM_BLOCKS + 1)
    assert sum(mode.num_plans for mode in stats.modes.values()) == 20
    assert stats.tiers["disk"].num_bytes == stats.loaded_blocks * BLOCK_BYTES


def test_says_nothing_of_modes_that_were_not_chosen() -> None:
    stats = a_planner().stats()
    assert set(stats.modes) == {"none", "recompute", "load", "both"}
    assert all(math.isnan(mode.mean_error) for mode in stats.modes.values())
    assert stats.num_probes == stats.num_given_up == 0


def test_a_prompt_that_no_tier_knows_is_computed() -> None:
    planner = a_planner()
    for tiers in ([], [None, None]):
        plan = planner.plan(200, 0, tiers, [0] * len(tiers), 0.0)
        assert plan.mode == PlanMode.NONE
        assert math.isinf(plan.load_s)
        meeting = Meeting(plan)
        assert meeting.next_call(0.0) is None
        assert meeting.next_chunk(0.0) == range(200)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.plan(200, 0, ["tape"], [1], 0.0), "tiers: expected names of .*'tape'"),
        (lambda p: p.observe_load("tape", 1, 1, 1.0, 0.0), "tier: expected one of .*'tape'"),
        (lambda p: p.observe_given_up("tape", 1, 1.0, 0.0), "tier: expected one of .*'tape'"),
        (
            lambda p: p.finished(p.plan(9, 0, [], [], 0.0), -1.0, None),
            "measured_s: expected 0 or more, got -1.0",
        ),
        (lambda p: PlannerConfig(margin_s=-1), "margin_s: expected 0 or more, got -1"),
        (lambda p: PlannerConfig(probe_blocks=0), "probe_blocks: expected 1 or more, got 0"),
    ],
)
def test_refuses_what_it_does_not_know(ask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(a_planner())


def test_a_tier_is_not_probed_again_while_a_probe_is_out() -> None:
    planner = Planner(["disk"], 64, 512, config=PlannerConfig(margin_ratio=1.0))
    ask = (640, 0, ["disk"] * 8, [BLOCK_BYTES] * 8)
    assert [planner.plan(*ask, now).is_probe for now in (0.0, 9.0, 11.0)] == [True, False, True]


@pytest.mark.parametrize("num_blocks", [1, NUM_BLOCKS])
def test_the_policy_load_loads_whatever_it_costs(num_blocks):
    planner = Planner(("disk",), 64, 1 << 20, config=PlannerConfig(policy="load"))
    planner.observe_load("disk", 1, 1, 10.0, now=0.0)  # far slower than computing
    plan = planner.plan(NUM_BLOCKS * 64 + 32, 0, ["disk"] * num_blocks, [1] * num_blocks, 1.0)
    assert plan.mode == PlanMode.LOAD
    assert plan.num_load_blocks == num_blocks
    assert planner.prefill_s(64, 0) > 1e6  # so it does not stop waiting for look-ups either
