"""Hugging Face models on kvkernels' attention, compared with their own."""

import pytest
import torch
from tiny_models import (
    BLOCK_SIZE,
    MODELS,
    WINDOW,
    gemma3,
    generate,
    gpt_oss,
    llama,
    make_groups,
    needs_transformers_5,
)
from transformers import (
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    MoshiConfig,
    MoshiForCausalLM,
)

from kvkernels import KVLayout, UnsupportedError
from kvkernels.nn import layer_groups
from kvkernels.nn.transformers import (
    IMPLEMENTATION,
    PagedCache,
    attend,
    install,
    paged_attention,
    uninstall,
)

LENGTHS = {"one token": 1, "within a block": 9, "crossing the window": 70}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_logits_equal_sdpa(model, length):
    ids = torch.randint(1, 128, (2, length))
    with torch.no_grad():
        want = model(ids).logits
        with paged_attention(model):
            without_cache = model(ids, use_cache=False).logits
            with_dynamic_cache = model(ids).logits
            with PagedCache(make_groups(model), batch_size=2) as cache:
                paged = model(ids, past_key_values=cache).logits
    for got in (without_cache, with_dynamic_cache, paged):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_greedy_tokens_equal_sdpa(model, batch_size):
    ids = torch.randint(1, 128, (batch_size, 21))
    want = generate(model, ids)
    with paged_attention(model):
        assert torch.equal(generate(model, ids), want)
        groups = make_groups(model)
        with PagedCache(groups, batch_size=batch_size) as cache:
            assert torch.equal(generate(model, ids, past_key_values=cache), want)
        with PagedCache(groups, batch_size=batch_size) as cache:
            chunked = generate(model, ids, past_key_values=cache, prefill_chunk_size=8)
            assert torch.equal(chunked, want)
    assert all(group.allocator.num_free == 32 for group in groups)


def test_works_in_inference_mode_and_out_of_it():
    model = llama()
    ids = torch.randint(1, 128, (1, 40))
    with torch.no_grad():
        want = model(ids).logits
    with paged_attention(model), PagedCache(make_groups(model)) as cache:
        with torch.inference_mode():
            first = model(ids[:, :15], past_key_values=cache).logits
        with torch.no_grad():
            rest = model(ids[:, 15:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), want, rtol=1e-4, atol=1e-4)


def test_autocast_gives_keys_and_values_one_dtype(model):
    ids = torch.randint(1, 128, (1, 40))
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            want = model(ids, use_cache=False).logits
            with paged_attention(model), PagedCache(make_groups(model)) as cache:
                without_cache = model(ids, use_cache=False).logits
                with_dynamic_cache = model(ids).logits
                paged = torch.cat(
                    [model(part, past_key_values=cache).logits for part in ids.split(39, 1)], 1
                )
    for got in (without_cache, with_dynamic_cache, paged):
        assert (got - exact).norm() <= 1.25 * (want - exact).norm()


def test_assisted_generation_rolls_the_cache_back():
    model, assistant = llama(), llama()
    ids = torch.randint(1, 128, (1, 21))
    want = generate(model, ids)
    groups = make_groups(model)
    with paged_attention(model), PagedCache(groups) as cache:
        got = generate(model, ids, past_key_values=cache, assistant_model=assistant)
    assert torch.equal(got, want)


# ---- installing ---------------------------------------------------------------------------------


