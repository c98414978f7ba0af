"""Which load's call begins next, and how many are under way at once."""

from __future__ import annotations

import pytest

from prefixstore.engine.load_turns import Load, LoadTurns, best_num_calls
from prefixstore.planner import TierEstimate

SHARED = TierEstimate(sharing=1.0, sharing_doubt=0.2)
FREE = TierEstimate(sharing=0.0, sharing_doubt=0.2)


def load(left_s: float, call_s: float = 0.01, tier: str = "a", tenant: str = "") -> Load:
    return Load(tier, call_s, left_s, tenant)


def order(turns: LoadTurns, waiting: list[Load], num: int) -> list[int]:
    """Whose calls are made, one after another, all always having more to load."""
    indices = []
    for _ in range(num):
        turn = turns.next(waiting, (), {"a": SHARED})
        assert turn is not None
        turns.take(turn)
        indices.append(turn.index)
    return indices


def following(waiting: list[Load], under_way: list[Load], **tiers: TierEstimate) -> int | None:
    """Whose turn it is first."""
    turn = LoadTurns().next(waiting, under_way, tiers)
    return None if turn is None else turn.index


def test_calls_that_share_a_link_are_made_one_by_one():
    assert following([load(1.0)], [], a=SHARED) == 0
    assert following([load(1.0)], [load(0.01)], a=SHARED) is None
    assert following([load(1.0)], [load(0.01)] * 3, a=FREE) == 0
    assert following([], [], a=SHARED) is None


def test_each_tier_has_calls_of_its_own():
    tiers = {"a": SHARED, "b": SHARED}
    waiting = [load(1.0), load(2.0), load(3.0, tier="b")]
    assert following(waiting, [load(0.01)], **tiers) == 2
    assert following(waiting[:2], [load(0.01, tier="b")], **tiers) == 0


@pytest.mark.parametrize(
    ("num_loads", "sharing", "expected"),
    [(1, 1.0, 1), (100, 1.0, 1), (2, 0.9, 1), (4, 0.5, 2), (16, 0.5, 4), (8, 0.1, 9)],
)
def test_more_calls_are_made_at_once_the_less_they_share(num_loads, sharing, expected):
    assert best_num_calls(num_loads, TierEstimate(sharing=sharing, sharing_doubt=0.1)) == expected


@pytest.mark.parametrize("sharing", [0.2, 0.5, 0.8])
def test_the_best_number_is_that_of_least_mean_time(sharing):
    def mean_s(num_calls: int) -> float:
        return (1 + sharing * (num_calls - 1)) * (12 / num_calls + 1) / 2

    best = best_num_calls(12, TierEstimate(sharing=sharing, sharing_doubt=0.1))
    assert mean_s(int(best)) <= 1.03 * min(map(mean_s, range(1, 13)))


def test_two_calls_at_once_are_tried_while_it_is_not_known_how_much_they_share():
    guess = TierEstimate()
    assert guess.sharing == 1.0
    assert best_num_calls(8, guess) == 2
    assert following([load(1.0)], [load(0.01)], a=guess) == 0
    assert following([load(1.0)], [load(0.01)] * 2, a=guess) is None


def test_a_short_load_does_not_wait_for_a_long_call():
    call = load(0.1, call_s=0.1)
    assert following([load(0.06)], [call], a=SHARED) is None, "over at 0.12, or 0.16"
    assert following([load(0.04)], [call], a=SHARED) == 0
    assert following([load(0.04)], [load(0.07, call_s=0.07)], a=SHARED) is None
    assert following([load(0.9), load(0.04)], [call], a=SHARED) == 1
    assert following([load(0.07)], [call] * 3, a=SHARED) == 0, "0.28, or 0.37"


def test_the_shortest_has_three_quarters_of_the_time_and_the_oldest_one():
    indices = order(LoadTurns(), [load(9.0), load(5.0), load(1.0)], 400)
    assert [indices.count(i) for i in range(3)] == [100, 0, 300]
    # By time, not by calls.
    indices = order(LoadTurns(), [load(9.0, call_s=0.05), load(1.0)], 400)
    assert indices.count(0) == pytest.approx(400 / 16, abs=2)


def test_tenants_have_equal_shares_however_many_their_loads():
    waiting = [load(1.0 + i, tenant="many") for i in range(8)]
    waiting.append(load(50.0, call_s=0.02, tenant="one"))
    indices = order(LoadTurns(), waiting, 300)
    assert indices.count(8) == pytest.approx(100, abs=2)


def test_nobody_saves_up_turns():
    turns = LoadTurns()
    order(turns, [load(1.0, tenant="a")], 100)
    both = [load(1.0, tenant="a"), load(1.0, tenant="b")]
    # Either is late by a call at most, of its shortest or its oldest.
    assert order(turns, both, 100).count(0) == pytest.approx(50, abs=2)


def test_forgets_those_that_were_served_longest_ago(monkeypatch):
    monkeypatch.setattr("prefixstore.engine.load_turns._MAX_ROLES", 8)
    turns = LoadTurns()
    for number in range(100):
        assert order(turns, [load(1.0, tenant=str(number))], 1) == [0]
    assert len(turns._finished) == 8
    assert ("a", "99", "shortest") in turns._finished
