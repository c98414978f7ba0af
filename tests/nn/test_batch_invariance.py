"""A token gets the same bits in any batch: whole models, and models that are refused."""

import functools
import itertools
import random

import pytest
import tiny_models
import torch
from packed_forward import PackedModel
from transformers import DynamicCache
from transformers.activations import ACT2FN

from kvkernels import UnsupportedError
from kvkernels.nn import batch_invariance, fused_layers
from kvkernels.nn.batch_invariance import batch_invariant
from kvkernels.nn.transformers import paged_attention

MODELS = {
    "llama": tiny_models.llama,
    # Odd widths: the ends of tensors are not whole vectors.
    "llama_odd": lambda: tiny_models.llama(intermediate_size=77, head_dim=16),
    "gemma2": tiny_models.gemma2,
    "gemma3": tiny_models.gemma3,
    "qwen2": tiny_models.qwen2,
}
SIZES = (1, 1, 2, 3, 7, 16, 33, 64)


@pytest.fixture
def _any_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_packed(model, lengths, block_size=tiny_models.BLOCK_SIZE):
    config = model.config.get_text_config(decoder=True)
    sequences = [torch.randint(0, config.vocab_size, (length,)) for length in lengths]
    num_blocks = sum(-(-length // block_size) for length in lengths) + 1
    groups = tiny_models.make_groups(model, num_blocks, block_size)
    return PackedModel(model, groups, sequences)


def check_any_steps(packed, sizes, max_threads=3):
    """Run all in random steps; each token must get the logits of a run of its whole sequence."""
    rng = random.Random(0)
    torch.set_num_threads(2)
    whole = packed.run_whole()
    for step in packed.random_steps(rng, sizes):
        torch.set_num_threads(rng.randint(1, max_threads))
        for (seq, begin, end), logits in zip(step, packed.run(step), strict=True):
            assert torch.equal(logits, whole[seq][begin:end]), (step, seq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("_any_threads")
def test_any_steps_give_the_same_bits(name, dtype):
    model = MODELS[name]().to(dtype)
    with paged_attention(model), batch_invariant(model):
        check_any_steps(make_packed(model, (130, 75, 41, 1)), SIZES)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("_any_threads")
def test_any_steps_give_the_same_bits_with_fused_layers(name):
    model = MODELS[name]().to(torch.bfloat16)
    assert fused_layers.install(model) > 0
    with paged_attention(model), batch_invariant(model):
        check_any_steps(make_packed(model, (130, 75, 41, 1)), SIZES)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2"])
def test_cache_that_lets_tokens_go_gives_the_same_bits(name):
    model = MODELS[name]()
    tokens = torch.randint(0, 128, (1, 120))
    cuts = (0, 70, 71, 72, 90, 91, 120)
    with torch.no_grad(), paged_attention(model), batch_invariant(model):
        want = model(tokens, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = [
            model(tokens[:, begin:end], past_key_values=cache).logits
            for begin, end in itertools.pairwise(cuts)
        ]
    assert torch.equal(torch.cat(parts, dim=1), want)


@pytest.mark.usefixtures("_any_threads")
def test_without_batch_invariance_bits_differ():
    model = tiny_models.llama()
    with paged_attention(model), pytest.raises(AssertionError):
        check_any_steps(make_packed(model, (130, 75, 41, 1)), SIZES)


def test_computes_what_the_model_does():
    model = tiny_models.llama()
    tokens = torch.randint(0, 128, (2, 70))
    with torch.inference_mode():
        expected = model(tokens).logits
        with paged_attention(model), batch_invariant(model):
            got = model(tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_uninstalling_gives_the_model_back():
    model = tiny_models.llama()
    layer = model.model.layers[0]
    with batch_invariant(model):
        with batch_invariant(model):
            assert "forward" in vars(layer.mlp.up_proj)
        assert "forward" in vars(layer.mlp.up_proj)
        assert batch_invariance.is_batch_invariant(layer.self_attn)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not batch_invariance.is_batch_invariant(layer.self_attn)
    batch_invariance.uninstall(model)


ACTIVATIONS = {
    "element": torch.nn.GELU,
    "in_place": lambda: torch.nn.SiLU(inplace=True),
    "softmax": lambda: torch.nn.Softmax(dim=-1),
    "log_softmax": lambda: torch.nn.LogSoftmax(dim=-1),
    "softmin": lambda: torch.nn.Softmin(dim=-1),
    "one_slope_a_channel": lambda: torch.nn.PReLU(37),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.usefixtures("_any_threads")
def test_activations_of_elements_and_rows_stay_what_they_are(name):
    model = torch.nn.Sequential(torch.nn.Linear(16, 37), ACTIVATIONS[name]()).eval()
    rows = torch.randn(2000, 16)
    with torch.inference_mode():
        expected = model(rows)
        with batch_invariant(model):
            whole = model(rows)
            torch.testing.assert_close(whole, expected)
            for num_threads, (begin, end) in enumerate([(0, 1), (3, 1700), (1999, 2000)], start=1):
                torch.set_num_threads(num_threads)
                assert torch.equal(model(rows[begin:end]), whole[begin:end])


@pytest.mark.parametrize("name", ACT2FN)
def test_takes_every_activation_that_a_config_can_name(name):
    activation, rows = ACT2FN[name], torch.randn(3, 5)
    with torch.inference_mode():
        expected = activation(rows)
        with batch_invariant(torch.nn.Sequential(activation)):
            torch.testing.assert_close(activation(rows), expected)


def test_an_activation_in_place_changes_its_input():
    model = torch.nn.Sequential(torch.nn.SiLU(inplace=True))
    rows = torch.randn(3, 5)
    expected = torch.nn.functional.silu(rows)
    with torch.inference_mode(), batch_invariant(model):
        assert model(rows) is rows
    torch.testing.assert_close(rows, expected)


def as_meta(layer):
    return layer.to("meta"), torch.empty(3, 8, device="meta")


def as_float64(layer):
    return layer.double(), torch.zeros(3, 8, dtype=torch.float64)


def with_a_short_bias(layer):
    layer.bias = torch.nn.Parameter(torch.zeros(5))
    return layer, torch.zeros(3, 8)


def with_a_bias_elsewhere(layer):
    layer.bias = torch.nn.Parameter(torch.zeros(6, device="meta"))
    return layer, torch.zeros(3, 8)


def with_a_row_for_weight(layer):
    layer.weight = torch.nn.Parameter(torch.zeros(8))
    return layer, torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        (as_meta, UnsupportedError, "input: expected a tensor on the CPU, got meta"),
        (as_float64, ValueError, "input: expected dtype .*, got torch.float64"),
        (with_a_short_bias, ValueError, r"bias: expected shape \[6\], got \[5\]"),
        (with_a_bias_elsewhere, ValueError, "bias: expected device cpu, got meta"),
        (with_a_row_for_weight, ValueError, r"weight: expected shape \[any, any\], got \[8\]"),
    ],
)
@torch.inference_mode()
def test_refuses_a_layer_that_was_moved_or_changed_since(change, error, what):
    layer = torch.nn.Linear(8, 6)
    with batch_invariant(layer):
        layer, rows = change(layer)
        with pytest.raises(error, match=what):
            layer(rows)


class OwnLinear(torch.nn.Linear):
    pass


def with_own_linear():
    return torch.nn.Sequential(OwnLinear(3, 3))


def with_a_matrix_of_its_own():
    model = torch.nn.Sequential(torch.nn.Identity())
    model[0].experts = torch.nn.Parameter(torch.zeros(2, 2))
    return model


def with_a_transposed_weight():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    model[0].weight.data = torch.zeros(3, 4).t()
    return model


def with_packed_weights():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})


def with_activation(activation):
    return torch.nn.Sequential(torch.nn.Linear(3, 4), activation)


def with_another_forward():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    model[0].forward = lambda input: input
    return model


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (with_own_linear, "OwnLinear"),
        (with_a_transposed_weight, r"stride 1 .*, got \(1, 4\) in 0"),
        (with_packed_weights, r"packed ones in 0\._packed_params of LinearPackedParams"),
        (with_a_matrix_of_its_own, r"0\.experts in Identity"),
        (with_another_forward, "forward of their class, got 0 with a function of test_batch_inv"),
        (
            lambda: tiny_models.llama(
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            ),
            "rotary frequencies",
        ),
        (lambda: torch.nn.Linear(3, 3, device="meta"), "on meta"),
        (lambda: with_activation(torch.nn.GLU()), "rows .*got 1 of GLU"),
        (lambda: with_activation(torch.nn.Softmax(dim=0)), "rows .*got 1 of Softmax"),
        (lambda: with_activation(torch.nn.Softmax2d()), "rows .*got 1 of Softmax2d"),
    ],
)
def test_refuses_what_it_cannot_promise(make, what):
    model = make()
    before = [vars(module).get("forward") for module in model.modules()]
    with pytest.raises(UnsupportedError, match=what):
        batch_invariance.install(model)
    assert [vars(module).get("forward") for module in model.modules()] == before


def test_refuses_another_forward_beneath_ours():
    model = tiny_models.llama()
    model.forward = functools.wraps(model.forward)(lambda *args: None)
    with (
        paged_attention(model),
        pytest.raises(UnsupportedError, match="forward of their class, got a model with a func"),
    ):
        batch_invariance.install(model)


@pytest.mark.model
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prepare", ["prepare_smollm2", "prepare_gemma3"])
@pytest.mark.usefixtures("_any_threads")
def test_real_models_give_the_same_bits(prepare, dtype):
    from prefixstore import models

    model = models.load_model(getattr(models, prepare)(), dtype)
    # A sequence is longer than Gemma's window of 512 and than a chunk of keys.
    with paged_attention(model), batch_invariant(model):
        packed = make_packed(model, (550, 70), block_size=64)
        check_any_steps(packed, (1, 16, 64, 250), max_threads=2)
