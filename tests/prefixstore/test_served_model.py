"""A cache watches its model's weights, restores the model, and refuses invalid arguments."""

import threading
from pathlib import Path

import pytest
import torch
import transformers
from cached_models import VOCABULARY, generate, random_tokens, run
from engines import wait_threads
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.module_tracker import ModuleTracker

from kvkernels.errors import UnsupportedError
from kvkernels.nn import fused_layers
from prefixstore.cache import PrefixCache
from prefixstore.errors import ConfigError, ModelChanged, TierUnavailable


def key_weight(model):
    return model.model.layers[1].self_attn.k_proj.weight


def scale(model):
    with torch.no_grad():
        key_weight(model).mul_(1.5)


def scale_data(model):
    # does not change the version counter; adapters are merged like this
    key_weight(model).data.mul_(1.5)


def replace_data(model):
    key_weight(model).data = key_weight(model).data * 1.5


def replace_parameter(model):
    model.model.layers[1].self_attn.k_proj.weight = torch.nn.Parameter(key_weight(model) * 1.5)


def assign_state(model):
    state = {name: value * 1.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def scale_frequencies(model):
    next(model.model.rotary_emb.buffers()).mul_(2)  # a buffer that is not saved


CHANGES = [
    scale,
    scale_data,
    replace_data,
    replace_parameter,
    assign_state,
    scale_frequencies,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_need_another_cache(model, open_cache, change):
    cache = open_cache()
    tokens = random_tokens(40)
    run(cache, model, tokens)
    change(model)
    with pytest.raises(ValueError, match="model: expected the weights the cache was opened with"):
        cache.session(tokens)
    assert run(open_cache(), model, tokens)[1].num_reused == 0


def test_the_values_of_a_weight_that_is_not_contiguous_are_watched(model, open_cache):
    weight = key_weight(model)
    weight.data = weight.data.t().contiguous().t()
    cache = open_cache()
    tokens = random_tokens(40)
    run(cache, model, tokens)
    scale_data(model)
    with pytest.raises(ValueError, match="model: expected the weights the cache was opened with"):
        cache.session(tokens)


def set_scaling(model):
    model.model.layers[1].self_attn.scaling *= 2


def add_hook(model):
    model.model.layers[0].register_forward_hook(lambda _, __, output: output)


def train(model):
    model.train()


def replace_module(model):
    layer = type(model.model.layers[1])(model.config, 1)
    model.model.layers[1] = layer.eval().to(model.device)


def replace_activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()


def nest_activation(model):
    mlp = model.model.layers[0].mlp
    mlp.act_fn = torch.nn.Sequential(mlp.act_fn, torch.nn.Tanh())


def remove_layer(model):
    del model.model.layers[1]


def replace_class(model):
    mlp = model.model.layers[0].mlp
    mlp.__class__ = type("Other", (type(mlp),), {"forward": lambda self, x: x})


def replace_forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: 0.5 * type(mlp).forward(mlp, x)


def set_config(model):
    # of those fields that some layers read in every pass
    model.config.clip_qkv = 0.05


OTHER_ATTRIBUTES = "the modules' attributes as the cache was opened with, got others"
OTHER_MODULES = "the modules the cache was opened with, got others"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_scaling, OTHER_ATTRIBUTES),
        (set_config, "the configuration the cache was opened with, got another"),
        (add_hook, "the forward hooks the cache was opened with, got others"),
        (train, "evaluation mode, got training mode"),
        (replace_module, OTHER_MODULES),
        (replace_activation, OTHER_MODULES),
        (nest_activation, OTHER_MODULES),
        (remove_layer, OTHER_MODULES),
        (replace_class, OTHER_MODULES),
        (replace_forward, "the modules' forwards as the cache was opened with, got others"),
    ],
)
def test_a_changed_model_needs_another_cache(model, open_cache, change, expected):
    cache = open_cache()
    tokens = random_tokens(40)
    run(cache, model, tokens)
    change(model)
    with pytest.raises(ValueError, match=f"model: expected {expected}; open another cache"):
        cache.session(tokens)
    if change is not remove_layer:
        model.eval()
        assert run(open_cache(), model, tokens)[1].num_reused == 0


