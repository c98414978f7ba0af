"""Models with random weights, engines on them and requests to those, for engine.py.

Needs transformers and the C++ extension, for the radix tree; reads no files.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kvkernels import BlockAllocator, KVPool
from kvkernels.nn import PagedGroup, layer_groups
from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine import (
    Engine,
    EngineConfig,
    RequestOutput,
    SamplingParams,
)
from prefixstore.served_model import ServedModel
from prefixstore.store import Store, StoreConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig

BLOCK_SIZE = 64
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Case:
    """A model and how much it is given.

    Attributes:
        name: Of its rows.
        config: Of the model.
        prompt_lens: Tokens of the prompts whose first token is timed.
        context: Tokens of each sequence before its decode steps are timed; whole blocks.
        batches: Sequences that decode together.
        num_new: Tokens of an answer whose steps are timed.
        chunk_tokens: Prompt tokens in a forward pass.
        memory_bytes: Of the host memory tier.
        num_rounds: Of which the median is taken.
    """

    name: str
    config: LlamaConfig
    prompt_lens: tuple[int, ...] = (2048, 8192)
    context: int = 1024
    batches: tuple[int, ...] = (1, 8, 32)
    num_new: int = 64
    chunk_tokens: int = 2048
    memory_bytes: int = 3 << 30
    num_rounds: int = 3

    @property
    def pool_blocks(self) -> int:
        """Twice the room of the largest batch or prompt, so that no request waits for evictions."""
        sequence = self.context + self.num_new + BLOCK_SIZE
        num_tokens = 2 * max(max(self.batches) * sequence, *self.prompt_lens)
        return -(-num_tokens // BLOCK_SIZE)


def llama_config(num_layers: int, hidden: int, heads: tuple[int, int], **sizes: Any) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=num_layers,
        hidden_size=hidden,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=hidden // heads[0],
        max_position_embeddings=16384,
        **{"vocab_size": 128256, "rope_theta": 500000.0, **sizes},
    )


CASES = (
    Case(
        "llama_1b",
        llama_config(16, 2048, (32, 8), intermediate_size=8192, tie_word_embeddings=True),
    ),
    Case("llama_8b", llama_config(32, 4096, (32, 8), intermediate_size=14336)),
)


class Numbers:
    """A tokenizer whose text is the token ids, as models with random weights have none."""

    eos_token_id = None

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)


def make_model(case: Case, device: torch.device) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(case.config, dtype=torch.bfloat16)
    return model.eval()


def make_prompt(case: Case, num_tokens: int, seed: int) -> list[int]:
    tokens: list[int] = (
        np.random.default_rng(seed).integers(0, case.config.vocab_size, num_tokens).tolist()
    )
    return tokens


@contextmanager
def open_engine(
    case: Case, model: Any, codec: str | None = None, cuda_graphs: bool = True
) -> Iterator[Engine]:
    """An engine that always loads what its memory tier holds; without a codec it has no tier.

    `PrefixCache.open` would digest the weights, which takes longer than all that is timed here.
    """
    empty_device_cache()  # of the previous engine
    (spec,) = layer_groups(model.config, BLOCK_SIZE, model.dtype)
    pool = KVPool(spec.layout, case.pool_blocks, model.device)
    pool.data.normal_()
    group = PagedGroup(pool, BlockAllocator(pool.num_blocks), spec.layers)
    store = None
    if codec is not None:
        limits = {"queue_bytes": case.memory_bytes, "queue_entries": 1 << 16}
        tier = MemoryTier(MemoryTierConfig(case.memory_bytes))
        store = Store([tier], StoreConfig(**limits, load_timeout_s=TIMEOUT_S))
    config = CacheConfig(block_size=BLOCK_SIZE, codec=codec or "raw")
    with ExitStack() as stack:
        served = ServedModel(model)
        cache = PrefixCache([group], bytes(16), config, store, served)
        stack.callback(cache.close)
        bounds = EngineConfig(
            max_running=max(case.batches),
            max_batch_tokens=max(case.chunk_tokens, max(case.batches)),
            max_model_len=max(*case.prompt_lens, case.context + case.num_new) + 2 * BLOCK_SIZE,
            restore_policy="load",
            audit_share=0.0,
            cuda_graphs=cuda_graphs,
        )
        yield stack.enter_context(Engine(model, Numbers(), cache, bounds))


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """Collect the warnings of a logger and those below it."""
    messages: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger(name), Note(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def empty_device_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def answer(
    engine: Engine, prompts: Sequence[list[int]], num_new: int, logprobs: int | None = None
) -> list[RequestOutput]:
    """Greedy answers to prompts that are submitted together; RuntimeError if one failed."""
    sampling = SamplingParams(num_new, temperature=0, ignore_eos=True, logprobs=logprobs)
    handles = [engine.submit(prompt, sampling) for prompt in prompts]
    outputs = [handle.result() for handle in handles]
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(output.error)
    return outputs


def empty_pool(engine: Engine) -> None:
    """Empty the pool, so that only the tier holds what was computed."""
    cache, until = engine.cache, time.monotonic() + TIMEOUT_S
    while cache.stats().pool_free_blocks < cache.stats().pool_blocks:
        cache.evict_pool()
        time.sleep(1e-3)  # an answer is there before its blocks are given back
        if time.monotonic() > until:
            raise RuntimeError("blocks of the pool are held after the last answer")
    if not cache.flush(TIMEOUT_S):  # now that all blocks are queued
        raise RuntimeError("the tier does not take what was computed")


def check_source(output: RequestOutput, tier: str | None) -> None:
    """Check that all whole blocks of a prompt came from the expected place."""
    reuse = output.report.reuse
    num_whole = (reuse.num_prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    expected = {} if tier is None else {tier: num_whole}
    got = {name: num_tokens for name, num_tokens in reuse.tokens_by_tier.items() if num_tokens}
    if got != expected:
        raise RuntimeError(f"reused tokens: expected {expected}, got {got}, {reuse.misses}")
