"""Models and inputs whose keys and values tokens alone do not tell: a cache refuses them."""

import pytest
import torch
import transformers
from cached_models import VOCABULARY, generate, random_tokens, run

from kvkernels.errors import UnsupportedError
from prefixstore.cache import PrefixCache


def test_positions_that_skip_padding_tokens_are_refused():
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        is_decoder=True,
    )
    model = transformers.RobertaForCausalLM(config).eval()
    with pytest.raises(UnsupportedError, match="that count every token, got RobertaEmbeddings"):
        PrefixCache.open(model, block_size=16, pool_tokens=256)


IMAGE = VOCABULARY - 1


def tiny_llava():
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_a_picture_is_not_told_by_tokens():
    model = tiny_llava()
    tokens = torch.cat([torch.full((1, 4), IMAGE), torch.randint(0, IMAGE, (1, 36))], dim=1)
    options = {"max_new_tokens": 2, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
    with PrefixCache.open(model, block_size=16, pool_tokens=256) as cache:
        with cache.session(tokens) as session, pytest.raises(UnsupportedError, match="session"):
            picture = torch.randn(1, 3, 28, 28)
            model.generate(tokens, pixel_values=picture, past_key_values=session, **options)
        # Without one, `generate` gives an empty collection of what it has encoded.
        for num_reused in (0, 32):
            with cache.session(tokens) as session:
                assert session.report.num_reused == num_reused
                model.generate(tokens, past_key_values=session, **options)


def tiny_qwen2_vl():
    """Shifts positions behind a picture, which it keeps in an attribute between passes."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
        "rope_scaling": rope,
    }
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}
    names = ("image", "video", "vision_start", "vision_end", "bos", "eos")
    special = {f"{name}_token_id": 1 for name in names}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **special)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def test_a_model_for_pictures_answers_prompts_of_text():
    model, tokens = tiny_qwen2_vl(), random_tokens(40).cpu()
    plain = generate(model, tokens)
    with PrefixCache.open(model, block_size=16, pool_tokens=256) as cache:
        for num_reused in (0, 32):
            answer, report = run(cache, model, tokens)
            assert (answer, report.num_reused) == (plain, num_reused)
        identity = cache.blocks.identity("")
    model.model.rope_deltas = None
    with PrefixCache.open(model, block_size=16, pool_tokens=256) as cache:
        assert cache.blocks.identity("") == identity


@torch.no_grad()
def test_positions_behind_a_picture_are_not_told_by_tokens():
    model, tokens = tiny_qwen2_vl(), random_tokens(40).cpu()
    with (
        PrefixCache.open(model, block_size=16, pool_tokens=256) as cache,
        cache.session(tokens) as session,
    ):
        model.model.rope_deltas = torch.tensor([[-5]])
        positions = torch.arange(40).expand(3, 1, -1)
        for position_ids in (None, positions - 5):
            with pytest.raises(ValueError, match="position_ids: expected"):
                model(tokens, position_ids=position_ids, past_key_values=session)
        model(tokens, position_ids=positions, past_key_values=session)


def test_types_of_tokens_are_not_told_by_tokens():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=256
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = random_tokens(40)
    with (
        PrefixCache.open(model, block_size=16, pool_tokens=256) as cache,
        cache.session(tokens) as session,
        pytest.raises(UnsupportedError, match="token_type_ids: expected input_ids alone"),
    ):
        model(tokens, token_type_ids=torch.zeros_like(tokens), past_key_values=session)


def test_arguments_without_a_name_are_refused():
    class Passing(transformers.GPT2LMHeadModel):
        def forward(self, *args, **options):
            return super().forward(*args, **options)

    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2)
    model, tokens = Passing(config).eval(), random_tokens(40).cpu()
    with (
        torch.no_grad(),
        PrefixCache.open(model, block_size=16, pool_tokens=256) as cache,
        cache.session(tokens) as session,
    ):
        with pytest.raises(UnsupportedError, match="arguments by name with a session, got 1 with"):
            model(tokens, past_key_values=session)
        model(input_ids=tokens, past_key_values=session)
