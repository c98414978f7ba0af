"""The kit notices wrong caches: each fault is planted in ours, and some cell reports it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cached_models import random_tokens, tiny_llama
from engines import Numbers
from kit_faults import (
    BlockOfAnother,
    damaged_restores,
    dropped_last_block,
    empty_last_block,
    ignored_salts,
    overwritten_on_device,
    round_to_bfloat16,
    shift_tokens,
)

from prefixstore.testing import (
    Answer,
    CacheAdapter,
    EngineAdapter,
    Limits,
    LossLimits,
    ModelReference,
    Plan,
    Scores,
    check_engines,
)
from prefixstore.testing.cells import (
    describe_other_bits,
    describe_too_much_loss,
    describe_wrong_answer,
    describe_wrong_reuse,
    find_divergence,
    measure_loss,
)
from prefixstore.testing.stage import Asked

FAULTS = {
    "another block": (lambda: damaged_restores(BlockOfAnother()), "evicted", "log-probabilities"),
    "tokens shifted": (lambda: damaged_restores(shift_tokens), "evicted", "log-probabilities"),
    "empty last block": (lambda: damaged_restores(empty_last_block), "evicted", "log-prob"),
    "quantised": (lambda: damaged_restores(round_to_bfloat16), "evicted", "log-probabilities"),
    "dropped last block": (dropped_last_block, "evicted", "tokens to be reused"),
    "wrong salt": (ignored_salts, "other salt", "tokens to be known"),
    "overwritten on the device": (overwritten_on_device, "warm", "log-probabilities"),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return tiny_llama()


@pytest.fixture(scope="module")
def prompts():
    return [random_tokens(length, seed)[0].tolist() for seed, length in enumerate((70, 49))]


@pytest.fixture(params=["session", "engine"])
def adapter(request, model):
    return CacheAdapter(model) if request.param == "session" else EngineAdapter(model, Numbers())


# In so small a model rounding errors are 1e-6; lost bits show as much more in a larger one.
PLAN = Plan(
    tiers=("memory",),
    states=("cold", "warm", "evicted", "other salt"),
    num_new=3,
    limits=Limits(tie=1e-4, drift=1e-5),
)


def test_nothing_is_noticed_where_nothing_is_wrong(adapter, model, prompts):
    report = check_engines([adapter], ModelReference(model), prompts, PLAN)
    assert report.is_good, report.to_text()


@pytest.mark.parametrize("fault", FAULTS)
def test_notices_an_engine_with_a_planted_fault(fault, adapter, model, prompts):
    plant, state, complaint = FAULTS[fault]
    with plant():
        report = check_engines([adapter], ModelReference(model), prompts, PLAN)
    assert not report.is_good
    (cell,) = report.find(state=state)
    assert any(complaint in line for line in cell.faults), report.to_text()
    assert "WRONG" in report.to_text()
    assert report.find(state="cold")[0].faults == ()


def test_a_state_that_was_not_reached_is_a_fault(model, prompts):
    """If the tier returns nothing, equal answers prove nothing."""
    plan = Plan(tiers=("memory://1GiB?write=never",), states=("cold", "evicted"), num_new=2)
    report = check_engines([EngineAdapter(model, Numbers())], ModelReference(model), prompts, plan)
    (cell,) = report.find(state="evicted")
    assert any("nothing came from a tier" in line for line in cell.faults)


def test_a_tie_is_no_fault_and_a_clear_loss_is():
    limits = Limits(tie=1e-4, drift=1e-3)

    def scores(*gaps):
        return Scores(np.array(gaps, np.float32), np.zeros(len(gaps), np.float32), np.zeros(9))

    assert find_divergence(0, scores(0, 0), limits) is None
    tie = find_divergence(0, scores(0, 5e-5), limits)
    assert tie.is_tie and tie.position == 1
    wrong = find_divergence(0, scores(5e-5, 0, 0.2), limits)
    assert not wrong.is_tie and wrong.position == 2 and wrong.gap == pytest.approx(0.2)
    asked = Asked((1, 2), Answer((3, 4), logprobs=(0.0, 0.5)), 0, 0, 0)
    (line,) = describe_wrong_answer(asked, 7, scores(0, 0), limits)
    assert line.startswith("prompt 7: expected log-probabilities within 0.001")
    (line,) = describe_wrong_answer(asked, 7, scores(0.2, 0), Limits(tie=0.1, drift=1))
    assert "expected the greedy token at 0 of the answer" in line


def test_reuse_has_a_least_and_a_most():
    def lines(reused, num_declined=0):
        answer = Answer((1,), reused=reused, num_declined=num_declined)
        return describe_wrong_reuse(Asked((0,) * 60, answer, 32, 48, 16), 0)

    assert lines({"device": 16, "disk": 16}) == lines({"disk": 48}) == lines(None) == []
    assert lines({"disk": 16}, num_declined=16) == []
    assert "expected 32 tokens to be reused, got 16" in lines({"disk": 16})[0]
    assert "expected at most 48 tokens to be known, got 64" in lines({"disk": 64})[0]
    assert "expected at most 16 tokens on the device, got 32" in lines({"device": 32})[0]


def test_bits_count_where_they_are_promised():
    cold = Answer((1, 2), (-0.5, -0.25))
    same, other = Answer((1, 2), (-0.5, -0.25)), Answer((1, 2), (-0.5, -0.2500001))
    assert describe_other_bits(Asked((0,), same, 0, 0, 0), 0, cold) == []
    (line,) = describe_other_bits(Asked((0,), other, 0, 0, 0), 3, cold)
    assert line == "prompt 3: expected the bits of the cold answer, got others"


def test_what_is_no_number_is_in_no_limit():
    limits, nan = Limits(tie=1e-4, drift=1e-3), np.nan
    sound = Scores(np.zeros(2, np.float32), np.full(2, -1, np.float32), np.zeros(9, np.float32))

    def lines(scores=sound, logprobs=(-1.0, -1.0), first_logits=None):
        asked = Asked((1, 2), Answer((3, 4), logprobs, first_logits), 0, 0, 0)
        exact = describe_wrong_answer(asked, 5, scores, limits)
        assert describe_too_much_loss(asked, 5, scores, limits, LossLimits(2.0, 6.0)) == exact
        return exact

    assert lines() == lines(logprobs=()) == lines(first_logits=np.zeros(9)) == []
    assert "expected finite log-probabilities" in lines(logprobs=(-1.0, nan))[0]
    assert "expected 2 log-probabilities, got 1" in lines(logprobs=(-1.0,))[0]
    assert "expected finite logits, got" in lines(first_logits=np.full(9, nan))[0]
    assert "expected logits of shape (9,), got (8,)" in lines(first_logits=np.zeros(8))[0]
    of_model = "expected numbers of the model alone"
    assert of_model in lines(replace(sound, logprobs=np.array([-1, nan])))[0]
    assert of_model in lines(replace(sound, first_logits=np.full(9, nan)))[0]
    unknown = replace(sound, gaps=np.array([0, nan]))
    assert of_model in lines(unknown)[0]
    assert find_divergence(5, unknown, limits).position == 1


def test_tokens_that_the_model_rules_out_are_compared_with_none():
    logits = np.array([0, -np.inf, 2, 1])
    scores = Scores(np.zeros(1), np.full(1, -1.0), logits)
    asked = Asked((1, 2), Answer((2,), first_logits=logits.copy()), 0, 0, 0)
    limits = Limits(tie=1e-4, drift=1e-3)
    assert describe_too_much_loss(asked, 0, scores, limits, LossLimits(0.0, 0.0)) == []
    loss = measure_loss([asked], {(1, 2): asked.answer}, [scores])
    assert (loss.max_abs, loss.mean_abs, loss.kl) == (0, 0, 0)
