"""`PrefixCache.session` with `generate`, as an engine to be tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from prefixstore.config import CacheConfig
from prefixstore.errors import TierTimeout
from prefixstore.store import StoreConfig
from prefixstore.testing.adapter import Ability, Answer, Setup, Tokens

if TYPE_CHECKING:
    from prefixstore.cache import PrefixCache

FLUSH_TIMEOUT_S = 60.0


class CacheAdapter:
    """One prompt after another through `model.generate`.

    Args:
        model: A Hugging Face causal language model, in evaluation mode.
    """

    name = "session"
    abilities: frozenset[Ability] = frozenset()

    def __init__(self, model: Any) -> None:
        self._model = model

    def open(self, setup: Setup) -> CacheSubject:
        # It brings transformers, which a command's --help does without.
        from prefixstore.cache import PrefixCache

        return CacheSubject(self._model, PrefixCache.open(self._model, cache_config(setup)))


class CacheSubject:
    """See `Subject`."""

    def __init__(self, model: Any, cache: PrefixCache) -> None:
        self._model = model
        self._cache = cache

    def answer(self, prompts: Sequence[Tokens], num_new: int, salt: str) -> list[Answer]:
        return [self._answer_one(prompt, num_new, salt) for prompt in prompts]

    def flush(self) -> None:
        flush(self._cache)

    def evict(self) -> None:
        self._cache.evict_pool()

    def check(self) -> list[str]:
        return self._cache.check()

    def close(self) -> None:
        self._cache.close()

    def _answer_one(self, prompt: Tokens, num_new: int, salt: str) -> Answer:
        ids = torch.tensor([prompt], device=self._model.device)
        # A fresh configuration: the model's own may end answers early or penalise tokens.
        config = type(self._model.generation_config)(
            max_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        own, self._model.generation_config = self._model.generation_config, config
        try:
            session = self._cache.session(ids, salt=salt)
            with session, torch.inference_mode():
                out = self._model.generate(
                    ids, attention_mask=torch.ones_like(ids), past_key_values=session
                )
        finally:
            self._model.generation_config = own
        tokens = out.sequences[0, len(prompt) :]
        logits = torch.cat(out.logits).float()  # [num_new, vocab_size]
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return Answer(
            tokens=tuple(tokens.tolist()),
            logprobs=tuple(logprobs.tolist()),
            first_logits=logits[0].cpu().numpy().copy(),
            reused=session.report.tokens_by_tier,
        )


def cache_config(setup: Setup) -> CacheConfig:
    """A cache as the setup says, that drops nothing and waits for slow tiers."""
    return CacheConfig(
        block_size=setup.block_size,
        pool_tokens=setup.pool_tokens,
        tiers=setup.tiers,
        codec=setup.codec,
        restore_policy="load",  # small models compute sooner than slow tiers give
        store=StoreConfig(
            queue_bytes=1 << 40, held_bytes=1 << 40, queue_entries=1 << 20, load_timeout_s=30.0
        ),
    )


def flush(cache: PrefixCache) -> None:
    """Have the tiers hold what was computed.

    Raises:
        TierTimeout: If the tiers do not take it in time.
    """
    if not cache.flush(FLUSH_TIMEOUT_S):
        raise TierTimeout(f"flush: expected the tiers to hold all within {FLUSH_TIMEOUT_S:g} s")
