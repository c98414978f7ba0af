"""The placeholder for a mask tensor: which layers may get it, and which may not."""

import pytest
import torch
import transformers
from accelerate import dispatch_model
from tiny_models import gemma3, llama, make_groups, needs_transformers_5, qwen2_moe

from kvkernels import UnsupportedError
from kvkernels.nn.transformers import PagedCache, attend, paged_attention
from kvkernels.nn.transformers_mask import MaskStandIn

STATES = torch.randn(1, 2, 5, 16)


def test_keys_that_the_mask_is_not_of_are_refused():
    mask = MaskStandIn(window=None, num_keys=3, first_key=0)
    with pytest.raises(UnsupportedError, match=r"key: expected 3 keys .* got 5"):
        attend(torch.nn.Module(), STATES[:, :, :3], STATES, STATES, mask)


@pytest.mark.skipif(
    not hasattr(transformers, "DeepseekV4Config"), reason="transformers has no DeepSeek-V4"
)
def test_model_that_compresses_keys_is_refused():
    config = transformers.DeepseekV4Config(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=16,
        q_lora_rank=16,
        o_lora_rank=16,
        o_groups=2,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        index_n_heads=2,
        index_head_dim=32,
        index_topk=8,
        sliding_window=8,
    )
    model = transformers.DeepseekV4ForCausalLM(config).eval()
    ids = torch.randint(1, 128, (1, 160))
    with torch.no_grad(), paged_attention(model), pytest.raises(UnsupportedError, match="keys"):
        model(ids, use_cache=False)


@needs_transformers_5
def test_mask_that_no_layer_uses_is_not_refused():
    model = qwen2_moe()
    ids = torch.randint(1, 128, (2, 30))
    with torch.no_grad():
        want = model(ids).logits
        with paged_attention(model), PagedCache(make_groups(model), batch_size=2) as cache:
            without_cache = model(ids, use_cache=False).logits
            paged = model(ids, past_key_values=cache).logits
    for got in (without_cache, paged):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("refusal", [None, "attention_mask: expected another"])
def test_layer_that_computes_with_the_mask_is_refused(refusal):
    mask = MaskStandIn(window=4, num_keys=5, first_key=0, refusal=refusal)
    message = refusal or "computes with it itself"
    with pytest.raises(UnsupportedError, match="computes with it itself"):
        STATES + mask
    with pytest.raises(UnsupportedError, match=message):
        mask[:, :, :, :5]
    with pytest.raises(UnsupportedError, match=message):
        _ = mask.shape
    assert not hasattr(mask, "shape")


def test_model_of_which_accelerate_keeps_a_layer_on_disk(tmp_path):
    model = llama(num_hidden_layers=2)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    ids = torch.randint(1, 128, (1, 30))
    with torch.no_grad():
        want = model(ids).logits
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
        with paged_attention(model), PagedCache(make_groups(model)) as cache:
            without_cache = model(ids, use_cache=False).logits
            paged = model(ids, past_key_values=cache).logits
    for got in (without_cache, paged):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make_model", [llama, gemma3])
def test_compiled_model_without_a_cache(make_model):
    model = make_model()
    ids = torch.randint(1, 128, (1, 40))
    positions = torch.arange(40)[None]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        with paged_attention(model):
            got = compiled(ids, position_ids=positions, use_cache=False).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            with pytest.raises(UnsupportedError, match="packed sequences"):
                compiled(ids, position_ids=positions % 16, use_cache=False)
