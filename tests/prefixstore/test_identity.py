"""The identity of a model's KV: which models must have the same one, and which must not."""

import dataclasses

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaConfig, LlamaForCausalLM

from kvkernels import KVLayout
from prefixstore.errors import ConfigError
from prefixstore.identity import model_identity, stored_identity
from wrapped_weights import wrap

LAYOUT = KVLayout(2, 2, 16, 16, torch.float32)
ROPE_THETA = 10000.0


def make_model(name="one", seed=0, **changes):
    config = LlamaConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_theta": ROPE_THETA,
            "tie_word_embeddings": True,
            **changes,
        }
    )
    config._name_or_path = name
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def identity():
    return model_identity(make_model(), LAYOUT)


def test_is_sixteen_bytes_and_the_same_again(identity):
    assert len(identity) == 16
    assert model_identity(make_model(), LAYOUT) == identity
    assert model_identity(make_model(), [LAYOUT]) == identity


def test_survives_saving_and_loading_under_another_name(identity, tmp_path):
    make_model().save_pretrained(tmp_path / "renamed")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "renamed", dtype=torch.float32)
    assert model_identity(loaded, LAYOUT) == identity


def test_does_not_depend_on_name_attention_or_output_options(identity):
    model = make_model(name="two", eos_token_id=7, use_cache=False, output_hidden_states=True)
    model.set_attn_implementation("eager")
    assert model_identity(model, LAYOUT) == identity


@pytest.mark.parametrize("position", [0, -1])
def test_differs_after_one_flipped_bit(identity, position):
    model = make_model()
    with torch.no_grad():
        weight = model.model.layers[1].self_attn.k_proj.weight
        weight.view(torch.int32).view(-1)[position] ^= 1
    assert model_identity(model, LAYOUT) != identity


def test_differs_between_equal_bytes_under_other_names(identity):
    model = make_model()
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp
    assert model_identity(model, LAYOUT) != identity


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 20000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"num_attention_heads": 4, "num_key_value_heads": 4},
        {"rms_norm_eps": 1e-5},
        {"max_position_embeddings": 4096},
    ],
    ids=str,
)
def test_differs_with_the_configuration(identity, changes):
    assert model_identity(make_model(**changes), LAYOUT) != identity


def test_rope_alone_makes_the_difference(identity):
    """The weights are equal: only the configuration tells the models apart."""
    model = make_model(rope_theta=20000.0)
    for (name, weight), other in zip(
        make_model().state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other), name
    assert model_identity(model, LAYOUT) != identity


def test_differs_with_dtype(identity):
    half = model_identity(make_model().to(torch.bfloat16), LAYOUT)
    assert half != identity
    assert half != model_identity(make_model().to(torch.float16), LAYOUT)


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim"])
def test_differs_with_the_layout(identity, field):
    changed = dataclasses.replace(LAYOUT, **{field: 3})
    assert model_identity(make_model(), changed) != identity


def test_differs_with_block_size_pool_dtype_and_groups(identity):
    model = make_model()
    others = [
        dataclasses.replace(LAYOUT, block_size=32),
        dataclasses.replace(LAYOUT, dtype=torch.bfloat16),
        [LAYOUT, LAYOUT],
    ]
    digests = [model_identity(model, other) for other in others]
    assert len({identity, *digests}) == 4


def test_differs_with_salt_and_takes_text_or_bytes(identity):
    model = make_model()
    salted = model_identity(model, LAYOUT, "tenant")
    assert salted == model_identity(model, LAYOUT, b"tenant")
    assert len({identity, salted, model_identity(model, LAYOUT, "tenant2")}) == 3


def test_namespaces_of_one_identity_differ(identity):
    digests = {identity, *(stored_identity(identity, salt) for salt in ("", "a", "b"))}
    assert len(digests) == 4
    assert all(len(digest) == 16 for digest in digests)
    assert stored_identity(identity, "a") != stored_identity(bytes(16), "a")


def test_adapter_counts_as_weights(identity):
    model = make_model()
    model.register_parameter("adapter", torch.nn.Parameter(torch.ones(3)))
    with_adapter = model_identity(model, LAYOUT)
    with torch.no_grad():
        model.adapter[1] = 2.0
    assert len({identity, with_adapter, model_identity(model, LAYOUT)}) == 3


def test_changed_buffers_change_the_identity():
    model = torch.nn.Module()
    model.register_buffer("kept", torch.ones(2))
    model.register_buffer("derived", torch.ones(2), persistent=False)
    before = model_identity(model, LAYOUT)
    model.derived += 1
    derived = model_identity(model, LAYOUT)
    model.kept += 1
    assert len({before, derived, model_identity(model, LAYOUT)}) == 3


