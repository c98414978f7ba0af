"""Fused decoder layers of a model that is changed after they were installed."""

import pytest
import tiny_models
import torch
from fused_decoder_layers import count_runs, make_packed, replaced, run_steps, with_kernels
from torch.nn.modules import module as torch_module

from kvkernels import UnsupportedError
from kvkernels.nn import decoder_layers


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


def give_forward(name):
    """As a patch by hand does it, or a library that places or steers modules."""

    def change(layer):
        module = layer.get_submodule(name)
        own = module.forward
        module.forward = lambda *args, **options: _halve(own(*args, **options))

    change.__name__ = f"give_forward_to_{name}"
    return change


def _halve(output):
    return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2


def give_class(name):
    def change(layer):
        module = layer.get_submodule(name)
        kind = type(module)
        forward = {"forward": lambda self, x: kind.forward(self, x) / 2}
        module.__class__ = type("Other", (kind,), forward)

    change.__name__ = f"give_class_to_{name}"
    return change


def change_scale(layer):
    layer.self_attn.scaling *= 3


def change_epsilon(layer):
    layer.post_attention_layernorm.variance_epsilon = 1.0


@pytest.mark.parametrize(
    "change",
    [
        *(add_adapters, replace_gate, replace_attention, replace_activation, replace_norm),
        *(change_scale, change_epsilon),
        *map(give_forward, ("self_attn", "mlp", "mlp.up_proj", "mlp.act_fn", "input_layernorm")),
        *map(give_class, ("mlp", "mlp.up_proj", "mlp.act_fn", "input_layernorm")),
    ],
)
def test_a_changed_layer_is_left_to_its_own_forward(change, monkeypatch):
    model = tiny_models.llama()
    with with_kernels(model):
        decoder_layers.install(model)
        packed = make_packed(model, (40,))
        before = run_steps(packed)
        with torch.no_grad():
            change(model.model.layers[1])
        runs = count_runs(monkeypatch)
        got = run_steps(packed)
        assert len(set(runs)) == 2  # the other two layers are still replaced
        decoder_layers.uninstall(model)
        expected = run_steps(packed)
    assert all(map(torch.equal, got, expected))
    # Of the last tokens: the first one sees itself alone, whatever the scale.
    assert not torch.equal(got[-1], before[-1])


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
