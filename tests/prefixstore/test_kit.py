"""The cold-versus-warm kit on tiny models: every cell passes, and its report."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from cached_models import random_tokens, sharp, tiny_gemma3, tiny_llama
from engines import Numbers

from prefixstore.engine import Engine
from prefixstore.errors import ConfigError
from prefixstore.testing import (
    BFLOAT16_LIMITS,
    FLOAT16_LIMITS,
    FLOAT32_LIMITS,
    Ability,
    CacheAdapter,
    EngineAdapter,
    ModelReference,
    Plan,
    check_engines,
    num_steps,
)
from prefixstore.testing.states import STATES

OWN_ENGINE = Path(__file__).parents[2] / "docs" / "own_engine.py"
NUM_NEW = 17  # more than a block, so that answers outgrow a pool for only the prompts


def prompts():
    """Prompts with lengths around whole blocks, two of them with a common beginning."""
    tokens = [random_tokens(length, seed)[0].tolist() for seed, length in enumerate((70, 33, 96))]
    return [*tokens, tokens[2][:43] + tokens[1]]


@pytest.fixture(params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def model(request):
    torch.manual_seed(1)
    return sharp(request.param())


def test_answers_of_an_engine_are_the_models_in_every_state(model):
    adapter, plan = EngineAdapter(model, Numbers()), Plan(num_new=NUM_NEW)
    steps = []
    report = check_engines([adapter], ModelReference(model), prompts(), plan, steps.append)
    assert report.is_good, report.to_text()
    assert len(steps) == num_steps([adapter], plan, prompts())
    run = {(cell.tier, cell.state) for cell in report.cells if not cell.skipped}
    of_memory = {state.name for state in STATES if not state.needs_durable}
    of_disk = {state.name for state in STATES if not state.is_tierless}
    assert run == {("memory", one) for one in of_memory} | {("disk", one) for one in of_disk}
    for cell in report.cells:
        if not cell.skipped:
            assert cell.num_equal == cell.num_answers > 0
            assert cell.max_drift is not None and cell.max_drift < 1e-4
    for tier in ("memory", "disk"):
        (evicted,) = report.find(tier=tier, state="evicted")
        whole = sum((len(one) - 1) // 16 * 16 for one in prompts())
        assert evicted.reused_share == whole / sum(map(len, prompts()))


@pytest.mark.parametrize(
    ("dtype", "codecs", "limits"),
    [
        (torch.float32, ("raw",), FLOAT32_LIMITS),
        (torch.bfloat16, ("raw", "l12"), BFLOAT16_LIMITS),
        (torch.float16, ("raw",), FLOAT16_LIMITS),
    ],
    ids=["float32", "bfloat16", "float16"],
)
def test_an_engine_that_promises_bits_keeps_them(model, dtype, codecs, limits):
    model = model.to(dtype)
    adapter = EngineAdapter(model, Numbers(), batch_invariant=True)
    plan = Plan(codecs=codecs, tiers=("disk",), num_new=NUM_NEW, limits=limits)
    report = check_engines([adapter], ModelReference(model), prompts(), plan)
    assert report.is_good, report.to_text()
    assert all(cell.is_bitwise for cell in report.cells if not cell.skipped)
    assert "engine (bit for bit): equal answers" in report.to_text()


def test_answers_of_sessions_are_the_models_in_every_state(model):
    plan = Plan(tiers=("disk",), num_new=4, num_few=3)
    report = check_engines([CacheAdapter(model)], ModelReference(model), prompts(), plan)
    assert report.is_good, report.to_text()
    skipped = {cell.state for cell in report.cells if cell.skipped}
    assert skipped == {"alone", "strangers", "preempted", "chunked"}


def test_lossless_codecs_change_nothing_and_others_what_they_say():
    torch.manual_seed(1)
    model = sharp(tiny_llama()).to(torch.bfloat16)
    plan = Plan(
        codecs=("l12", "q8", "q2"),
        tiers=("memory",),
        states=("cold", "evicted", "half"),
        num_new=6,
        limits=BFLOAT16_LIMITS,
    )
    report = check_engines([CacheAdapter(model)], ModelReference(model), prompts(), plan)
    assert report.is_good, report.to_text()
    losses = {codec: report.find(codec=codec, state="evicted")[0].loss for codec in plan.codecs}
    assert losses["l12"] is None
    assert 0 < losses["q8"].kl < losses["q2"].kl
    assert 0 < losses["q8"].mean_abs < losses["q2"].mean_abs <= losses["q2"].max_abs
    assert losses["q2"].p10 <= losses["q2"].median <= 6
    assert report.find(codec="q2", state="cold")[0].loss is None
    assert "codecs with loss" in report.to_text()


def test_a_report_reads_as_text_and_as_json(model):
    plan = Plan(tiers=("memory",), states=("cold", "evicted", "restarted"), num_new=2)
    report = check_engines(
        [EngineAdapter(model, Numbers())], ModelReference(model), prompts(), plan
    )
    text = report.to_text()
    assert "equal answers, reused tokens" in text
    assert "restarted: not run: this tier does not outlive the engine" in text
    assert "2 cells of 4 prompts (275 tokens) and 2 new tokens" in text
    read = json.loads(report.to_json())
    assert read["is_good"] and len(read["cells"]) == 3


def test_two_prompts_press_no_pool_and_that_is_said(model):
    plan = Plan(tiers=("memory",), states=("cold", "pressed"), num_new=2)
    report = check_engines(
        [EngineAdapter(model, Numbers())], ModelReference(model), prompts()[:2], plan
    )
    assert report.is_good, report.to_text()
    (cell,) = report.find(state="pressed")
    assert cell.skipped == "needs more prompts: a pool for the longest holds them all"


def test_short_answers_preempt_nobody_and_that_is_said(model):
    plan = Plan(tiers=("memory",), states=("cold", "preempted"), num_new=16)
    report = check_engines(
        [EngineAdapter(model, Numbers())], ModelReference(model), prompts(), plan
    )
    assert report.is_good, report.to_text()
    (cell,) = report.find(state="preempted")
    assert cell.skipped == "needs answers of more than a block, 16 tokens; got 16"


def test_a_tier_may_be_given_by_its_url(model, tmp_path):
    url = f"disk://{tmp_path}?max_bytes=64MiB&name=mine"
    plan = Plan(tiers=(url,), states=("cold", "restarted"), num_new=2)
    report = check_engines(
        [EngineAdapter(model, Numbers())], ModelReference(model), prompts(), plan
    )
    assert report.is_good, report.to_text()
    assert {cell.tier for cell in report.cells} == {"mine"}


def test_redis_is_a_tier_like_others(model, shared_servers):
    plan = Plan(
        tiers=(shared_servers("valkey").url,), states=("cold", "evicted", "restarted"), num_new=4
    )
    report = check_engines(
        [EngineAdapter(model, Numbers())], ModelReference(model), prompts(), plan
    )
    assert report.is_good, report.to_text()
    assert {cell.tier for cell in report.cells} == {"redis"}


def test_example_of_an_own_engine_is_checked(capsys):
    runpy.run_path(str(OWN_ENGINE), run_name="__main__")
    assert "7 cells of 3 prompts" in capsys.readouterr().out


def test_an_engine_says_what_it_can():
    torch.manual_seed(1)
    model = tiny_llama()
    assert CacheAdapter(model).abilities == frozenset()
    plain = EngineAdapter(model, Numbers(), batch_invariant=False)
    assert plain.abilities == {Ability.BATCHES, Ability.PREEMPTS, Ability.CHUNKS}
    exact = EngineAdapter(model, Numbers(), batch_invariant=True)
    assert exact.abilities == plain.abilities | {Ability.BITWISE}
    with Engine.open(model, Numbers(), pool_tokens=1024, memory_bytes=0) as engine:
        is_default = engine.is_batch_invariant
    default = EngineAdapter(model, Numbers())
    assert default.abilities == (exact if is_default else plain).abilities


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codecs": ("q7",)}, "codecs: .*q7"),
        ({"codecs": ()}, "codecs: expected at least one, got none"),
        ({"tiers": ("memry",)}, "tiers: kind"),
        ({"states": ("warm",)}, "states: expected 'cold' among them"),
        ({"states": ("cold", "warmer")}, "states: .*warmer"),
        ({"num_new": 1}, "num_new: expected 2 or more, got 1"),
    ],
)
def test_refuses_a_plan_that_makes_no_sense(fields, message):
    with pytest.raises(ConfigError, match=message):
        Plan(**fields)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1] * 40], "prompts: expected 2 or more, got 1"),
        ([[1] * 40, [2] * 31], "prompts: expected 32 tokens or more in each, got 31"),
    ],
)
def test_refuses_prompts_that_show_nothing(tokens, message):
    torch.manual_seed(1)
    model = tiny_llama()
    with pytest.raises(ConfigError, match=message):
        check_engines([CacheAdapter(model)], ModelReference(model), tokens)
