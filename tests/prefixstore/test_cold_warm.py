"""Greedy output of real models is the same, token for token, however the cache stands.

Cold, warm from the pool, and warm after a restart from disk, beside transformers' own `sdpa`
attention without our cache. In float32. Where a token differs, the two best logits must tie
within 1e-4; the test prints where.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from prefixstore.cache import PrefixCache
from prefixstore.models import load_model, prepare_gemma3, prepare_smollm2

pytestmark = pytest.mark.model

NUM_NEW = 64
TIE = 1e-4
QUESTIONS = Path(__file__).parents[1] / "data" / "mt_bench_question.jsonl"


def prompts(tokenizer, count, chat):
    """Two-turn chats of MT-bench, every fourth one behind the three questions before it."""
    lines = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    texts = ["\n\n".join(line["turns"]) for line in lines]
    chosen = []
    for number in range(count):
        text = texts[number * 80 // count]
        if number % 4 == 3:
            text = "\n\n".join([*texts[number : number + 12], text])
        if chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        chosen.append(tokenizer(text, return_tensors="pt").input_ids)
    return chosen


@torch.no_grad()
def generate(model, tokens, past_key_values=None):
    return model.generate(
        tokens,
        past_key_values=past_key_values,
        max_new_tokens=NUM_NEW,
        min_new_tokens=NUM_NEW,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones_like(tokens),
    )


@torch.no_grad()
def gap_at(model, tokens):
    """Distance of the two best logits after `tokens`."""
    best = model(tokens, use_cache=False).logits[0, -1].float().topk(2).values
    return (best[0] - best[1]).item()


def assert_same(model, expected, actual, what):
    """Equal, or parting where the two best logits tie."""
    if torch.equal(expected, actual):
        return
    at = int((expected != actual).nonzero()[0, 1])
    gap = gap_at(model, expected[:, :at])
    print(f"{what}: parts at token {at}, where the two best logits are {gap:.1e} apart")
    assert gap <= TIE, f"{what}: parts at token {at} with logits {gap:.1e} apart"


@pytest.mark.parametrize(
    ("prepare", "count", "chat"),
    [
        pytest.param(prepare_smollm2, 20, True, id="smollm2-135m", marks=pytest.mark.timeout(1800)),
        pytest.param(prepare_gemma3, 5, False, id="gemma3-270m"),
    ],
)
def test_cold_warm_and_restarted_outputs_are_equal(prepare, count, chat, tmp_path):
    path = prepare()
    model = load_model(path, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = prompts(tokenizer, count, chat)
    options = {"block_size": 16, "pool_tokens": 16384, "memory_bytes": 0, "disk_path": tmp_path}
    model.set_attn_implementation("sdpa")
    plain = [generate(model, tokens) for tokens in inputs]
    with PrefixCache.open(model, **options) as cache:
        for number, (tokens, expected) in enumerate(zip(inputs, plain, strict=True)):
            for state in ("cold", "warm"):
                with cache.session(tokens) as session:
                    out = generate(model, tokens, session)
                    reused = session.report.num_reused
                assert_same(model, expected, out, f"{state} prompt {number}")
                whole_blocks = (tokens.shape[1] - 1) // 16 * 16
                assert reused == whole_blocks if state == "warm" else reused < whole_blocks
        assert cache.check() == []
    with PrefixCache.open(model, **options) as cache:
        for number, (tokens, expected) in enumerate(zip(inputs, plain, strict=True)):
            with cache.session(tokens) as session:
                out = generate(model, tokens, session)
                by_tier = session.report.tokens_by_tier
            assert_same(model, expected, out, f"restarted prompt {number}")
            assert sum(by_tier.values()) == (tokens.shape[1] - 1) // 16 * 16
            assert by_tier.get("disk", 0) > 0
        assert cache.check() == []