def test_output_options_may_change(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    run(cache, model, tokens)
    model.config.use_cache, model.config.output_attentions = True, False
    model.config.pad_token_id = 3
    assert run(cache, model, tokens)[1].num_reused == 32


def test_a_hook_of_all_models_needs_another_cache(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    run(cache, model, tokens)
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        handle = register(lambda *_: None)
        with pytest.raises(ValueError, match="model: expected the forward hooks the cache was"):
            cache.session(tokens)
        assert run(open_cache(), model, tokens)[1].num_reused == 0
        handle.remove()
    with ModuleTracker():  # PyTorch's own
        assert run(cache, model, tokens)[1].num_reused == 32


def test_forwards_of_kvkernels_may_come_and_go(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    plain, _ = run(cache, model, tokens)
    assert fused_layers.install(model) > 0
    assert run(cache, model, tokens)[1].num_reused == 32
    fused_layers.uninstall(model)
    assert run(cache, model, tokens)[0] == plain


def test_a_number_that_is_none_is_no_change(model, open_cache):
    model.model.layers[0].note = float("nan")
    tokens = random_tokens(40)
    with open_cache().session(tokens) as session:
        assert session.report.num_prompt_tokens == 40


def test_a_model_in_training_mode_is_refused(model, open_cache):
    before = model.config._attn_implementation
    model.train()
    with pytest.raises(ConfigError, match=r"got training mode; call model.eval\(\)"):
        open_cache()
    assert model.config._attn_implementation == before


def test_weights_changed_during_a_session_cache_nothing(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    with cache.session(tokens) as session:
        scale_data(model)
        with pytest.raises(ValueError, match="model: expected the weights the cache was opened"):
            generate(model, tokens, session)
    assert cache.stats().index.num_blocks == 0


def steer(model):
    return model.model.layers[0].register_forward_hook(lambda _, __, output: output + 1).remove


def scale_data_and_back(model):
    key_weight(model).data.mul_(2)
    return lambda: key_weight(model).data.div_(2)


def replace_data_and_back(model):
    before = key_weight(model).data
    replace_data(model)
    return lambda: setattr(key_weight(model), "data", before)


@pytest.mark.parametrize("change", [steer, scale_data_and_back, replace_data_and_back])
def test_a_model_that_is_changed_for_one_answer_is_refused(model, open_cache, change):
    cache = open_cache()
    tokens = random_tokens(33)  # leaves one token to compute
    plain = generate(model, tokens, num_new=2)
    run(cache, model, tokens)
    with cache.session(tokens) as session:
        undo = change(model)
        with pytest.raises(ModelChanged, match=r"model: expected the .* opened with"):
            generate(model, tokens, session, num_new=2)
        undo()
        assert session.num_tokens == 32
        assert generate(model, tokens, session, num_new=2) == plain


def test_a_hook_between_two_steps_is_refused(model, open_cache):
    tokens = random_tokens(9)
    with torch.no_grad(), open_cache().session(tokens) as session:
        model(tokens[:, :8], past_key_values=session)
        steer(model)
        with pytest.raises(ModelChanged, match="model: expected the forward hooks"):
            model(tokens[:, 8:], past_key_values=session)
        assert session.num_tokens == 8


def test_a_closed_cache_gives_the_model_back(model, open_cache):
    before = model.config._attn_implementation
    first, second = open_cache(), open_cache()
    tokens = random_tokens(40)
    first.close()
    with pytest.raises(ValueError, match="session: expected an open cache, got a closed one"):
        first.session(tokens)
    run(second, model, tokens)
    second.close()
    second.close()
    assert model.config._attn_implementation == before
    assert "prepare_inputs_for_generation" not in vars(model)
    generate(model, tokens)


def test_a_cache_that_cannot_be_opened_leaves_nothing_open(tmp_path):
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=VOCABULARY)
    bloom = transformers.BloomForCausalLM(config).eval()
    before, threads = bloom.config._attn_implementation, threading.active_count()
    with pytest.raises((UnsupportedError, ConfigError)):
        PrefixCache.open(bloom, disk_path=tmp_path)
    with pytest.raises(UnsupportedError):
        PrefixCache.open(bloom, pool_tokens=64, disk_path=tmp_path)
    assert bloom.config._attn_implementation == before
    wait_threads(threads)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [{"codec": ("q8",) * 9}, {"tiers": ["disk://{}?write=back"]}],
    ids=["cache", "store"],
)
def test_a_cache_that_cannot_be_opened_closes_its_tiers(model, tmp_path, options):
    before, threads = model.config._attn_implementation, threading.active_count()
    if "tiers" in options:
        options = {"tiers": [url.format(tmp_path) for url in options["tiers"]]}
    else:
        options = {"disk_path": tmp_path, **options}
    files = len([*Path("/proc/self/fd").iterdir()])
    with pytest.raises(ConfigError):
        PrefixCache.open(model, pool_tokens=64, **options)
    assert model.config._attn_implementation == before
    wait_threads(threads)
    assert len([*Path("/proc/self/fd").iterdir()]) <= files


def test_a_tier_that_cannot_be_opened_leaves_the_model_alone(model, tmp_path):
    before = model.config._attn_implementation
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(TierUnavailable):
        PrefixCache.open(model, pool_tokens=64, disk_path=tmp_path / "file")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "token_ids: expected at least one token, got none"),
        ([[1, 2], [3, 4]], r"token_ids: expected one sequence, .* got shape \[2, 2\]"),
        ([1.5, 2.5], "token_ids: expected integers, got float64"),
        ([1, -2], r"token_ids: expected token ids 0 to 2\*\*32 - 1, got -2 to 1"),
        ("hello", "token_ids: expected a tensor, an array or a list of token ids, got str"),
        (b"hello", "token_ids: expected a tensor, an array or a list of token ids, got bytes"),
        (None, "token_ids: expected a tensor, an array or a list of token ids, got NoneType"),
        (7, "token_ids: expected a tensor, an array or a list of token ids, got int"),
        (
            transformers.BatchEncoding({"input_ids": [[1, 2]]}),
            "token_ids: expected a tensor, an array or a list of token ids, got BatchEncoding",
        ),
    ],
)
def test_refuses_tokens_that_are_none(open_cache, tokens, message):
    with pytest.raises(ValueError, match=message):
        open_cache().session(tokens)