def test_install_is_undone():
    model = llama()
    before = model.config._attn_implementation
    install(model)
    install(model)
    assert model.config._attn_implementation == IMPLEMENTATION
    with paged_attention(model):
        pass
    assert model.config._attn_implementation == IMPLEMENTATION  # as it was before the block
    uninstall(model)
    assert model.config._attn_implementation == IMPLEMENTATION  # installed twice
    uninstall(model)
    assert model.config._attn_implementation == before
    uninstall(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("make", ["two of one configuration", "a model and the one inside"])
def test_models_that_share_a_configuration_are_given_back_with_the_last(make, first):
    one = llama()
    other = one.model if make == "a model and the one inside" else type(one)(one.config).eval()
    assert one.config is other.config
    one.set_attn_implementation("sdpa")
    install(one)
    install(other)
    both = [one, other]
    uninstall(both.pop(first))
    assert one.config._attn_implementation == IMPLEMENTATION
    uninstall(both.pop())
    assert one.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_part_of_a_model_may_share_its_configuration_with_it(order):
    model = gemma3_with_images()
    both = [model, model.model.language_model]
    config, text_config = (one.config for one in both)
    assert config.text_config is text_config
    before = config._attn_implementation, text_config._attn_implementation
    for index in order:
        install(both[index])
    uninstall(model)
    assert config._attn_implementation == before[0]
    assert text_config._attn_implementation == IMPLEMENTATION
    uninstall(both[1])
    assert (config._attn_implementation, text_config._attn_implementation) == before


def gemma3_with_images():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**gemma3().config.to_dict()}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )


def test_install_leaves_the_vision_part_alone():
    model = gemma3_with_images()
    config = model.config
    before = config.vision_config._attn_implementation
    install(model)
    assert config.text_config._attn_implementation == IMPLEMENTATION
    assert config.vision_config._attn_implementation == before
    uninstall(model)
    assert config.text_config._attn_implementation == before


# ---- what no kernel serves ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, "padding"),
        ({"attention_mask": torch.zeros(2, 1, 3, 3)}, "custom mask"),
        ({"position_ids": torch.tensor([[0, 1, 0]] * 2)}, "packed sequences"),
    ],
)
def test_a_forward_pass_with_an_unserved_argument_is_refused(options, message):
    model = llama()
    with torch.no_grad(), paged_attention(model), pytest.raises(UnsupportedError, match=message):
        model(torch.ones(2, 3, dtype=torch.int64), use_cache=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam"),
        ({"cache_implementation": "static"}, "static cache"),
    ],
)
def test_generating_with_an_unserved_option_is_refused(options, message):
    model = llama()
    ids = torch.ones(1, 3, dtype=torch.int64)
    if "num_beams" in options:
        options = {**options, "past_key_values": PagedCache(make_groups(model), batch_size=2)}
    with paged_attention(model), pytest.raises(UnsupportedError, match=message):
        generate(model, ids, **options)


def test_generate_refuses_a_static_cache_beside_windows():
    model = gemma3()
    ids = torch.ones(1, 3, dtype=torch.int64)
    with paged_attention(model), pytest.raises(UnsupportedError, match="static cache"):
        generate(model, ids, cache_implementation="static")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "attention weights"),
        ({"head_mask": torch.ones(4)}, "head mask"),
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"indices": torch.zeros(1)}, "indices: .*sparse attention"),
        ({"block_indices": torch.zeros(1)}, "block_indices: .*sparse attention"),
        ({"gate": torch.zeros(1)}, "gate: expected no such argument"),
        ({"dropout": 0.1}, "dropout: expected 0"),
        ({"is_causal": False}, "cross-attention"),
    ],
)
def test_attention_with_an_unserved_argument_is_refused(arguments, message):
    states = torch.zeros(1, 2, 3, 16)
    with pytest.raises(UnsupportedError, match=message):
        attend(torch.nn.Module(), states, states, states, None, **arguments)


def test_attention_takes_what_asks_nothing_of_it():
    states = torch.randn(1, 2, 3, 16)
    want, _ = attend(torch.nn.Module(), states, states, states, None)
    idle = {"position_ids": torch.arange(3)[None], "use_cache": True, "head_mask": None}
    got, _ = attend(torch.nn.Module(), states, states, states, None, **idle, gate=None)
    assert torch.equal(got, want)


def test_attention_refuses_values_of_another_width():
    states = torch.zeros(1, 2, 3, 16)
    with pytest.raises(UnsupportedError, match="value: expected the shape of key"):
        attend(torch.nn.Module(), states, states, torch.zeros(1, 2, 3, 8), None)