def test_frequencies_count_where_they_are_not_those_of_the_configuration(identity):
    model = make_model()
    model.model.rotary_emb.inv_freq *= 1 + 1e-7  # as another processor may round them
    assert model_identity(model, LAYOUT) == identity
    model.model.rotary_emb.inv_freq *= 0.25
    assert model_identity(model, LAYOUT) != identity


def test_a_model_cast_with_its_frequencies_is_not_one_loaded_in_that_dtype(tmp_path):
    make_model().save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = make_model().to(torch.bfloat16)
    assert loaded.model.rotary_emb.inv_freq.dtype != cast.model.rotary_emb.inv_freq.dtype
    assert model_identity(loaded, LAYOUT) != model_identity(cast, LAYOUT)


def set_scaling(model):
    model.model.layers[1].self_attn.scaling *= 2


def set_epsilon(model):
    model.model.norm.variance_epsilon = 1e-3


def replace_activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.Sigmoid()


@pytest.mark.parametrize("change", [set_scaling, set_epsilon, replace_activation])
def test_differs_with_what_is_set_in_a_module_by_hand(identity, change):
    model = make_model()
    change(model)
    changed = model_identity(model, LAYOUT)
    assert changed != identity
    assert model_identity(model, LAYOUT) == changed


def hook_layer(model):
    return model.model.layers[0].register_forward_hook(lambda *_: None).remove


def hook_all_models(model):
    return register_module_forward_pre_hook(lambda *_: None).remove


def replace_forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: x
    return lambda: delattr(mlp, "forward")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hook_layer, "a forward hook on model.layers.0:"),
        (hook_all_models, "a forward hook on all modules:"),
        (replace_forward, "a forward of its own in model.layers.0.mlp:"),
    ],
)
def test_a_model_with_code_of_anybodys_is_like_no_other(identity, caplog, change, message):
    model = make_model()
    undo = change(model)
    changed = {model_identity(model, LAYOUT), model_identity(model, LAYOUT)}
    undo()
    assert len(changed | {identity}) == 3
    assert message in caplog.text
    assert model_identity(model, LAYOUT) == identity


def test_hooks_of_transformers_change_nothing(identity):
    model = make_model().eval()
    model(torch.arange(4)[None], output_hidden_states=True)  # its hooks stay in place
    assert model_identity(model, LAYOUT) == identity


def test_a_tensor_of_several_chunks_counts_to_its_last_byte():
    model = torch.nn.Module()
    model.register_buffer("large", torch.zeros((16 << 20) + 5, dtype=torch.uint8))
    before = model_identity(model, LAYOUT)
    model.large[-1] = 1
    assert model_identity(model, LAYOUT) != before


def test_layout_in_memory_makes_no_difference():
    weight = torch.arange(12.0).view(3, 4)
    digests = []
    for tensor in (weight, weight.t().contiguous().t()):
        model = torch.nn.Module()
        model.register_buffer("weight", tensor)
        digests.append(model_identity(model, LAYOUT))
    assert digests[0] == digests[1]


def test_model_without_values_is_refused():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="a tensor without values for bias"):
        model_identity(model, LAYOUT)


def test_weights_that_lie_in_other_tensors_are_refused():
    model = torch.nn.Linear(2, 2)
    model.weight = wrap(model.weight)
    with pytest.raises(ConfigError, match=r"memory .*, got a WrappedWeight .* for weight"):
        model_identity(model, LAYOUT)


def identity_with_extra(extra):
    class WithExtra(torch.nn.Identity):
        def get_extra_state(self):
            return extra

    return model_identity(WithExtra(), LAYOUT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"scale": 1.0}, {"scale": 2.0}),
        ({"scale": 1.0}, {"scale": "1.0"}),
        (torch.ones(2), torch.zeros(2)),
        ({"scales": [torch.ones(2)]}, {"scales": [torch.zeros(2)]}),
        (None, ()),
    ],
)
def test_changed_extra_state_changes_the_identity(one, other):
    assert identity_with_extra(one) == identity_with_extra(one) != identity_with_extra(other)


def test_extra_state_of_which_nobody_knows_what_it_is_is_refused():
    message = r"extra state of tensors, .*, got builtins.object for _extra_state.scale"
    with pytest.raises(ConfigError, match=message):
        identity_with_extra({"scale": object()})


def test_weights_that_are_no_tensors_are_refused():
    model = torch.nn.Linear(2, 2)
    model.register_state_dict_post_hook(lambda _, state, *__: state.update(packed=(1, 2)))
    with pytest.raises(
        ConfigError, match=r"weights that are tensors, got builtins\.tuple for packed"
    ):
        model_identity(model, LAYOUT)
