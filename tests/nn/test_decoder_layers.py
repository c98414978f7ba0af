"""Fused decoder layers: the same bits, and which calls are left to the layers' own forwards."""

import random

import pytest
import tiny_models
import torch
from fused_decoder_layers import NAMES, count_runs, make_packed, replaced, run_steps, with_kernels
from transformers import DynamicCache

from kvkernels import native
from kvkernels.nn import batch_invariance, decoder_layers, layer_kernels
from kvkernels.nn.transformers import paged_attention


@pytest.mark.parametrize("num_in_one_call", [0, 2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_steps_give_the_bits_of_the_layers_own(name, dtype, num_in_one_call, monkeypatch):
    monkeypatch.setattr(layer_kernels, "_FEW_TOKENS", num_in_one_call)
    model = tiny_models.MODELS[name]().to(dtype)
    lengths = (70, 41, 1, 25)
    with with_kernels(model):
        torch.manual_seed(1)
        expected = run_steps(make_packed(model, lengths))
        assert decoder_layers.install(model) == model.config.num_hidden_layers
        runs = count_runs(monkeypatch)
        torch.manual_seed(1)
        got = run_steps(make_packed(model, lengths))
        assert set(runs) == set(replaced(model))
        decoder_layers.uninstall(model)
    assert len(got) == len(expected) > 10
    assert all(map(torch.equal, got, expected))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.skipif(not native.reads_tensors, reason="PyTorch has no table for C++")
def test_few_tokens_take_one_call_of_cpp_after_the_first_layer(monkeypatch):
    model = tiny_models.llama()
    in_parts = []
    own_finish = layer_kernels.LayerPass.finish

    def finish(self, attended):
        in_parts.append(self)
        return own_finish(self, attended)

    monkeypatch.setattr(layer_kernels.LayerPass, "finish", finish)
    monkeypatch.setattr(layer_kernels.LayerPass, "attend_and_finish", None)
    with with_kernels(model):
        decoder_layers.install(model)
        in_parts.clear()
        packed = make_packed(model, (40, 3))
        num_steps = len(
            [packed.run(step) for step in packed.random_steps(random.Random(0), (1, 3))]
        )
        decoder_layers.uninstall(model)
    assert num_steps == len(in_parts) > 10


def test_is_installed_until_the_last_user_is_done():
    model = tiny_models.llama()
    with with_kernels(model):
        assert decoder_layers.install(model) == decoder_layers.install(model) == 3
        decoder_layers.uninstall(model)
        assert len(replaced(model)) == 3
        decoder_layers.uninstall(model)
        assert not replaced(model)
        decoder_layers.uninstall(model)  # no effect the second time


def test_other_passes_go_through_the_layers_own(monkeypatch):
    model = tiny_models.gemma3()
    tokens = torch.randint(0, 128, (2, 37))
    with with_kernels(model):
        with torch.inference_mode():
            expected = model(tokens).logits
        decoder_layers.install(model)
        runs = count_runs(monkeypatch)
        with torch.inference_mode():
            assert torch.equal(model(tokens).logits, expected)
            assert torch.equal(model(tokens, use_cache=True).logits, expected)
            cache = DynamicCache(config=model.config)
            assert torch.equal(model(tokens, past_key_values=cache).logits, expected)
        decoder_layers.uninstall(model)
    assert not runs


def with_a_scaled_branch(model):
    """As in Granite: a layer scales what it adds, by a number that is in none of its modules."""
    kind = type(model.model.layers[0])

    class ScaledLayer(kind):
        def forward(self, hidden_states, **options):
            return hidden_states + 0.5 * (super().forward(hidden_states, **options) - hidden_states)

    for layer in model.model.layers:
        layer.__class__ = ScaledLayer


def with_a_hook(model):
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *args: None)


def test_a_model_with_few_tokens_is_tried_with_those():
    model = tiny_models.llama(vocab_size=5)
    with with_kernels(model):
        assert decoder_layers.install(model) == 3
        decoder_layers.uninstall(model)


def test_leaves_a_model_whose_trial_fails(monkeypatch):
    model = tiny_models.llama()
    with with_kernels(model):
        monkeypatch.setattr(model.model, "rotary_emb", None)
        assert decoder_layers.install(model) == 0
        decoder_layers.uninstall(model)


def with_forwards_of_their_own(model):
    for layer in model.model.layers:
        vars(layer)["forward"] = layer.forward


def with_another_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()


@pytest.mark.parametrize(
    "change",
    [with_a_scaled_branch, with_a_hook, with_forwards_of_their_own, with_another_activation],
)
def test_leaves_what_only_looks_alike(change):
    model = tiny_models.llama()
    change(model)
    with with_kernels(model):
        assert decoder_layers.install(model) == 0
        decoder_layers.uninstall(model)


def test_leaves_models_whose_kernels_are_others():
    model = tiny_models.llama()
    with paged_attention(model):
        assert decoder_layers.install(model) == 0
        decoder_layers.uninstall(model)
        with batch_invariance.batch_invariant(model):
            assert decoder_layers.install(model) == 0
            decoder_layers.uninstall(model)


def test_leaves_what_shows_at_far_positions_only():
    """Ministral 3 scales its queries from a position on that no trial reaches."""
    ministral = pytest.importorskip("transformers.models.ministral3")
    config = ministral.Ministral3Config(**tiny_models.SIZES, num_hidden_layers=2, head_dim=16)
    model = ministral.modeling_ministral3.Ministral3ForCausalLM(config).eval()
    with with_kernels(model):
        assert decoder_layers.install(model) == 0
        decoder_layers.uninstall(model)
