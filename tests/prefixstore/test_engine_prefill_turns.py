"""How prompts share forward passes: equally by tenant, however many tenants there are."""

import random

import pytest

from prefixstore.engine.prefill_turns import LEAST_TOKENS, Prefill, PrefillTurns
from prefixstore.planner import LoadAhead


def run_pass(turns, prompts, budget, computes=lambda prompt: True):
    """Run one pass in which each prompt takes all it may; returns the tokens of each one asked."""
    taken = {}
    for turn in turns.of_pass(prompts, budget):
        prompt = prompts[turn.index]
        if computes(prompt):
            turn.num_taken = min(prompt.num_left, turn.max_tokens)
        taken[turn.index] = turn.num_taken
    return taken


@pytest.mark.parametrize(
    ("prompts", "chunks"),
    [
        ([], []),
        ([("a", 900)], [(0, 512)]),
        ([("a", 900), ("b", 900)], [(0, 256), (1, 256)]),
        ([("a", 900), ("b", 20)], [(1, 20), (0, 492)]),
        ([("a", 900), ("a", 20)], [(1, 20), (0, 492)]),
        ([("a", 500), ("a", 900)], [(0, 500), (1, 12)]),  # one after the other
        ([("a", 900), ("a", 500), ("a", 20), ("b", 70)], [(2, 20), (3, 70), (0, 422)]),
        ([("a", 700), ("a", 650), ("a", 600), ("b", 700)], [(2, 128), (0, 128), (3, 256)]),
    ],
)
def test_tenants_and_lengths_share_a_pass(prompts, chunks):
    found = run_pass(PrefillTurns(), [Prefill(*one) for one in prompts], 512)
    assert list(found.items()) == chunks


def loading(front_tokens=900):
    """A prompt of 900 tokens, loaded in 1 s and computed in 9; a pass takes 10 ms and more."""
    load = LoadAhead(1.0, 64, front_tokens, front_tokens / 900, front_tokens / 100, 0.01, True)
    return Prefill("a", 900, load)


def test_fronts_of_prompts_that_load_make_room_for_the_others():
    turns, tail = PrefillTurns(), Prefill("a", 32)
    assert run_pass(turns, [loading()], 512) == {0: 512}, "nobody else is there"
    assert run_pass(turns, [loading()] * 20, 512) == {0: 64}, "1.17 s are no more than 116 tokens"
    assert run_pass(turns, [*[loading()] * 40, tail], 512) == {0: 64, 40: 32}
    assert run_pass(turns, [*[loading()] * 20, tail], 512) == {20: 32}, "it would wait for a front"
    assert run_pass(turns, [loading()] * 19 + [loading(front_tokens=0), tail], 512) == {
        20: 32,
        19: 480,
    }


def test_who_has_to_wait_for_its_load_is_owed_nothing_for_that():
    turns, tail = PrefillTurns(), Prefill("b", 512)
    for _ in range(50):
        assert run_pass(turns, [loading(), loading(), tail], 512) == {2: 512}
    assert run_pass(turns, [Prefill("a", 900), tail], 512) == {1: 256, 0: 256}


@pytest.mark.parametrize("budget", [-3, 0])
def test_a_pass_that_is_full_has_no_turns(budget):
    assert run_pass(PrefillTurns(), [Prefill("a", 900)], budget) == {}


def test_where_shares_are_too_short_to_be_worth_it_tenants_take_turns():
    turns, prompts = PrefillTurns(), [Prefill(tenant, 900) for tenant in "abc"]
    passes = [run_pass(turns, prompts, 2 * LEAST_TOKENS + 1) for _ in range(3)]
    assert [sorted(taken) for taken in passes] == [[0, 1], [0, 2], [1, 2]]
    assert all(num >= LEAST_TOKENS for taken in passes for num in taken.values())


@pytest.mark.parametrize("budget", [40, 256, 576])
@pytest.mark.parametrize("num_others", [3, 17, 18, 19, 30])
@pytest.mark.parametrize("length", [10, 33, 200, 5000])
def test_tenants_have_equal_shares_however_short_their_prompts_are(num_others, length, budget):
    """One tenant has a single endless prompt, the others start the next when one is done."""
    turns, left, sums = PrefillTurns(), [length] * num_others, [0] * (num_others + 1)
    num_passes = 300
    for _ in range(num_passes):
        prompts = [Prefill("long", 1 << 30)]
        prompts += [Prefill(f"short {number}", num) for number, num in enumerate(left)]
        for i, num in run_pass(turns, prompts, budget).items():
            sums[i] += num
            if i:
                left[i - 1] = left[i - 1] - num or length
    share = num_passes * budget / (num_others + 1)
    assert sums[0] > 0.85 * share
    # A short last chunk is not made up for.
    assert min(sums[1:]) > 0.7 * min(share, num_passes * length / 2)


def test_tenants_that_come_with_one_prompt_and_leave_starve_nobody():
    turns, num_left, num_tenants = PrefillTurns(), 30000, 30
    waiting = [("first", 32)] * num_tenants
    for number in range(4000):
        prompts = [Prefill("long", num_left), *(Prefill(*one) for one in waiting)]
        taken = run_pass(turns, prompts, 576)
        num_left -= taken.get(0, 0)
        if num_left <= 0:
            break
        waiting = [one for i, one in enumerate(waiting, 1) if not taken.get(i)]
        waiting += [(f"{number} {i}", 32) for i in range(num_tenants - len(waiting))]
    assert number < 1.2 * 30000 / (576 / 31)


def test_who_waited_for_a_load_has_saved_nothing_up():
    turns, sums = PrefillTurns(), [0] * 20
    prompts = [Prefill(f"{number}", 1 << 20) for number in range(20)]
    for _ in range(500):
        run_pass(turns, prompts, 320, lambda prompt: prompt is not prompts[0])
    for _ in range(20):
        for i, num in run_pass(turns, prompts, 320).items():
            sums[i] += num
    assert sums[0] <= 20 * 320 / 20 + LEAST_TOKENS
    assert min(sums) >= 20 * 320 / 20 - 3 * LEAST_TOKENS


def test_an_uneven_past_is_forgotten():
    """Chunks end at block boundaries, so one prompt may get a little more in every pass."""
    turns, rng = PrefillTurns(), random.Random(0)
    prompts = [Prefill(tenant, 1 << 30) for tenant in "ab"]
    for _ in range(20000):
        for turn in turns.of_pass(prompts, 576):
            turn.num_taken = turn.max_tokens - (rng.randrange(16) if turn.index == 0 else 0)
    prompts += [Prefill(f"{number}", 1 << 30) for number in range(30)]
    assert 1 in {i for _ in range(8) for i in run_pass(turns, prompts, 576)}