def test_refuses_gradients():
    model = llama()
    ids = torch.ones(1, 3, dtype=torch.int64)
    with paged_attention(model), pytest.raises(ValueError, match="inference only"):
        model(ids, use_cache=False)


def test_refuses_gradients_of_sinks_alone():
    model = gpt_oss().requires_grad_(False)
    model.model.layers[0].self_attn.sinks.requires_grad_(True)
    ids = torch.ones(1, 3, dtype=torch.int64)
    with paged_attention(model), pytest.raises(ValueError, match=r"s_aux: .*inference only"):
        model(ids, use_cache=False)


@needs_transformers_5
def test_paged_cache_of_layers_that_change_keys_says_so():
    config = JetMoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = JetMoeForCausalLM(config).eval()
    ids = torch.ones(1, 3, dtype=torch.int64)
    with torch.no_grad(), paged_attention(model), PagedCache(make_groups(model)) as cache:
        model(ids, use_cache=False)
        with pytest.raises(UnsupportedError, match="its layers change keys or values themselves"):
            model(ids, past_key_values=cache)


def test_paged_cache_under_another_attention_says_what_to_do():
    model = llama()
    cache = PagedCache(make_groups(model))
    with torch.no_grad(), pytest.raises(UnsupportedError, match="install"):
        model(torch.ones(1, 3, dtype=torch.int64), past_key_values=cache)


def test_bidirectional_window_is_refused():
    model = gemma3(use_bidirectional_attention=True)
    ids = torch.ones(1, 3, dtype=torch.int64)
    with torch.no_grad(), paged_attention(model), pytest.raises(UnsupportedError):
        model(ids, use_cache=False)


# ---- layer groups -------------------------------------------------------------------------------


def test_one_group_for_full_attention():
    (group,) = layer_groups(llama().config, 32, torch.bfloat16)
    assert group.layout == KVLayout(3, 2, 16, 32, torch.bfloat16)
    assert (group.layers, group.window) == ((0, 1, 2), None)


def test_two_groups_for_gemma_the_full_one_first():
    full, sliding = layer_groups(gemma3().config, BLOCK_SIZE, torch.float32)
    assert (full.layers, full.window) == ((1, 3), None)
    assert (sliding.layers, sliding.window) == ((0, 2), WINDOW)
    assert sliding.layout == KVLayout(2, 1, 16, BLOCK_SIZE, torch.float32)


def test_window_of_a_configuration_without_layer_types():
    from transformers import MistralConfig

    config = MistralConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, sliding_window=100
    )
    assert [group.window for group in layer_groups(config, 16)] == [100]


@needs_transformers_5
def test_window_that_no_layer_of_the_model_has():
    config = MoshiConfig(
        vocab_size=128,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        max_position_embeddings=128,
    )
    model = MoshiForCausalLM(config).eval()
    ids = torch.randint(1, 128, (1, 40))
    groups = make_groups(model)
    assert [group.window for group in groups] == [None]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        with paged_attention(model), PagedCache(groups) as cache:
            got = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"num_kv_shared_layers": 1}, "share another layer's KV"),
        ({"attention_chunk_size": 8}, "chunked attention"),
        ({"kv_lora_rank": 8}, "latent attention"),
        ({"v_head_dim": 8}, "values narrower"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"is_causal": False}, "bidirectional"),
        ({"alibi": True}, "ALiBi"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type dynamic"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type longrope"),
        ({"rope_parameters": {"full": {"rope_type": "dynamic"}}}, "rope type dynamic"),
        ({"layer_types": ["linear_attention"] * 2}, "linear_attention"),
    ],
)
def test_layer_groups_names_what_is_not_served(changes, feature):
    config = LlamaConfig(num_hidden_layers=2)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedError, match=feature):
        layer_groups(config, 16)
