"""Prompts that arrive together: none is made slow by what others compute beside their loads."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from fleet_simulation import BLOCK_BYTES, SIZE, Fleet, FleetWorld, Prompt, mean_ttft_s

from prefixstore.planner import Contention, LoadAhead, PrefillEstimate, TierEstimate, front_budget

MODEL = PrefillEstimate(pass_s=2e-3, token_s=2e-4, pair_s=2e-4 / 16384)

# (prompts, mean gap between them in times of the faster end, tokens in the tier, tokens after them)
CROWDS = [
    (2, 0.0, 512, 32),
    (4, 0.0, 8192, 64),
    (6, 0.0, 512, 32),
    (16, 0.0, 2048, 192),
    (24, 0.6, 512, 32),
    (24, 1.2, 2048, 192),
]


def world(num_prefix: int, ratio: float, sharing: float = 1.0, hangs: bool = False) -> FleetWorld:
    """The tier gives such a prefix `ratio` times as fast as the model computes it."""
    computed_s = MODEL.seconds(num_prefix, 0, 576)
    num_bytes = num_prefix // SIZE * BLOCK_BYTES
    return FleetWorld(MODEL, TierEstimate(1e-3, num_bytes * ratio / computed_s), sharing, hangs)


def crowd(ratio: float, num: int, gap: float, num_prefix: int, num_tail: int) -> list[Prompt]:
    gap_s = gap * MODEL.seconds(num_prefix, 0, 576) / max(1.0, ratio)
    rng, now, prompts = random.Random(1), 0.0, []
    for _ in range(num):
        prompts.append(Prompt(now, num_prefix, num_tail))
        now += rng.expovariate(1 / gap_s) if gap else 0.0
    return prompts


def ends(here: FleetWorld, prompts: list[Prompt], takes_turns: bool) -> list[float]:
    """Loading all, and computing all."""
    return [mean_ttft_s(here, prompts, policy, takes_turns) for policy in ("load", "recompute")]


@pytest.mark.parametrize("size", CROWDS, ids=str)
def test_takes_no_longer_than_the_better_end(size):
    for ratio in (0.3, 1.0, 3.0, 10.0, 30.0):
        prompts, here = crowd(ratio, *size), world(size[2], ratio)
        planned = mean_ttft_s(here, prompts)
        assert planned <= 1.03 * min(ends(here, prompts, takes_turns=False)), ratio
        assert planned <= 1.1 * min(ends(here, prompts, takes_turns=True)), ratio


@pytest.mark.parametrize("size", CROWDS, ids=str)
def test_learns_that_calls_do_not_disturb_each_other(size):
    for ratio in (0.3, 3.0, 10.0):
        prompts, here = crowd(ratio, *size), world(size[2], ratio, sharing=0.0)
        both = ends(here, prompts, takes_turns=False)
        assert mean_ttft_s(here, prompts) <= 1.2 * min(both), (ratio, both)


@pytest.mark.parametrize("sharing", [1.0, 0.5, 0.0])
def test_turns_of_calls_save_time_where_these_share_a_link(sharing):
    shares = {}
    for size in CROWDS:
        for ratio in (1.0, 10.0):
            prompts, here = crowd(ratio, *size), world(size[2], ratio, sharing)
            in_turns, at_once = (mean_ttft_s(here, prompts, takes_turns=own) for own in (1, 0))
            shares[size, ratio] = in_turns / at_once
    mean, worst = {1.0: (0.85, 1.02), 0.5: (0.97, 1.1), 0.0: (1.01, 1.02)}[sharing]
    assert statistics.geometric_mean(shares.values()) <= mean, shares
    assert max(shares.values()) <= worst, shares


@pytest.mark.parametrize("ratio", [1.0, 10.0, 30.0])
def test_short_loads_do_not_wait_for_long_ones_nor_these_for_ever(ratio):
    here, short_s = world(2048, ratio), MODEL.seconds(512, 0, 576) / ratio
    for gap in (2, 4):
        prompts = [Prompt(number * gap * short_s, 512, 32) for number in range(40)]
        prompts.append(Prompt(0.0, 32768, 32))
        *short, long = Fleet(here, "load").run(prompts)
        # What each would have of the link if all calls were made at once.
        *short_at_once, long_at_once = Fleet(here, "load", takes_turns=False).run(prompts)
        assert statistics.mean(short) <= 1.3 * statistics.mean(short_at_once), gap
        assert long <= 1.1 * long_at_once, gap


@pytest.mark.parametrize("size", CROWDS[:4], ids=str)
def test_a_tier_that_hangs_costs_a_crowd_little_more_than_one_prompt(size):
    for ratio in (1.0, 3.0, 30.0):
        prompts, here = crowd(ratio, *size), world(size[2], ratio, hangs=True)
        planned, computed = (mean_ttft_s(here, prompts, own) for own in ("planned", "recompute"))
        assert planned <= 1.75 * computed, ratio


# ---- the parts ---------------------------------------------------------------------------------


def test_calls_side_by_side_are_counted():
    contention = Contention("link", sharing=0.5)
    first = contention.begin(1.0)
    assert (first.longest, first.tier_s, first.num_beside(1.0), first.num_beside(3.0)) == (
        1,
        1,
        0,
        0,
    )
    second = contention.begin(2.0)
    assert first.longest == second.longest == 1.5
    assert first.tier_s == 1.5 / 2
    assert first.num_beside(3.0) == 0.5 and second.num_beside(3.0) == 1.0
    contention.end(first, 4.0)
    assert second.longest == 1.5, "it was one of two once"
    assert second.num_beside(6.0) == 0.5 and second.mean_factor(6.0) == 1.25
    assert contention.num_calls == 1
    third = contention.begin(6.0)
    assert third.num_beside(7.0) == 1.0
    assert second.tier == "link" and third.began == 6.0


def load(load_s: float, tokens: int = 1024, ratio: float = 0.1, on_time: bool = True) -> LoadAhead:
    """A front token takes 1 ms to compute, and `ratio` times as long to load."""
    return LoadAhead(load_s, 64, tokens, ratio * tokens * 1e-3, tokens * 1e-3, 0.01, on_time)


def test_a_front_yields_to_those_it_would_hold_up():
    # 8 loads of 1 s, and each saved token is worth 4.5 times its own load: 0.45 s of computing.
    assert front_budget([load(1.0)] * 8, 0, 0) == (450 - 10) // 64 * 64
    assert front_budget([load(1.0)] * 8, 0, 100) == (450 - 10 - 100) // 64 * 64
    assert front_budget([load(0.1)] * 8, 0, 0) == 0
    assert front_budget([load(1.0)] * 8, 1, 0) == 0, "it delays one by more than it saves eight"
    assert front_budget([load(1.0, ratio=0.5)] * 8, 1, 0) == (1250 - 10) // 64 * 64
    assert front_budget([load(1.0)] * 7 + [load(9.0, tokens=0)], 0, 0) == (900 - 10) // 64 * 64


def test_a_front_alone_yields_to_nobody():
    assert front_budget([load(1e-3)], 0, 0) == math.inf
    assert front_budget([], 5, 100) == math.inf
    assert front_budget([load(1e-3, tokens=0)] * 3, 5, 100) == math.inf


def test_fronts_do_not_wait_for_loads_that_are_late():
    assert front_budget([load(1e-3, on_time=False)] * 3, 1, 100) == math.inf
    assert front_budget([load(1e-3, on_time=False)] * 3 + [load(1e-3)], 1, 100) == 0
