"""Planned restores are never slower: in simulated time, at every speed of tier and model.

Bounds are on the time to first token over the better of computing all and loading all, both at the
true speeds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
from planner_simulation import World, load_s, one_tier, recompute_s, simulate

from prefixstore.planner import PlanInputs, PlanMode, PrefillEstimate, TierEstimate, plan_restore

GB_PER_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
LATENCIES_MS = (0.05, 0.5, 5, 50)
TOKENS_PER_S = (500, 2000, 8000, 20_000, 50_000)
NUM_TOKENS = (256, 512, 1024, 2048, 4096, 7168, 32_768)
CELLS = list(itertools.product(GB_PER_S, LATENCIES_MS, TOKENS_PER_S, NUM_TOKENS))

MIB = 1 << 20


def speeds(gb_per_s: float, latency_ms: float, tokens_per_s: float) -> World:
    """Speeds: attention costs as much as all else at 16k tokens, a pass as much as 6 tokens."""
    return World(
        PrefillEstimate(6 / tokens_per_s, 1 / tokens_per_s, 1 / tokens_per_s / 16384),
        TierEstimate(latency_ms * 1e-3, gb_per_s * 1e9, spread=0.1),
    )


def restores(
    *,
    tier_error: float = 1.0,
    model_error: float = 1.0,
    slowdown: float = 1.0,
    believed_slowdown: float | None = None,
    block_bytes: int = MIB,
    is_layered: bool = False,
) -> Iterator[tuple[PlanInputs, World]]:
    """Cells: believed and true speeds. An error of 2 means believed to be twice as slow.

    All cells if beliefs are right and nothing else is varied, else every third one. After the
    prefix come 32 tokens, or 256 if they may be computed beside the last load.
    """
    is_plain = (tier_error, model_error, slowdown, block_bytes, is_layered) == (1, 1, 1, MIB, False)
    for gb_per_s, latency_ms, tokens_per_s, num_tokens in CELLS[:: 1 if is_plain else 3]:
        world = speeds(gb_per_s, latency_ms, tokens_per_s)
        world.slowdown = slowdown
        tier, model = world.tier, world.prefill
        believed = TierEstimate(
            tier.latency_s * tier_error, tier.bytes_per_s / tier_error, spread=0.1
        )
        believed_model = PrefillEstimate(
            model.pass_s * model_error, model.token_s * model_error, model.pair_s * model_error
        )
        inputs = one_tier(
            num_tokens,
            believed,
            believed_model,
            block_bytes=block_bytes,
            slowdown=slowdown if believed_slowdown is None else believed_slowdown,
            num_tail=256 if is_layered else 32,
            is_layered=is_layered,
        )
        yield inputs, world


def ratio(inputs: PlanInputs, world: World) -> float:
    run = simulate(plan_restore(inputs), world)
    return run.ttft_s / min(recompute_s(inputs, world), load_s(inputs, world))


@pytest.mark.parametrize("slowdown", [1.0, 1.4, 2.0])
@pytest.mark.parametrize("block_bytes", [MIB // 16, MIB, 8 * MIB])
def test_is_never_slower_where_estimates_are_right(block_bytes: int, slowdown: float) -> None:
    ratios = [ratio(*one) for one in restores(block_bytes=block_bytes, slowdown=slowdown)]
    assert max(ratios) <= 1.05
    # At the crossing both ends together take about half the time; less where each slows the other.
    assert min(ratios) <= {1.0: 0.5, 1.4: 0.7, 2.0: 1.0}[slowdown]


@pytest.mark.parametrize(("slowdown", "best"), [(1.0, 0.75), (1.4, 0.85), (2.0, 1.0)])
def test_computes_beside_the_last_layers_where_that_is_faster(slowdown: float, best: float) -> None:
    ratios = []
    for inputs, world in restores(slowdown=slowdown, is_layered=True):
        plan = plan_restore(inputs)
        whole_blocks = dataclasses.replace(inputs, is_layered=[False])
        seconds = simulate(plan, world).ttft_s
        ratios.append(seconds / simulate(plan_restore(whole_blocks), world).ttft_s)
        # The restore may beat the plan, as the meeting point adapts to what is left.
        assert seconds <= 1.03 * plan.predicted_s
        if plan.mode == PlanMode.LOAD and plan.num_load_blocks == len(inputs.tiers):
            # A plan counts the full cost of steps, though a longer pass may hide some of it.
            assert seconds >= 0.88 * plan.predicted_s
    assert max(ratios) <= 1.03
    assert min(ratios) <= best


def test_meets_in_the_middle_where_loading_and_computing_are_as_fast() -> None:
    world = speeds(1, 0.5, 2000)
    for num_tokens in NUM_TOKENS:
        computed_s = recompute_s(one_tier(num_tokens, world.tier, world.prefill), world)
        even = TierEstimate(5e-4, num_tokens // 64 * MIB / computed_s, spread=0.1)
        assert (
            ratio(one_tier(num_tokens, even, world.prefill), World(world.prefill, even)) <= 1 / 1.5
        )


@pytest.mark.parametrize("is_layered", [False, True])
@pytest.mark.parametrize(
    ("tier_error", "model_error", "bound"),
    [(2, 1, 2.0), (0.5, 1, 2.0), (1, 2, 2.0), (1, 0.5, 2.0), (2, 0.5, 3.5), (0.5, 2, 3.5)],
)
def test_loses_little_where_estimates_are_wrong_by_two(
    tier_error: float, model_error: float, bound: float, is_layered: bool
) -> None:
    """One wrong estimate costs less than its error; two opposite ones less than theirs together."""
    cells = restores(tier_error=tier_error, model_error=model_error, is_layered=is_layered)
    assert max(ratio(*one) for one in cells) <= bound


@pytest.mark.parametrize(("believed", "bound"), [(1.0, 2.0), (2.0, 1.05)])
def test_loses_little_where_the_slowdown_is_wrong(believed: float, bound: float) -> None:
    cells = restores(slowdown=1.5, believed_slowdown=believed)
    assert max(ratio(*one) for one in cells) <= bound


@pytest.mark.parametrize(
    ("slowdown", "is_layered", "bound"),
    [(1.0, False, 1.6), (1.4, False, 2.25), (1.0, True, 1.9), (1.4, True, 2.25)],
)
def test_a_tier_that_never_answers_costs_about_as_much_as_computing_again(
    slowdown: float, is_layered: bool, bound: float
) -> None:
    for inputs, world in restores(slowdown=slowdown, is_layered=is_layered):
        world.load_speed = lambda now: 0.0
        run = simulate(plan_restore(inputs), world)
        assert run.ttft_s <= bound * recompute_s(inputs, world)
        assert run.loaded.sum() == 0


CHANGES: dict[str, Callable[[float, float], tuple[float, float]]] = {
    # (time, half of the predicted time) -> speed of the model, of the tier
    "the tier stalls": lambda now, half: (1.0, 1.0 if now < half else 0.0),
    "the tier slows down": lambda now, half: (1.0, 1.0 if now < half else 0.2),
    "the tier speeds up": lambda now, half: (1.0, 1.0 if now < half else 5.0),
    "the model slows down": lambda now, half: (1.0 if now < half else 0.2, 1.0),
    "the model speeds up": lambda now, half: (1.0 if now < half else 5.0, 1.0),
}


def seconds_for(work_s: float, speed: Callable[[float], float], half: float, start: float) -> float:
    """Seconds for work that begins at `start`, if `speed` changes at `half`."""
    before = min(work_s, max(0.0, half - start) * speed(0.0))
    left, later = work_s - before, speed(half)
    return before / speed(0.0) + (left / later if left and later else math.inf if left else 0.0)


@pytest.mark.parametrize("change", CHANGES)
def test_loses_little_where_speeds_change_halfway(change: str) -> None:
    for inputs, world in restores():
        plan = plan_restore(inputs)
        half = plan.predicted_s / 2
        world.compute_speed = lambda now, half=half: CHANGES[change](now, half)[0]
        world.load_speed = lambda now, half=half: CHANGES[change](now, half)[1]
        run = simulate(plan, world, step_s=half / 2)
        tail_s = plan.costs.tail_s(len(inputs.tiers))
        loaded_s = seconds_for(load_s(inputs, world) - tail_s, world.load_speed, half, 0.0)
        tail_s = seconds_for(tail_s, world.compute_speed, half, loaded_s)
        computed_s = seconds_for(recompute_s(inputs, world), world.compute_speed, half, 0.0)
        # A pass that has begun is finished, at any speed.
        pass_s = world.prefill.seconds(512, inputs.num_tokens, 512) / world.compute_speed(half)
        assert run.ttft_s <= 2.0 * min(computed_s, loaded_s + tail_s) + pass_s
