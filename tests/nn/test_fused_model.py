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


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_means_what_it_means_for_the_models_own_layers(dtype, autocast_dtype):
    model = tiny_models.llama()
    ids = torch.randint(1, 128, (1, 40))
    autocast = torch.autocast("cpu", autocast_dtype)
    exact = model.double()(ids, use_cache=False).logits
    model.to(dtype)
    with autocast, torch.no_grad():
        want = model(ids, use_cache=False).logits
    with fused_model(model), autocast, torch.no_grad():
        without_cache = model(ids, use_cache=False).logits
        in_parts = []
        for size in (13, 39):
            with PagedCache(tiny_models.make_groups(model)) as cache:
                parts = [model(part, past_key_values=cache).logits for part in ids.split(size, 1)]
            in_parts.append(torch.cat(parts, 1))
    assert torch.equal(*in_parts)  # invariant of the batch as without autocast
    error = (want - exact).norm()
    for got in (without_cache, *in_parts):
        assert got.dtype == want.dtype
        # Not less either, as in the model's own dtype.
        assert error / 1.25 <= (got - exact).norm() <= 1.25 * error


def test_generates_the_models_own_tokens_under_autocast():
    model = tiny_models.llama()
    ids = torch.randint(1, 128, (2, 40))
    with torch.autocast("cpu", torch.bfloat16):
        expected = tiny_models.generate(model, ids)
        with fused_model(model), PagedCache(tiny_models.make_groups(model), batch_size=2) as cache:
            assert torch.equal(tiny_models.generate(model, ids, past_key_values=cache), expected)


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
