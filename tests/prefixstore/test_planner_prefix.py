"""Plans of who loads a prefix before anything is computed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import FAST, SLOW, inputs_of_few_runs

from prefixstore.planner import PlanInputs, PlanMode, Planner, PlannerConfig
from prefixstore.planner.prefix import plan_prefix

NUM_BLOCKS = 32
BLOCK_BYTES = 1 << 20


def obvious_loads_s(inputs: PlanInputs, end: int) -> float:
    """Seconds to load up to `end`, block by block; infinity where that cannot be."""
    tiers = inputs.tiers[:end].tolist()
    if -1 in tiers:
        return math.inf
    latency_s = sum(inputs.estimates[tier].latency_s for tier in set(tiers))
    sizes = zip(tiers, inputs.record_bytes.tolist(), strict=False)
    seconds = latency_s + sum(size / inputs.estimates[tier].bytes_per_s for tier, size in sizes)
    return seconds if seconds <= inputs.deadline_s else math.inf


def tail_s(inputs: PlanInputs, end: int) -> float:
    context = (inputs.num_device_blocks + end) * inputs.block_size
    return inputs.prefill.seconds(inputs.num_tokens - context, context, 1 << 30)


@given(inputs_of_few_runs(), st.integers(1, 10**7))
@settings(max_examples=300, deadline=None)
def test_finds_the_fastest_of_all_ends(inputs: PlanInputs, block_bytes: int) -> None:
    inputs = dataclasses.replace(
        inputs,
        record_bytes=np.full(len(inputs.tiers), block_bytes),
        has_windows=True,
        chunk_tokens=1 << 30,
        slowdown=1.0,
    )
    plan = plan_prefix(inputs)
    ends = range(len(inputs.tiers) + 1)
    best_s = min(obvious_loads_s(inputs, end) + tail_s(inputs, end) for end in ends)
    recompute_s = tail_s(inputs, 0)
    if recompute_s - best_s <= max(inputs.margin_s, inputs.margin_ratio * recompute_s):
        assert plan.num_load_blocks == 0 and plan.predicted_s == pytest.approx(recompute_s)
        assert plan.mode in (PlanMode.NONE, PlanMode.RECOMPUTE)
        return
    assert plan.mode == PlanMode.LOAD and plan.num_compute_blocks == 0
    assert plan.predicted_s == pytest.approx(best_s)
    end = plan.num_load_blocks
    assert obvious_loads_s(inputs, end) + tail_s(inputs, end) == pytest.approx(best_s)
    # A load that never comes costs no more than computing its blocks, or a thread's delay.
    patience_s = max(recompute_s - tail_s(inputs, end), 0.02)
    assert plan.load_deadline_s == pytest.approx(min(patience_s, inputs.deadline_s))


def a_planner(**settings: object) -> Planner:
    """Of one that knows two tiers, and nothing of its model."""
    planner = Planner(["fast", "slow"], 64, 1 << 30, config=PlannerConfig(**settings))
    for name, tier in (("fast", FAST), ("slow", SLOW)):
        for i in range(5):
            planner.observe_load(name, 32 << 20, 32, tier.seconds(32 << 20), float(i))
    return planner


def knowing(planner: Planner, token_s: float) -> Planner:
    for _ in range(3):
        planner.observe_prefill(NUM_BLOCKS * 64, 0, NUM_BLOCKS * 64 * token_s)
    return planner


def plan(planner: Planner, now: float = 5.0, num_fast: int = 0, **options: float):
    tiers = ["fast"] * num_fast + ["slow"] * (NUM_BLOCKS - num_fast)
    sizes = [BLOCK_BYTES] * NUM_BLOCKS
    return planner.plan_prefix(NUM_BLOCKS * 64 + 1, 0, tiers, sizes, now, **options)


def test_a_guess_of_the_model_keeps_nothing_from_being_loaded() -> None:
    planner = a_planner()
    # By the guess alone computing takes 0.4 s and loading 0.17 s: twelve times as much looks slow.
    sizes = [12 * BLOCK_BYTES] * NUM_BLOCKS
    tiers = ["slow"] * NUM_BLOCKS

    def mode() -> PlanMode:
        return planner.plan_prefix(NUM_BLOCKS * 64 + 1, 0, tiers, sizes, 5.0).mode

    assert mode() == PlanMode.LOAD
    for _ in range(20):  # passes over a few tokens say next to nothing of a long one
        planner.observe_prefill(8, 0, 4e-3)
    assert mode() == PlanMode.LOAD
    assert knowing(planner, 2e-4) and mode() == PlanMode.RECOMPUTE


def test_only_what_is_worth_it_is_loaded() -> None:
    planner = knowing(a_planner(), 1e-5)
    assert plan(planner, num_fast=20).num_load_blocks == 20
    assert plan(planner, num_fast=0).mode == PlanMode.RECOMPUTE


def test_as_much_is_loaded_as_comes_until_the_deadline() -> None:
    planner = knowing(a_planner(), 1e-3)
    whole = plan(planner)
    assert whole.num_load_blocks == NUM_BLOCKS
    part = plan(planner, deadline_s=(whole.predicted_s) / 2)
    assert 0 < part.num_load_blocks < NUM_BLOCKS


def test_a_tier_that_is_left_out_is_measured_again_after_a_time() -> None:
    planner = knowing(a_planner(probe_interval_s=10.0), 1e-5)
    probes = [plan(planner, now=5.0 + i).probe for i in range(22)]
    assert [i for i, probe in enumerate(probes) if probe] == [9, 19]
    assert probes[9] == range(NUM_BLOCKS - 4, NUM_BLOCKS)


@pytest.mark.parametrize(("policy", "num_loaded"), [("load", NUM_BLOCKS), ("recompute", 0)])
def test_a_policy_stands_whatever_is_believed(policy: str, num_loaded: int) -> None:
    planner = a_planner(policy=policy)
    for token_s in (1e-6, 1.0):
        knowing(planner, token_s)
        assert plan(planner, deadline_s=1e-3).num_load_blocks == num_loaded


def test_a_prefill_that_was_never_measured_may_take_long() -> None:
    planner = Planner(["disk"], 64, 1 << 30)
    assert planner.slowest_prefill_s(2048, 0) > 10 * planner.prefill_s(2048, 0)
    knowing(planner, 1e-3)
    assert planner.slowest_prefill_s(2048, 0) == planner.prefill_s(2048, 0)
    assert (
        Planner(["disk"], 64, 512, config=PlannerConfig(policy="load")).slowest_prefill_s(1, 0)
        > 1e5
    )
