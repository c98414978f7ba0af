"""Plain attributes of modules count for the identity, unless a newly built model has them too."""

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import transformers
from cached_models import generate, random_tokens, tiny_llama

from kvkernels import KVLayout
from prefixstore.identity import model_identity
from prefixstore.module_fields import Unknown, describe, leaves
from prefixstore.module_state import state_beside_weights
from prefixstore.module_watch import ModuleWatch

LAYOUT = KVLayout(3, 2, 16, 16, torch.float32)


@dataclasses.dataclass
class Params:
    control: torch.Tensor | None = None
    combine: Callable[..., torch.Tensor] = torch.add


class SteeredLayer(torch.nn.Module):
    """A layer with a control vector, as libraries put them into models."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.params = Params()
        self.vector = torch.ones(4)
        self.factors = [1.0, 2.0]
        self.vectors = {"one": [torch.ones(4)], "size": torch.Size((2,))}
        self.names = {"one", "two"}
        self.mode = "none"
        self.is_steered = False
        self.norms = [layer.input_layernorm, layer.input_layernorm.weight]
        self.limit = float("nan")
        self.itself = [self.factors]
        self.itself.append(self.itself)


def steered_llama():
    torch.manual_seed(1)
    model = tiny_llama()
    model.model.layers[1] = SteeredLayer(model.model.layers[1]).eval()
    return model, model.model.layers[1]


def set_control(layer):
    layer.params.control = torch.ones(1)


def replace_params(layer):
    layer.params = Params(combine=torch.sub)


def replace_vector(layer):
    layer.vector = -layer.vector


def write_vector(layer):
    layer.vector.mul_(-1)


def set_factor(layer):
    layer.factors[1] = 0.5


def append_vector(layer):
    layer.vectors["one"].append(layer.vector)


def write_held_vector(layer):
    layer.vectors["one"][0].add_(1)


def hold_another_norm(layer):
    layer.norms[0] = layer.layer.post_attention_layernorm


def switch(layer):
    layer.is_steered = True


def set_mode(layer):
    layer.mode = "tanh"


def hide_a_vector(layer):
    layer._vector = torch.ones(4)


WATCHED = [
    *(set_control, replace_params, replace_vector, write_vector, set_factor, append_vector),
    *(write_held_vector, hold_another_norm, switch, set_mode),
]


@pytest.mark.parametrize("change", [*WATCHED, hide_a_vector])
def test_attributes_of_anybodys_modules_count(change, caplog):
    (model, layer), (same, _) = steered_llama(), steered_llama()
    before = model_identity(model, LAYOUT)
    assert model_identity(same, LAYOUT) == before
    change(layer)
    assert model_identity(model, LAYOUT) == model_identity(model, LAYOUT) != before
    assert not caplog.records


@pytest.mark.parametrize("change", WATCHED)
def test_attributes_of_anybodys_modules_are_watched(change):
    model, layer = steered_llama()
    watch = ModuleWatch(model)
    assert watch.change() is None
    layer.limit = float("nan")
    assert watch.change() is None
    change(layer)
    assert "expected the modules' attributes" in watch.change()


def test_options_of_an_activation_count():
    model = tiny_llama()
    identities = set()
    for approximate in ("none", "tanh", "none"):
        model.model.layers[0].mlp.act_fn = torch.nn.GELU(approximate)
        identities.add(model_identity(model, LAYOUT))
    assert len(identities) == 2


@pytest.mark.parametrize("value", [lambda x: x, object()])
def test_code_of_anybodys_on_a_whole_model_counts(value, caplog):
    model = tiny_llama()
    model.model.steer = value
    assert model_identity(model, LAYOUT) != model_identity(model, LAYOUT)
    assert "an object whose effect is not known, model.steer" in caplog.text


@pytest.mark.parametrize("value", [lambda x: x, object(), [torch.ones(1).add]])
def test_a_model_that_holds_what_nobody_knows_is_like_no_other(value, caplog):
    model, layer = steered_llama()
    layer.params.combine = value
    assert model_identity(model, LAYOUT) != model_identity(model, LAYOUT)
    assert "an object whose effect is not known, model.layers.1.params.combine" in caplog.text


def scaled(factor):
    return lambda x: factor * x


class Helper:
    def __init__(self):
        self.scale, self.decorated = 1.0, torch.no_grad()(lambda x: x)

    def double(self, x):
        return 2 * x

    def halve(self, x):
        return x / 2


class WithHelpers(transformers.LlamaForCausalLM):
    """A model whose layers are built with objects that cannot be digested."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.helper = Helper()
            layer.method, layer.factor = layer.helper.double, scaled(2)
            layer.defaults = lambda x, factor=1: factor * x
            layer.operation, layer.library = torch.Tensor.tanh, torch.special


