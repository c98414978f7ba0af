"""Random-weight models small enough for a test, and how to run them with a cache.

All are on a GPU where there is one, like the `device` fixture.
"""

import contextlib

import numpy as np
import pytest
import torch
import transformers

BLOCK_SIZE = 16
VOCABULARY = 97
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval().to(DEVICE)


def tiny_gemma3():
    """Two layer groups; the window of 40 tokens is no multiple of the block size."""
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=40,
        layer_types=[f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
        max_position_embeddings=2048,
    )
    return transformers.Gemma3ForCausalLM(config).eval().to(DEVICE)


def tiny_mistral():
    """One layer group, with a window of 40 tokens."""
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=40,
        max_position_embeddings=2048,
    )
    return transformers.MistralForCausalLM(config).eval().to(DEVICE)


@contextlib.contextmanager
def calling_first(layer, function):
    """Calls a function before each pass of a layer, by patching the layer's class.

    An open cache refuses added and removed hooks, and a `forward` set on the layer.
    """
    own_call = type(layer).__call__

    def call(module, *args, **kwargs):
        if module is layer:
            function()
        return own_call(module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "__call__", call)
        yield


@torch.no_grad()
def sharp(model):
    """Make weights three times as large, so that attention, and with it the cache, matters."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight *= 3
    return model


def random_tokens(num_tokens, seed=0):
    rng = np.random.default_rng(seed)
    return as_row(rng.integers(3, VOCABULARY, num_tokens))


def as_row(token_ids):
    """The tokens as a model takes them, `[1, num_tokens]`."""
    return torch.tensor(np.array(token_ids, np.int64)[None], device=DEVICE)


@torch.no_grad()
def generate(model, tokens, past_key_values=None, num_new=12):
    return model.generate(
        tokens,
        past_key_values=past_key_values,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones_like(tokens),
    )[0, tokens.shape[1] :].tolist()


def run(cache, model, tokens, **options):
    with cache.session(tokens) as session:
        return generate(model, tokens, session, **options), session.report
