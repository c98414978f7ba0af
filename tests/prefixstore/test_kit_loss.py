"""The kit notices wrong blocks despite a lossy codec, and tolerates the codec's own loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cached_models import random_tokens, sharp, tiny_gemma3, tiny_llama
from engines import Numbers
from kit_faults import damaged_restores, empty_last_block, negate

from kvkernels import CODECS
from prefixstore.record_layout import LOSSLESS
from prefixstore.testing import (
    BFLOAT16_LIMITS,
    FLOAT32_LIMITS,
    LOSS_LIMITS,
    Answer,
    CacheAdapter,
    EngineAdapter,
    ModelReference,
    Plan,
    Scores,
    check_engines,
)

LOSSY = tuple(LOSS_LIMITS)


@pytest.fixture
def prompts():
    return [random_tokens(length, seed)[0].tolist() for seed, length in enumerate((70, 49, 96))]


def make_plan(codecs, limits=FLOAT32_LIMITS):
    states = ("cold", "evicted", "half")
    return Plan(codecs=codecs, tiers=("memory",), states=states, num_new=8, limits=limits)


def test_every_lossy_codec_has_limits():
    assert set(LOSSY) == set(CODECS) - set(LOSSLESS)


@pytest.mark.parametrize(
    ("dtype", "limits"),
    [(torch.float32, FLOAT32_LIMITS), (torch.bfloat16, BFLOAT16_LIMITS)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def test_honest_blocks_are_within_the_limits(make, dtype, limits, prompts):
    torch.manual_seed(1)
    model = sharp(make()).to(dtype)
    adapters = [CacheAdapter(model), EngineAdapter(model, Numbers())]
    report = check_engines(adapters, ModelReference(model), prompts, make_plan(LOSSY, limits))
    assert report.is_good, report.to_text()
    drifts = [report.find(codec=one, state="evicted")[0].loss.drift for one in ("q8", "q4", "q2")]
    assert 0 < drifts[0] < drifts[1] < drifts[2]


@pytest.mark.parametrize(
    ("damage", "codecs"),
    [(negate, ("q8", "k8v4", "q4", "k4v2")), (empty_last_block, ("q8",))],
    ids=["negated", "empty last block"],
)
@pytest.mark.parametrize("way", ["session", "engine"])
def test_notices_wrong_blocks(way, damage, codecs, prompts):
    torch.manual_seed(1)
    model = sharp(tiny_llama())
    adapter = CacheAdapter(model) if way == "session" else EngineAdapter(model, Numbers())
    with damaged_restores(damage):
        report = check_engines([adapter], ModelReference(model), prompts, make_plan(codecs))
    for codec in codecs:
        (cell,) = report.find(codec=codec, state="evicted")
        assert any("log-probabilities within" in line for line in cell.faults), report.to_text()
        assert report.find(codec=codec, state="cold")[0].faults == ()
    if damage is negate and way == "session":
        (cell,) = report.find(codec="q8", state="evicted")
        assert any("nats of the model's distribution" in line for line in cell.faults)


class Guessing:
    """An engine that reports only tokens, and makes them up after a restore."""

    name, abilities = "guessing", frozenset()

    def open(self, setup):
        self.on_device, self.in_tier = set(), set()
        return self

    def answer(self, prompts, num_new, salt):
        return [self._answer(prompt, num_new, salt) for prompt in prompts]

    def flush(self):
        pass

    def evict(self):
        self.on_device.clear()

    def check(self):
        return []

    def close(self):
        pass

    def _answer(self, prompt, num_new, salt):
        key, whole = (salt, prompt), (len(prompt) - 1) // 16 * 16
        is_restored = key in self.in_tier - self.on_device
        reused = {"device": whole} if key in self.on_device else {"memory": whole}
        known = key in self.in_tier
        self.on_device.add(key)
        self.in_tier.add(key)
        tokens = range(20, 20 + num_new) if is_restored else [7] * num_new
        return Answer(tuple(tokens), reused=reused if known else {})


class Sevens:
    """A model that always answers with sevens, with no close second."""

    def score(self, prompt, answer):
        gaps = np.array([0 if token == 7 else 9 for token in answer], np.float32)
        return Scores(gaps, np.zeros(len(answer), np.float32), np.arange(50, dtype=np.float32))


@pytest.mark.parametrize("codec", LOSSY)
def test_tokens_alone_show_an_engine_that_makes_them_up(codec, prompts):
    plan = Plan(codecs=(codec,), tiers=("memory",), states=("cold", "evicted"), num_new=4)
    report = check_engines([Guessing()], Sevens(), prompts, plan)
    (cell,) = report.find(state="evicted")
    assert len(cell.faults) == len(prompts)
    assert all("expected tokens whose logits are at most" in line for line in cell.faults)
    assert not report.is_good
