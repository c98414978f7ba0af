"""Random-weight models small enough for a test, and pools for them."""

import pytest
import torch
import transformers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from kvkernels import BlockAllocator, KVPool
from kvkernels.nn import PagedGroup, layer_groups

# transformers 4.57 looks up the attention of fewer models by name.
needs_transformers_5 = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="the model is served in transformers 5"
)

BLOCK_SIZE = 16
WINDOW = 24  # not a multiple of the block size
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def llama(**changes):
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 3, **changes})
    return _initialised(LlamaForCausalLM, config)


def gemma3(**changes):
    sizes = {
        **SIZES,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 4,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **changes,
    }
    return _initialised(Gemma3ForCausalLM, Gemma3TextConfig(**sizes))


def qwen2():
    """Biases on keys, and a window on the later layers only."""
    config = Qwen2Config(
        **SIZES,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    )
    return _initialised(Qwen2ForCausalLM, config)


def qwen2_moe():
    """The configuration's window is None, the default, and no layer has one."""
    config = Qwen2MoeConfig(
        **SIZES,
        num_hidden_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    return _initialised(Qwen2MoeForCausalLM, config)


def gemma2():
    """A soft cap low enough to matter, and a window on every other layer."""
    config = Gemma2Config(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=16,
        num_hidden_layers=3,
        sliding_window=WINDOW,
        attn_logit_softcapping=1.5,
    )
    return _initialised(Gemma2ForCausalLM, config)


def phi3():
    """Only three quarters of each head are rotated."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    # transformers 4.57 reads the factor only as a field of its own.
    config = Phi3Config(
        **SIZES, num_hidden_layers=3, rope_parameters=rope, partial_rotary_factor=0.75
    )
    return _initialised(Phi3ForCausalLM, config)


def nemotron():
    """Half of each head is rotated; has layer norms, and one matrix before the activation."""
    config = NemotronConfig(**SIZES, head_dim=16, num_hidden_layers=3, partial_rotary_factor=0.5)
    return _initialised(NemotronForCausalLM, config)


def gpt_oss():
    """Attention sinks that take a large share of the weight, and a window on every other layer."""
    config = GptOssConfig(
        **SIZES,
        head_dim=16,
        num_hidden_layers=3,
        sliding_window=WINDOW,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = _initialised(GptOssForCausalLM, config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=1.0)
    return model


MODELS = {
    "llama": llama,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt_oss": gpt_oss,
    "qwen2": qwen2,
}


def _initialised(model_class, config):
    model = model_class(config).eval()
    # With transformers' default of 0.02 attention is almost uniform and wrong masks go unnoticed.
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def make_groups(model, num_blocks=32, block_size=BLOCK_SIZE):
    """Paged groups whose pools hold NaN in unused slots."""
    groups = []
    for spec in layer_groups(model.config, block_size, model.dtype):
        pool = KVPool(spec.layout, num_blocks)
        pool.data.fill_(float("nan"))
        groups.append(PagedGroup(pool, BlockAllocator(num_blocks), spec.layers, spec.window))
    return groups


def generate(model, ids, num_new=24, **options):
    return model.generate(ids, max_new_tokens=num_new, do_sample=False, **options)
