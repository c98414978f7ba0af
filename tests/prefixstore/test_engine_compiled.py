"""Engines on compiled models: the model's own answers, without a promise of bits."""

import pytest
import torch
from cached_models import tiny_llama
from engines import answer, expected, open_engine, prompt

from kvkernels import UnsupportedError


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_model_answers_what_it_answers_by_itself():
    model = tiny_llama()
    wanted = expected(model, prompt(20))
    model.compile(backend="eager")
    with open_engine(model) as engine:
        assert not engine.is_batch_invariant
        assert list(answer(engine, prompt(20)).token_ids) == wanted
    with (
        pytest.raises(UnsupportedError, match="not compiled"),
        open_engine(model, batch_invariant=True),
    ):
        pass


def test_a_model_may_be_compiled_under_an_engine():
    model = tiny_llama()
    wanted = expected(model, prompt(20))
    with open_engine(model) as engine:
        model.compile(backend="eager")
        assert list(answer(engine, prompt(20)).token_ids) == wanted


def test_an_engine_serves_a_part_that_torch_compile_wraps():
    model = tiny_llama()
    wanted = expected(model, prompt(20))
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp = torch.compile(mlp, backend="eager")
    with open_engine(model) as engine:
        assert list(answer(engine, prompt(20)).token_ids) == wanted
        mlp.train()
        with pytest.raises(ValueError, match="expected evaluation mode, got training mode"):
            engine.submit(prompt(20))
