"""How long look-ups are worth being waited for."""

from __future__ import annotations

import pytest

from prefixstore.planner import LookUpEstimate, Planner
from prefixstore.planner.look_ups import LookUpRate


def learnt(*look_ups: tuple[float, float]) -> LookUpRate:
    rate = LookUpRate()
    for seconds, saved_share in look_ups:
        rate.observe(seconds, saved_share)
    return rate


def test_nothing_is_expected_of_look_ups_at_first():
    assert LookUpRate().snapshot() == LookUpEstimate(None, 0.0)
    assert LookUpRate().snapshot().patience_s(100.0) == 0.0


def test_waits_twice_the_usual_time_where_that_pays_off():
    known = learnt(*[(0.06, 0.9)] * 20).snapshot()
    assert known.seconds == pytest.approx(0.06)
    assert known.saved_share == pytest.approx(0.9, abs=0.01)
    assert known.patience_s(1.0) == pytest.approx(0.12)
    assert known.patience_s(0.1) == pytest.approx(0.09, abs=0.001)  # what it is worth
    assert known.patience_s(0.06) == 0.0  # it is over too late


def test_answers_without_hits_are_not_waited_for():
    rate = learnt(*[(0.06, 0.9)] * 10)
    for _ in range(8):
        rate.observe(0.06, 0.0)
    assert rate.snapshot().patience_s(1.0) == 0.0


def test_look_ups_that_hang_are_soon_not_waited_for():
    rate, waited_s = learnt(*[(0.06, 0.9)] * 10), []
    while patience_s := rate.snapshot().patience_s(1.0):
        waited_s.append(patience_s)
        rate.observe_left()
    assert len(waited_s) <= 8 and sum(waited_s) <= 1.0


def test_one_answer_that_came_too_late_is_enough_to_wait_for_the_next():
    rate = LookUpRate()
    rate.observe_left()
    rate.observe(0.06, 0.8)
    assert rate.snapshot().patience_s(1.0) > 0.06
    # And so is every second one.
    for _ in range(20):
        rate.observe_left()
        rate.observe(0.06, 0.8)
    assert rate.snapshot().patience_s(1.0) > 0.06


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 0.5), "seconds: expected 0 or more, got -1.0"),
        ((float("nan"), 0.5), "seconds: expected 0 or more, got nan"),
        ((1.0, 1.1), "saved_share: expected 0 to 1, got 1.1"),
    ],
)
def test_refuses_what_is_no_look_up(arguments, message):
    with pytest.raises(ValueError, match=message):
        LookUpRate().observe(*arguments)


def test_a_planner_says_what_a_prefix_would_save_without_planning_it():
    planner = Planner(["link"], 16, 1 << 30)
    for _ in range(20):
        planner.observe_prefill(1600, 0, 1.0)
        planner.observe_load("link", 1 << 20, 10, 0.02, 0.0)
    tiers, record_bytes = ["link"] * 50, [1 << 17] * 50
    share = planner.saved_share(1600, 0, tiers, record_bytes)
    assert planner.stats().modes["load"].num_plans == planner.stats().num_probes == 0
    plan = planner.plan_prefix(1600, 0, tiers, record_bytes, 0.0)
    assert share == plan.saved_share == pytest.approx(plan.saved_s / plan.recompute_s)
    assert 0.3 < share < 0.5
    assert planner.saved_share(1600, 0, [], []) == 0.0
