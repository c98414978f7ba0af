"""All of a model on kvkernels in one call: what runs, what comes of it, what is left behind."""

import pytest
import tiny_models
import torch

from kvkernels.errors import UnsupportedError
from kvkernels.nn import decoder_layers
from kvkernels.nn.decoder_layers import FusedDecoderLayer
from kvkernels.nn.fused_model import fused_model, install, uninstall
from kvkernels.nn.transformers import IMPLEMENTATION, PagedCache


def own_forwards(model):
    return [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen2"])
def test_generates_the_models_own_tokens(name):
    model = tiny_models.MODELS[name]()
    ids = torch.randint(1, 128, (2, 40))
    expected = tiny_models.generate(model, ids)
    with fused_model(model), PagedCache(tiny_models.make_groups(model), batch_size=2) as cache:
        kinds = [type(forward) for forward in own_forwards(model)]
        assert kinds.count(FusedDecoderLayer) == model.config.num_hidden_layers
        assert torch.equal(tiny_models.generate(model, ids, past_key_values=cache), expected)
    assert not own_forwards(model)
    assert model.config._attn_implementation != IMPLEMENTATION


def test_is_installed_until_the_last_user_is_done():
    model = tiny_models.llama()
    install(model)
    with fused_model(model):
        pass
    assert own_forwards(model)
    assert model.config._attn_implementation == IMPLEMENTATION
    uninstall(model)
    assert not own_forwards(model)
    assert model.config._attn_implementation != IMPLEMENTATION


def test_a_model_that_is_refused_is_left_as_it_was():
    model = tiny_models.qwen2_moe()
    with pytest.raises(UnsupportedError, match="linear and embedding layers only"):
        install(model)
    assert not own_forwards(model)
    assert model.config._attn_implementation != IMPLEMENTATION


def test_a_failure_undoes_what_was_done(monkeypatch):
    def fail(model):
        raise KeyboardInterrupt

    model = tiny_models.llama()
    monkeypatch.setattr(decoder_layers, "install", fail)
    with pytest.raises(KeyboardInterrupt):
        install(model)
    assert not own_forwards(model)
    assert model.config._attn_implementation != IMPLEMENTATION