def with_helpers():
    torch.manual_seed(1)
    model = WithHelpers(tiny_llama().config).eval()
    return model, model.model.layers[1]


def test_what_a_model_is_built_with_need_not_be_known():
    (model, _), (same, _) = with_helpers(), with_helpers()
    assert [*state_beside_weights(model)] == []
    assert model_identity(model, LAYOUT) == model_identity(same, LAYOUT)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.helper, "scale", 2.0),
        lambda layer: setattr(layer.helper, "decorated", torch.no_grad()(lambda x: 2 * x)),
        lambda layer: setattr(layer, "method", layer.helper.halve),
        lambda layer: setattr(layer, "factor", scaled(3)),
        lambda layer: setattr(layer, "defaults", lambda x, factor=1: factor * x * x),
        lambda layer: setattr(layer.defaults, "__defaults__", (2,)),
        lambda layer: setattr(layer, "operation", torch.Tensor.sigmoid),
        lambda layer: setattr(layer, "library", torch.linalg),
    ],
    ids=["field", "wrapped", "method", "closure", "code", "default", "operation", "library"],
)
def test_what_differs_from_what_a_model_is_built_with_is_not_known(change):
    model, layer = with_helpers()
    change(layer)
    assert [value for _, value in state_beside_weights(model)] == [None]
    assert model_identity(model, LAYOUT) != model_identity(model, LAYOUT)


def test_a_function_may_hold_itself():
    def repeat(x):
        return repeat(x)

    assert describe(repeat) == describe(repeat)


MODELS = ["Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi", "Phi3", "SmolLM3", "GptOss"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_as_it_was_made_or_loaded_has_nothing_beside_its_weights(name, tmp_path):
    config = getattr(transformers, f"{name}Config" if name != "Gemma3" else "Gemma3TextConfig")
    kind = getattr(transformers, f"{name}ForCausalLM")
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
    model = kind(config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))
    model.eval().save_pretrained(tmp_path)
    for one in (model, kind.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        watch = ModuleWatch(one)
        generate(one, random_tokens(8), num_new=2)
        assert [*state_beside_weights(one)] == []
        assert watch.change() is None


def test_takes_apart_what_holds_others():
    value = {"a": (1, None), "b": functools.partial(torch.nn.functional.gelu, approximate="tanh")}
    assert {name: describe(leaf) for name, leaf in leaves("x", value)} == {
        "x": "builtins.str '2 in builtins.dict'",
        "x.a": "builtins.str '2 in builtins.tuple'",
        "x.a.0": "builtins.int 1",
        "x.a.1": "builtins.NoneType None",
        "x.b": "builtins.str '3 in functools.partial'",
        "x.b.func": "torch._C._nn.gelu",
        "x.b.args": "builtins.str '0 in builtins.tuple'",
        "x.b.keywords": "builtins.str '1 in builtins.dict'",
        "x.b.keywords.approximate": "builtins.str 'tanh'",
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.bfloat16, "torch.bfloat16"),
        (torch.device("cpu"), "torch.device"),
        (torch.relu, "torch._VariableFunctionsClass.relu"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
        (torch.ones(2, device="meta"), "torch.float32 (2,) without values"),
        (torch.ones(2).to_sparse(), Unknown("torch.Tensor")),
        ([].append, Unknown("builtins.builtin_function_or_method", ("list.append",))),
    ],
)
def test_describes_alike_in_every_process(value, expected):
    assert describe(value) == expected