@pytest.mark.parametrize("salt", [b"x", 3])
def test_refuses_a_salt_that_is_no_string(open_cache, salt):
    with pytest.raises(ValueError, match=f"salt: expected a string or None, got {salt!r}"):
        open_cache().session([1, 2, 3], salt=salt)


def test_opens_with_the_smallest_tiers(open_cache, tmp_path):
    open_cache(memory_bytes=4096, disk_path=str(tmp_path), disk_bytes=4096)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 24}, "block_size: expected one of 16, 32, 64, 128, 256, got 24"),
        ({"pool_tokens": 8}, "pool_tokens: expected at least one block of 16, got 8"),
        ({"pool_tokens": 64.5}, "pool_tokens: expected an integer, got 64.5"),
        ({"salt": 3}, "salt: expected a string, got 3"),
        ({"memory_bytes": -1}, "memory_bytes: expected 0 or at least 4096, got -1"),
        ({"memory_bytes": 1}, "memory_bytes: expected 0 or at least 4096, got 1"),
        (
            {"disk_path": "x", "disk_bytes": 0},
            "disk_bytes: expected an integer of at least 4096, got 0",
        ),
        (
            {"disk_path": "x", "disk_bytes": 1},
            "disk_bytes: expected an integer of at least 4096, got 1",
        ),
        ({"disk_bytes": 4096}, "disk_bytes: expected none without disk_path, got 4096"),
        ({"block_size": 64.0}, "block_size: expected one of 16, 32, 64, 128, 256, got 64.0"),
        ({"exact_blocks": True}, "exact_blocks: expected 0 or more, got True"),
        ({"memory_bytes": True}, "memory_bytes: expected an integer, got True"),
        ({"disk_path": ""}, "disk_path: expected a directory, got ''"),
        ({"disk_path": 3}, "disk_path: expected a directory, got 3"),
    ],
)
def test_refuses_a_config_out_of_range(open_cache, options, message):
    with pytest.raises(ConfigError, match=message):
        open_cache(**options)
