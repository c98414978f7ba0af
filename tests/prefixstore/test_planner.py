"""The plan: the exact minimum over all splits, and when nothing is loaded."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_simulation import one_tier

from prefixstore.planner import (
    PlanInputs,
    PlanMode,
    PrefillEstimate,
    RestorePlan,
    TierEstimate,
    plan_restore,
)

FAST = TierEstimate(latency_s=1e-4, bytes_per_s=10e9)
SLOW = TierEstimate(latency_s=1e-2, bytes_per_s=2e8)
MODEL = PrefillEstimate(pass_s=5e-3, token_s=1e-4, pair_s=1e-8)


def obvious_seconds(inputs: PlanInputs, first: int, end: int) -> float:
    """Seconds to compute `first` blocks, load up to `end` and compute the rest, block by block."""
    size, start = inputs.block_size, inputs.num_device_blocks * inputs.block_size
    tiers = inputs.tiers.tolist()
    front = inputs.prefill.seconds(first * size, start, inputs.chunk_tokens)
    load, missing = 0.0, 0.0
    for i in range(first, end):
        if tiers[i] < 0:
            missing += inputs.prefill.seconds(size, start + i * size, size)
            continue
        tier = inputs.estimates[tiers[i]]
        is_last_of_call = i == len(tiers) - 1 or tiers[i] != tiers[i + 1]
        load += inputs.record_bytes[i] / tier.bytes_per_s + is_last_of_call * tier.latency_s
    if inputs.slowdown * load > inputs.deadline_s:
        return math.inf
    context = start + end * size
    tail = inputs.prefill.seconds(inputs.num_tokens - context, context, inputs.chunk_tokens)
    shared = inputs.slowdown * min(front, load) + abs(front - load)
    return shared + missing + tail


@st.composite
def inputs_of_few_runs(draw: st.DrawFn) -> PlanInputs:
    runs = draw(st.lists(st.tuples(st.integers(-1, 1), st.integers(1, 12)), max_size=6))
    tiers = np.array([tier for tier, length in runs for _ in range(length)], dtype=np.int64)
    num_device_blocks = draw(st.integers(0, 20))
    block_bytes = draw(st.lists(st.integers(1, 10**7), min_size=len(tiers), max_size=len(tiers)))
    return PlanInputs(
        num_tokens=(num_device_blocks + len(tiers)) * 16 + draw(st.integers(1, 100)),
        block_size=16,
        num_device_blocks=num_device_blocks,
        tiers=tiers,
        record_bytes=np.array(block_bytes, dtype=np.int64),
        estimates=[FAST, SLOW],
        prefill=MODEL,
        chunk_tokens=draw(st.sampled_from([16, 40, 512])),
        slowdown=draw(st.sampled_from([1.0, 1.3, 2.0])),
        deadline_s=draw(st.sampled_from([0.02, math.inf])),
    )


@given(inputs_of_few_runs())
@settings(max_examples=300, deadline=None)
def test_finds_the_fastest_of_all_splits(inputs: PlanInputs) -> None:
    tiers = inputs.tiers.tolist()
    num_blocks = len(tiers)
    ends = [
        i + 1
        for i in range(num_blocks)
        if tiers[i] >= 0 and (i == num_blocks - 1 or tiers[i] != tiers[i + 1])
    ]
    context = inputs.num_device_blocks * inputs.block_size
    recompute_s = inputs.prefill.seconds(inputs.num_tokens - context, context, inputs.chunk_tokens)
    best_s = min(
        (obvious_seconds(inputs, first, end) for end in ends for first in range(end)),
        default=math.inf,
    )
    plan = plan_restore(inputs)
    assert plan.recompute_s == pytest.approx(recompute_s)
    margin_s = max(inputs.margin_s, inputs.margin_ratio * recompute_s)
    if recompute_s - best_s <= margin_s:
        assert plan.mode == (PlanMode.RECOMPUTE if ends else PlanMode.NONE)
        assert plan.num_load_blocks == 0
        assert plan.predicted_s == plan.recompute_s
    else:
        assert plan.mode == (PlanMode.BOTH if plan.num_compute_blocks else PlanMode.LOAD)
        first, end = plan.num_compute_blocks, plan.num_compute_blocks + plan.num_load_blocks
        assert plan.predicted_s == pytest.approx(best_s)
        assert obvious_seconds(inputs, first, end) == pytest.approx(best_s)
    if ends:
        assert plan.load_s == pytest.approx(obvious_seconds(inputs, 0, ends[-1]))


def plan_of(tier: TierEstimate, prefill: PrefillEstimate = MODEL, **options: int) -> RestorePlan:
    return plan_restore(one_tier(4096, tier, prefill, **options))


def test_loads_all_from_a_tier_that_is_far_faster_than_computing() -> None:
    plan = plan_of(FAST)
    assert (plan.mode, plan.num_compute_blocks, plan.num_load_blocks) == (PlanMode.LOAD, 0, 64)
    assert plan.saved_s == plan.recompute_s - plan.load_s > 0.3


def test_computes_all_where_the_tier_is_far_slower() -> None:
    plan = plan_of(TierEstimate(latency_s=2.0, bytes_per_s=1e9))
    assert (plan.mode, plan.num_compute_blocks, plan.num_load_blocks) == ("recompute", 64, 0)
    assert plan.load_deadline_s == 0


def test_does_both_where_they_are_about_as_fast() -> None:
    even = TierEstimate(latency_s=1e-4, bytes_per_s=64 * (1 << 20) / plan_of(FAST).recompute_s)
    plan = plan_of(even)
    assert plan.mode == PlanMode.BOTH
    assert 24 < plan.num_compute_blocks < 48
    assert plan.predicted_s < 0.55 * min(plan.recompute_s, plan.load_s)


def test_does_one_thing_at_a_time_where_both_together_gain_nothing() -> None:
    even = TierEstimate(latency_s=1e-4, bytes_per_s=90 * (1 << 20) / plan_of(FAST).recompute_s)
    inputs = one_tier(4096, even, PrefillEstimate(5e-3, 1e-4, 0.0), slowdown=2.0)
    assert plan_restore(inputs).mode == PlanMode.LOAD


@pytest.mark.parametrize("margin", [{"margin_s": 1.0}, {"margin_ratio": 0.99}], ids=str)
def test_loads_nothing_for_a_gain_below_the_margin(margin: dict[str, float]) -> None:
    inputs = dataclasses.replace(one_tier(4096, FAST, MODEL), **margin)
    assert plan_restore(inputs).mode == PlanMode.RECOMPUTE


def test_loads_no_more_than_comes_before_the_deadline() -> None:
    inputs = dataclasses.replace(one_tier(4096, SLOW, MODEL), deadline_s=0.05)
    plan = plan_restore(inputs)
    assert plan.mode == PlanMode.BOTH
    assert plan.num_load_blocks == int((0.05 - 0.01) * 2e8 / (1 << 20))
    assert plan.load_deadline_s == 0.05


def test_loads_the_first_tiers_blocks_and_leaves_a_slow_one_behind_them() -> None:
    inputs = dataclasses.replace(
        one_tier(4096, FAST, MODEL),
        tiers=np.array([0] * 40 + [1] * 24),
        estimates=[FAST, TierEstimate(latency_s=5.0)],
    )
    plan = plan_restore(inputs)
    assert (plan.num_compute_blocks, plan.num_load_blocks) == (0, 40)


def test_blocks_behind_a_missing_one_are_of_use_only_without_windows() -> None:
    tiers = np.array([0] * 10 + [-1] + [0] * 53)
    inputs = dataclasses.replace(one_tier(4096, FAST, MODEL), tiers=tiers)
    assert plan_restore(inputs).num_load_blocks == 64
    plan = plan_restore(dataclasses.replace(inputs, has_windows=True))
    assert plan.num_compute_blocks + plan.num_load_blocks == 10


def test_gives_up_a_load_no_later_than_computing_its_blocks_takes() -> None:
    unsure = TierEstimate(latency_s=1e-2, bytes_per_s=1e9, spread=1.0)
    plan = plan_of(unsure)
    loaded_s = plan.costs.load_s(plan.num_compute_blocks, plan.costs.num_blocks)
    computed_s = plan.costs.compute_s(plan.num_compute_blocks, plan.costs.num_blocks)
    assert 1.25 * loaded_s <= plan.load_deadline_s <= max(1.25 * loaded_s, computed_s)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size: expected 1 or more, got 0"),
        ({"chunk_tokens": 0}, "chunk_tokens: expected 1 or more, got 0"),
        ({"slowdown": 0.9}, "slowdown: expected 1 or more, got 0.9"),
        ({"restore_bytes_per_s": 0}, "restore_bytes_per_s: expected more than 0, got 0"),
        ({"num_device_blocks": -1}, "num_device_blocks: expected 0 or more, got -1"),
        ({"record_bytes": np.ones(3, int)}, "record_bytes: expected 64, one for each block"),
        ({"num_tokens": 4096}, "tiers: expected at most 63 blocks, so that a token remains"),
        ({"tiers": np.full(64, 1)}, "tiers: expected -1 to 0, got 1 to 1"),
    ],
)
def test_refuses_inputs_that_disagree(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(one_tier(4096, FAST, MODEL), **change)
