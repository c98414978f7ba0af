"""The dashboard of a real engine: its answers agree with what the engine served."""

import pytest
import torch
from cached_models import BLOCK_SIZE, random_tokens, tiny_llama
from fastapi import FastAPI
from fastapi.testclient import TestClient

from prefixstore.dashboard import dashboard_router
from prefixstore.engine import Engine, SamplingParams
from prefixstore.models import load_tokenizer, prepare_smollm2

HOSTILE = "<script>alert(1)</script>"
QUESTIONS = ("overview", "history", "requests", "tree")


@pytest.fixture
def engine(tmp_path):
    torch.manual_seed(1)
    tokenizer = load_tokenizer(prepare_smollm2())  # knows all 97 ids of the model, and more
    options = {"block_size": BLOCK_SIZE, "pool_tokens": 1024, "disk_path": tmp_path / "kv"}
    with Engine.open(tiny_llama(), tokenizer, **options) as engine:
        yield engine
        assert engine.check() == []


@pytest.mark.model
@pytest.mark.usefixtures("waits_for_look_ups")
def test_shows_what_an_engine_served(engine) -> None:
    prompt = random_tokens(6 * BLOCK_SIZE + 1)[0].tolist()
    sampling = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    for salt in ("", "", HOSTILE):
        engine.submit(prompt, sampling, tenant=HOSTILE, salt=salt).result(60)
    app = FastAPI()
    app.include_router(dashboard_router(engine))
    with TestClient(app) as client:
        answers = {one: client.get(f"/dashboard/{one}").json() for one in QUESTIONS}
    newest, warm, cold = answers["requests"]["requests"]
    assert (cold["reused_tokens"], warm["reused_tokens"]) == ({}, {"device": 6 * BLOCK_SIZE})
    assert (newest["reused_tokens"], newest["misses"]) == ({}, {"new": 6 * BLOCK_SIZE})
    assert all(one["tenant"] == HOSTILE for one in (newest, warm, cold))
    assert cold["times"]["ttft_s"] > 0
    overview = answers["overview"]
    assert overview["num_finished"] == {"length": 3}
    assert overview["hit_tokens"] == {"device": 6 * BLOCK_SIZE}
    assert overview["prompt_tokens"] == 3 * len(prompt)
    assert sum(mode["num_plans"] for mode in overview["planner"]["modes"].values()) > 0
    assert answers["history"]["output_tokens"][-1] == 9
    assert answers["tree"]["num_salts"] == 2
    assert HOSTILE not in str(answers["tree"])
