"""Rates are learnt from few noisy measurements, and learnt again when speeds change."""

from __future__ import annotations

import numpy as np
import pytest

from prefixstore.planner.rates import (
    PRIOR_BYTES_PER_S,
    PRIOR_LATENCY_S,
    PrefillEstimate,
    PrefillRate,
    Slowdown,
    TierEstimate,
    TierRate,
)

MB = 10**6
SIZES = (1 * MB, 4 * MB, 16 * MB, 64 * MB, 256 * MB)
TIERS = [
    TierEstimate(5e-5, 5e10),
    TierEstimate(1e-4, 2e9),
    TierEstimate(5e-3, 1e9),
    TierEstimate(5e-2, 1e7),
    TierEstimate(5e-2, 2e10),
]
MODELS = [
    PrefillEstimate(1e-2, 2e-3, 5e-7),  # 500 tokens a second, two cores
    PrefillEstimate(1e-2, 2e-5, 1e-9),  # 50,000, a large GPU
    PrefillEstimate(1e-3, 1e-4, 0.0),  # no attention to speak of
]


def feed(
    rate: TierRate, tier: TierEstimate, sizes: tuple[int, ...], num: int, start: float = 0.0
) -> None:
    """Observe calls a second apart, each off by about 10 %."""
    random = np.random.default_rng(num)
    for i in range(num):
        num_bytes = sizes[i % len(sizes)]
        seconds = tier.seconds(num_bytes) * float(np.exp(0.1 * random.normal()))
        rate.observe(num_bytes, seconds, 1 + num_bytes // MB, start + i)


def worst_error(rate: TierRate, tier: TierEstimate, sizes: tuple[int, ...] = SIZES) -> float:
    """Largest factor between predicted and true seconds."""
    known = rate.snapshot()
    factors = [known.seconds(size) / tier.seconds(size) for size in sizes]
    return max(max(factors), 1 / min(factors))


@pytest.mark.parametrize("tier", TIERS, ids=str)
def test_tells_latency_from_bandwidth(tier: TierEstimate) -> None:
    rate = TierRate()
    feed(rate, tier, SIZES, 30)
    assert worst_error(rate, tier) < 1.3
    assert rate.snapshot().spread < 0.25
    assert rate.snapshot().num_calls == 30
    assert rate.snapshot().observed_at == 29.0


@pytest.mark.parametrize("tier", TIERS, ids=str)
@pytest.mark.parametrize("size", [MB, 64 * MB])
def test_one_measurement_is_enough_for_calls_like_it(tier: TierEstimate, size: int) -> None:
    rate = TierRate()
    rate.observe(size, tier.seconds(size), 1, 0.0)
    assert worst_error(rate, tier, (size,)) < 2.5


def test_is_sensible_before_the_first_measurement() -> None:
    known = TierRate().snapshot()
    assert known.num_calls == 0
    assert known.latency_s == pytest.approx(PRIOR_LATENCY_S)
    assert known.bytes_per_s == pytest.approx(PRIOR_BYTES_PER_S)
    assert known.observed_at is None


@pytest.mark.parametrize("factor", [0.01, 0.1, 10, 100])
def test_believes_a_change_within_a_few_calls(factor: float) -> None:
    before = TierEstimate(1e-3, 1e9)
    after = TierEstimate(1e-3 / factor, 1e9 * factor)
    rate = TierRate()
    feed(rate, before, SIZES, 50)
    feed(rate, after, SIZES, 6, start=50.0)
    assert worst_error(rate, after) < 2


def test_does_not_believe_one_stall() -> None:
    tier = TierEstimate(1e-3, 1e9)
    rate = TierRate()
    feed(rate, tier, SIZES, 50)
    rate.observe(4 * MB, 5.0, 4, 50.0)
    assert worst_error(rate, tier) < 2


def test_after_a_pause_a_single_call_is_believed() -> None:
    """After a pause a single call is believed that would have counted as an outlier before."""
    soon, late = TierRate(), TierRate()
    faster = TierEstimate(1e-4, 1e10)
    for rate, pause_s in ((soon, 0.0), (late, 600.0)):
        feed(rate, TierEstimate(1e-3, 1e9), SIZES, 50)
        rate.observe(16 * MB, faster.seconds(16 * MB), 16, 50.0 + pause_s)
    assert worst_error(late, faster, (16 * MB,)) < 1.5
    assert worst_error(soon, faster, (16 * MB,)) > 2


def test_long_calls_are_not_forgotten_over_short_ones() -> None:
    tier = TierEstimate(1e-3, 1e8)
    rate = TierRate()
    feed(rate, tier, SIZES, 30)
    feed(rate, tier, (1000,), 200, start=30.0)
    assert worst_error(rate, tier) < 2


def test_a_call_that_was_given_up_makes_the_tier_slower_never_faster() -> None:
    rate = TierRate()
    feed(rate, TierEstimate(1e-3, 1e9), SIZES, 20)
    before = rate.snapshot()
    rate.observe_given_up(64 * MB, 1e-3, 20.0)
    assert rate.snapshot().seconds(64 * MB) == before.seconds(64 * MB)
    for i in range(3):
        rate.observe_given_up(64 * MB, 2.0, 21.0 + i)
    assert 2.0 < rate.snapshot().seconds(64 * MB) < 4.0


def prefill(rate: PrefillRate, model: PrefillEstimate, num_tokens: int, seed: int) -> None:
    """Observe a prompt in chunks; one pass of twenty is slow, as on a busy machine."""
    random = np.random.default_rng(seed)
    for context in range(0, num_tokens, 512):
        num_new = min(512, num_tokens - context)
        seconds = model.seconds(num_new, context, 512) * float(np.exp(0.05 * random.normal()))
        rate.observe(num_new, context, seconds * (5 if random.random() < 0.05 else 1))


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_learns_what_prompts_cost(model: PrefillEstimate) -> None:
    rate = PrefillRate()
    for seed, num_tokens in enumerate([300, 4000, 7000, 1000, 90, 6000, 30, 2000] * 2):
        prefill(rate, model, num_tokens, seed)
    known = rate.snapshot()
    for num_tokens in (256, 1024, 7168):
        assert known.seconds(num_tokens, 0, 512) == pytest.approx(
            model.seconds(num_tokens, 0, 512), rel=0.25
        )
    assert known.seconds(64, 6000, 512) == pytest.approx(model.seconds(64, 6000, 512), rel=0.5)
    assert known.spread < 0.5


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_one_cold_prompt_is_enough_for_prompts_like_it(model: PrefillEstimate) -> None:
    rate = PrefillRate()
    prefill(rate, model, 4096, 1)
    assert rate.snapshot().seconds(4096, 0, 512) == pytest.approx(
        model.seconds(4096, 0, 512), rel=0.25
    )


def test_short_tails_do_not_wipe_out_what_long_chunks_cost() -> None:
    model = PrefillEstimate(4e-2, 2e-4, 1e-8)
    rate = PrefillRate()
    for seed in range(4):
        prefill(rate, model, 7168, seed)
    for _ in range(300):
        rate.observe(8, 7168, model.seconds(8, 7168, 512))
    assert rate.snapshot().seconds(7168, 0, 512) == pytest.approx(
        model.seconds(7168, 0, 512), rel=0.25
    )


def test_follows_a_machine_that_becomes_slower() -> None:
    rate = PrefillRate()
    prefill(rate, MODELS[0], 7168, 1)
    slower = PrefillEstimate(5e-2, 1e-2, 2.5e-6)
    for _ in range(6):
        rate.observe(512, 1024, slower.seconds(512, 1024, 512))
    assert rate.snapshot().seconds(512, 1024, 512) == pytest.approx(
        slower.seconds(512, 1024, 512), rel=0.25
    )


@pytest.mark.parametrize("num_new", [1, 511, 512, 513, 5000])
@pytest.mark.parametrize("context", [0, 7, 4096])
def test_a_prefill_costs_what_its_chunks_cost(num_new: int, context: int) -> None:
    model = MODELS[0]
    chunks = [
        model.seconds(min(512, num_new - done), context + done, 512)
        for done in range(0, num_new, 512)
    ]
    assert model.seconds(num_new, context, 512) == pytest.approx(sum(chunks))


def test_learns_how_much_a_load_slows_computing() -> None:
    slowdown = Slowdown()
    for _ in range(30):
        slowdown.observe(0.1, 0.15)
    assert slowdown.factor == pytest.approx(1.5, rel=0.01)
    for _ in range(60):
        slowdown.observe(0.1, 0.09)  # noise: nothing makes computing faster
    assert slowdown.factor == pytest.approx(1.0, rel=0.01)


def test_does_not_believe_one_slow_pass_beside_a_load() -> None:
    slowdown = Slowdown()
    for _ in range(5):
        slowdown.observe(0.1, 5.0)
        slowdown.observe(0.1, 0.11)
    assert slowdown.factor == pytest.approx(1.1, rel=0.01)
    slowdown.observe(0.1, 0.3)
    slowdown.observe(0.1, 0.3)
    assert slowdown.factor > 1.3


def test_a_slowdown_that_is_not_measured_is_forgotten() -> None:
    slowdown = Slowdown()
    for i in range(20):
        slowdown.observe(0.1, 0.3)
        slowdown.age(float(i))
    assert slowdown.factor > 2.5
    slowdown.age(1200.0)
    assert 1.1 < slowdown.factor < 2
    slowdown.age(12000.0)
    assert slowdown.factor == pytest.approx(1.1, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0, 1, 0.0), "num_bytes: expected more than 0, got 0"),
        ((1, 0.0, 1, 0.0), "seconds: expected more than 0, got 0.0"),
        ((1, 1.0, 0, 0.0), "num_records: expected more than 0, got 0"),
    ],
)
def test_refuses_calls_that_measure_nothing(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TierRate().observe(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1.0), "num_new: expected more than 0, got 0"),
        ((1, -1, 1.0), "context: expected 0 or more, got -1"),
        ((1, 0, float("nan")), "seconds: expected more than 0, got nan"),
    ],
)
def test_refuses_passes_that_measure_nothing(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefillRate().observe(*arguments)


@pytest.mark.parametrize("sharing", [0.0, 0.4, 1.0])
def test_tells_how_much_calls_disturb_each_other(sharing: float) -> None:
    rate, tier = TierRate(), TierEstimate(1e-3, 1e9)
    for i in range(120):
        num_beside = (0, 3, 1)[i % 3]
        seconds = tier.seconds(16 * MB) * (1 + sharing * num_beside)
        rate.observe(16 * MB, seconds, 16, float(i), num_beside)
    known = rate.snapshot()
    assert known.sharing == pytest.approx(sharing, abs=0.15)
    assert known.seconds(16 * MB) == pytest.approx(tier.seconds(16 * MB), rel=0.15)


@pytest.mark.parametrize("sharing", [0.0, 0.5, 1.0])
def test_one_call_among_others_tells_a_known_tier_from_a_shared_one(sharing: float) -> None:
    rate, tier = TierRate(), TierEstimate(1e-3, 1e9)
    feed(rate, tier, (MB, 16 * MB), 30)
    before = rate.snapshot()
    rate.observe(16 * MB, tier.seconds(16 * MB) * (1 + 3 * sharing), 16, 30.0, 3.0)
    after = rate.snapshot()
    assert after.sharing == pytest.approx(sharing, abs=0.25)
    assert after.seconds(16 * MB) == pytest.approx(before.seconds(16 * MB), rel=0.2)


def test_calls_of_an_unknown_tier_are_taken_to_share_it() -> None:
    rate = TierRate()
    assert rate.snapshot().sharing == 1.0
    for i in range(20):
        rate.observe(16 * MB, 0.4, 16, float(i), 3.0)
    assert rate.snapshot().seconds(16 * MB) == pytest.approx(0.1, rel=0.2)


def test_a_call_among_others_is_given_up_later() -> None:
    rate = TierRate()
    feed(rate, TierEstimate(1e-3, 1e9), (16 * MB,), 10)
    before = rate.snapshot().seconds(16 * MB)
    rate.observe_given_up(16 * MB, 0.03, 10.0, 3.0)
    assert rate.snapshot().seconds(16 * MB) == before
    rate.observe_given_up(16 * MB, 0.03, 10.0)
    assert rate.snapshot().seconds(16 * MB) > before


def test_refuses_fewer_than_no_calls_beside() -> None:
    with pytest.raises(ValueError, match="num_beside: expected 0 or more, got -1"):
        TierRate().observe(MB, 1.0, 1, 0.0, -1)
    with pytest.raises(ValueError, match="num_beside: expected 0 or more, got -1"):
        TierRate().observe_given_up(MB, 1.0, 0.0, -1)
