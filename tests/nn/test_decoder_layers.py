"""Fused decoder layers: the same bits, and which calls are left to the layers' own forwards."""

import random

import pytest
import tiny_models
import torch
from fused_decoder_layers import NAMES, count_runs, with_kernels
from packed_forward import PackedModel
from torch.nn.modules import module as torch_module
from transformers import DynamicCache

from kvkernels import UnsupportedError, native
from kvkernels.nn import batch_invariance, decoder_layers, layer_kernels
from kvkernels.nn.decoder_layers import FusedDecoderLayer
from kvkernels.nn.transformers import paged_attention


def replaced(model):
    forwards = [vars(module).get("forward") for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, FusedDecoderLayer)]


def make_packed(model, lengths):
    sequences = [torch.randint(0, 128, (length,)) for length in lengths]
    num_blocks = sum(-(-length // tiny_models.BLOCK_SIZE) for length in lengths) + 1
    groups = tiny_models.make_groups(model, num_blocks)
    return PackedModel(model, groups, sequences)


def run_steps(packed):
    """Logits of prompts, pieces of prompts and single tokens, in batches of any size."""
    steps = packed.random_steps(random.Random(0), (1, 1, 2, 3, 16, 33))
    return [logits for step in steps for logits in packed.run(step)]


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


def test_weights_may_change_in_place():
    model = tiny_models.llama()
    with with_kernels(model):
        decoder_layers.install(model)
        packed = make_packed(model, (40,))
        before = run_steps(packed)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.mul_(1.5)
        got = run_steps(packed)
        decoder_layers.uninstall(model)
        expected = run_steps(packed)
    assert all(map(torch.equal, got, expected))
    assert not any(map(torch.equal, got, before))


def replace_parameter(module):
    module.weight = torch.nn.Parameter(module.weight * 1.5, requires_grad=False)


def replace_data(module):
    """Move the parameter to other memory; it stays the same object."""
    module.weight.data = module.weight * 1.5


def add_bias(module):
    module.bias = torch.nn.Parameter(torch.ones(len(module.weight)), requires_grad=False)


@pytest.mark.parametrize("replace", [replace_parameter, replace_data, add_bias])
def test_weights_may_be_replaced(replace):
    model = tiny_models.llama()
    with with_kernels(model):
        decoder_layers.install(model)
        packed = make_packed(model, (40,))
        before = run_steps(packed)
        with torch.no_grad():
            for layer in model.model.layers:
                replace(layer.mlp.up_proj)
        got = run_steps(packed)
        decoder_layers.uninstall(model)
        expected = run_steps(packed)
    assert all(map(torch.equal, got, expected))
    assert not any(map(torch.equal, got, before))


class WithBranch(torch.nn.Module):
    """A linear layer with an adapter's branch."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.branch = torch.nn.Linear(base_layer.in_features, base_layer.out_features)

    def forward(self, rows):
        return self.base_layer(rows) + self.branch(rows)


def add_adapters(layer):
    layer.self_attn.q_proj = WithBranch(layer.self_attn.q_proj)
    layer.mlp.down_proj = WithBranch(layer.mlp.down_proj)


def replace_gate(layer):
    layer.mlp = tiny_models.llama().model.layers[0].mlp


def replace_attention(layer):
    other = tiny_models.llama().model.layers[0].self_attn
    other.config, other.layer_idx = layer.self_attn.config, layer.self_attn.layer_idx
    layer.self_attn = other


def replace_activation(layer):
    layer.mlp.act_fn = torch.nn.ReLU()


def replace_norm(layer):
    layer.input_layernorm = torch.nn.Identity()


@pytest.mark.parametrize(
    "replace",
    [add_adapters, replace_gate, replace_attention, replace_activation, replace_norm],
)
def test_modules_may_be_replaced(replace, monkeypatch):
    model = tiny_models.llama()
    with with_kernels(model):
        decoder_layers.install(model)
        packed = make_packed(model, (40,))
        before = run_steps(packed)
        with torch.no_grad():
            replace(model.model.layers[1])
        runs = count_runs(monkeypatch)
        got = run_steps(packed)
        assert len(set(runs)) == 2  # the other two layers are still replaced
        decoder_layers.uninstall(model)
        expected = run_steps(packed)
    assert all(map(torch.equal, got, expected))
    assert not any(map(torch.equal, got, before))


def change_scale(layer):
    layer.self_attn.scaling *= 3


def change_epsilon(layer):
    layer.post_attention_layernorm.variance_epsilon = 1.0


@pytest.mark.parametrize("change", [change_scale, change_epsilon])
def test_settings_may_change(change, monkeypatch):
    model = tiny_models.llama()
    with with_kernels(model):
        decoder_layers.install(model)
        packed = make_packed(model, (40,))
        before = run_steps(packed)
        change(model.model.layers[1])
        runs = count_runs(monkeypatch)
        got = run_steps(packed)
        assert len(set(runs)) == 2  # the other two layers are still replaced
        decoder_layers.uninstall(model)
        expected = run_steps(packed)
    assert all(map(torch.equal, got, expected))
    assert not any(map(torch.equal, got, before))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_layer_that_drops_out_is_left_to_its_own(dropout, monkeypatch):
    model = tiny_models.llama(attention_dropout=dropout)
    with with_kernels(model):
        decoder_layers.install(model)
        runs = count_runs(monkeypatch)
        model.train()
        if dropout:
            with pytest.raises(UnsupportedError, match="dropout: expected 0"):
                run_steps(make_packed(model, (5,)))
        else:
            run_steps(make_packed(model, (5,)))
        assert bool(runs) == (dropout == 0)
        decoder_layers.uninstall(model)


def test_a_weight_with_other_strides_in_the_same_place_is_refused():
    model = tiny_models.llama()
    with with_kernels(model):
        decoder_layers.install(model)
        packed = make_packed(model, (5,))
        run_steps(packed)
        weight = model.model.layers[1].self_attn.o_proj.weight
        weight.data = weight.data.t()
        with pytest.raises(ValueError, match=r"self_attn\.o_proj\.weight: expected stride 1"):
            run_steps(packed)
        decoder_layers.uninstall(model)


def test_a_weight_of_another_shape_is_refused():
    model = tiny_models.llama()
    with with_kernels(model):
        decoder_layers.install(model)
        down = model.model.layers[1].mlp.down_proj
        down.weight = torch.nn.Parameter(down.weight[:, 1:].contiguous(), requires_grad=False)
        with pytest.raises(
            ValueError, match=r"mlp\.down_proj\.weight: .*\[64, 96\], got \[64, 95\]"
        ):
            run_steps(make_packed(model, (5,)))
        decoder_layers.uninstall(model)


@pytest.mark.parametrize("name", ["mlp.down_proj", "post_attention_layernorm"])
def test_a_weight_of_another_dtype_is_refused(name):
    model = tiny_models.llama()
    with with_kernels(model):
        decoder_layers.install(model)
        model.model.layers[1].get_submodule(name).bfloat16()
        with pytest.raises(ValueError, match=rf"{name}.weight: .*float32.*got .*bfloat16"):
            run_steps(make_packed(model, (5,)))
        decoder_layers.uninstall(model)


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


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_may_come_later(register, monkeypatch):
    model = tiny_models.llama()
    with with_kernels(model):
        decoder_layers.install(model)
        packed = make_packed(model, (20,))
        expected = run_steps(packed)
        runs, calls = count_runs(monkeypatch), []
        mlp = model.model.layers[1].mlp
        handle = getattr(mlp, register)(lambda *args: calls.append(args))
        got = run_steps(packed)
        handle.remove()
        assert len(calls) == len(runs) / 2 > 0  # the other two layers are still replaced
        run_steps(packed)
        assert len(calls) == len(runs) / 5
        decoder_layers.uninstall(model)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("output", ["hidden_states", "attentions"])
def test_what_captures_outputs_for_transformers_counts_while_it_does(output, monkeypatch):
    model = tiny_models.llama(attn_implementation="eager")
    with torch.inference_mode():
        model(torch.arange(20)[None], **{f"output_{output}": True})  # leaves hooks behind
    with with_kernels(model):
        assert decoder_layers.install(model) == 3
        runs = count_runs(monkeypatch)
        make_packed(model, (20,)).run_whole()
        assert len(runs) == 3
        model.config.output_hidden_states = True
        make_packed(model, (20,)).run_whole()
        assert len(runs) == 3
        decoder_layers.uninstall(model)


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_a_hook_of_all_models_may_come_later(kind, monkeypatch):
    model = tiny_models.llama()
    with with_kernels(model):
        decoder_layers.install(model)
        packed = make_packed(model, (20,))
        expected = run_steps(packed)
        runs, calls = count_runs(monkeypatch), set()
        register = getattr(torch_module, f"register_module_forward_{kind}")
        handle = register(lambda module, *_: calls.add(module))
        got = run_steps(packed)
        handle.remove()
        assert not runs
        assert calls > {module for layer in model.model.layers for module in layer.modules()}
        run_steps(packed)
        assert set(runs) == set(replaced(model))
        decoder_layers.uninstall(model)
    for pair in zip(got, expected, strict=True):
        torch.testing.assert_close(*pair)  # the activation's own kernel rounds differently


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
