"""One request, timed: when its first token came, when its last, and what was reused for it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Measured:
    """What one request cost.

    Attributes:
        phase: A key of `summary.PHASES`.
        question: Its text.
        num_prompt_tokens: Length of the prompt.
        ttft_s: From the prompt's token ids to the first new token; looking up, loading and
            verifying cached blocks is part of it, tokenising is not.
        total_s: From the prompt's token ids to the last new token.
        tokens_by_tier: Prompt tokens reused, by where they lay.
        num_recomputed: Prompt tokens the model computed.
        answer: The new tokens' ids, greedy.
    """

    phase: str
    question: str
    num_prompt_tokens: int
    ttft_s: float
    total_s: float
    tokens_by_tier: dict[str, int] = field(default_factory=dict)
    num_recomputed: int = 0
    answer: tuple[int, ...] = ()


class FirstTokenClock:
    """A streamer for `generate` that notes when the first new token has reached the host."""

    def __init__(self) -> None:
        self.first_token_at: float | None = None
        self._has_prompt = False

    def put(self, token_ids: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with each new token, on the CPU."""
        if self._has_prompt and self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self._has_prompt = True

    def end(self) -> None:
        """Called by `generate` after the last token."""


def measure_uncached(
    model: Any, token_ids: list[int], question: str, max_new_tokens: int
) -> Measured:
    """The request with transformers' own cache, which starts empty every time."""
    from transformers import DynamicCache

    started = time.perf_counter()
    first_s, answer = _generate(model, token_ids, DynamicCache(), max_new_tokens, started)
    return Measured(
        phase="off",
        question=question,
        num_prompt_tokens=len(token_ids),
        ttft_s=first_s,
        total_s=time.perf_counter() - started,
        num_recomputed=len(token_ids),
        answer=answer,
    )


def measure_cached(
    model: Any, cache: Any, token_ids: list[int], question: str, max_new_tokens: int, phase: str
) -> Measured:
    """The request through a `PrefixCache`."""
    started = time.perf_counter()
    with cache.session(torch.tensor([token_ids])) as session:
        first_s, answer = _generate(model, token_ids, session, max_new_tokens, started)
        total_s = time.perf_counter() - started
        report = session.report
    return Measured(
        phase=phase,
        question=question,
        num_prompt_tokens=len(token_ids),
        ttft_s=first_s,
        total_s=total_s,
        tokens_by_tier=dict(report.tokens_by_tier),
        num_recomputed=report.num_recomputed,
        answer=answer,
    )


def _generate(
    model: Any, token_ids: list[int], kv_cache: Any, max_new_tokens: int, started: float
) -> tuple[float, tuple[int, ...]]:
    """Greedy tokens after the prompt, and the seconds from `started` to the first of them."""
    clock = FirstTokenClock()
    prompt = torch.tensor([token_ids], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=kv_cache,
            streamer=clock,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,  # never used: one sequence at a time
        )
    assert clock.first_token_at is not None
    return clock.first_token_at - started, tuple(out[0, len(token_ids) :].tolist())
