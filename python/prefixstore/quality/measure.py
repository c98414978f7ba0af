"""A model on KV that a codec gave back, beside the same model on its own."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from prefixstore.errors import ConfigError
from prefixstore.quality.restored import (
    BLOCK_SIZE,
    Restored,
    Stored,
    compute_prefix,
    fill_cache,
    restore,
)

OWN = "own"  # the model's KV as it is
ANSWER_TOKENS = 12
CITIES = ("Lisbon", "Osaka", "Quito", "Tampere", "Dakar", "Perth", "Bergen", "Lima")

Formats = dict[str, Stored | None]  # by name; OWN first
Advance = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        num_chunks: Stretches of the text.
        prefix_tokens: Of each, restored by the codec.
        scored_tokens: Behind the prefix, predicted from it.
        num_greedy: Chunks to go on from greedily.
        greedy_tokens: How far.
        depths: Where in the prefix a needle lies, as shares of it.
    """

    num_chunks: int = 8
    prefix_tokens: int = 768
    scored_tokens: int = 256
    num_greedy: int = 4
    greedy_tokens: int = 64
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)

    @property
    def num_steps(self) -> int:
        return self.num_chunks + len(self.depths)


@dataclass
class Tally:
    """What was found of one codec."""

    nll: float = 0.0
    num_tokens: int = 0
    kl: list[torch.Tensor] = field(default_factory=list)
    num_agreeing: int = 0
    divergence: list[int] = field(default_factory=list)
    num_needles: int = 0
    num_raw: int = 0
    num_blocks: int = 0

    def summary(self, own: Tally) -> dict[str, float | int | list[int]]:
        """The figures beside those of the model's own KV."""
        kl = torch.cat(self.kl)
        perplexity, before = (math.exp(one.nll / one.num_tokens) for one in (self, own))
        return {
            "perplexity": perplexity,
            "perplexity_change": perplexity / before - 1,
            "kl_mean": kl.mean().item(),
            "kl_p99": kl.quantile(0.99).item(),
            "top1_agreement": self.num_agreeing / self.num_tokens,
            "greedy_divergence": self.divergence,
            "needles_found": self.num_needles,
            "raw_blocks": self.num_raw,
            "num_blocks": self.num_blocks,
        }


def measure(
    model: Any, tokenizer: Any, text: str, formats: Formats, plan: Plan, advance: Advance
) -> dict[str, Tally]:
    """Measure every codec on the same stretches of `text`.

    Raises:
        ConfigError: If the text is too short.
    """
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    length = plan.prefix_tokens + plan.scored_tokens
    if len(tokens) < plan.num_chunks * length:
        raise ConfigError(
            f"text: expected {plan.num_chunks * length} tokens or more, got {len(tokens)}"
        )
    tallies = {name: Tally() for name in formats}
    for index in range(plan.num_chunks):
        advance(f"chunk {index + 1}")
        chunk = tokens[index * length : (index + 1) * length]
        prefix = compute_prefix(model, chunk[: plan.prefix_tokens])
        restored = restore(prefix, formats)
        _score(model, restored, chunk[plan.prefix_tokens :], tallies)
        for name, num_raw in restored.num_raw.items():
            tallies[name].num_raw += num_raw
            tallies[name].num_blocks += prefix.pool.num_blocks
        if index < plan.num_greedy:
            _diverge(model, restored, chunk[plan.prefix_tokens :], tallies, plan)
    for needle in make_needles(tokenizer, tokens, plan):
        advance(f"needle at {needle.depth:.0%}")
        restored = restore(compute_prefix(model, needle.prefix), formats)
        answers = _go_on(model, restored, needle.question, ANSWER_TOKENS)
        for name, row in restored.rows.items():
            tallies[name].num_needles += needle.answer in tokenizer.decode(answers[row])
    return tallies


@torch.inference_mode()
def _score(model: Any, restored: Restored, scored: torch.Tensor, tallies: dict[str, Tally]) -> None:
    """Predict each token of `scored` but the first from all before it."""
    targets = scored[1:]
    own: torch.Tensor | None = None
    for row, data in enumerate(restored.data):
        # one by one: the logits of all would take most of the memory
        logits = model(
            input_ids=scored[None], past_key_values=fill_cache([data]), use_cache=True
        ).logits[0]
        log_probs = logits[:-1].float().log_softmax(-1)
        own = log_probs if own is None else own
        nll = -log_probs.gather(1, targets[:, None]).sum().item()
        kl = (own.exp() * (own - log_probs)).sum(-1)
        num_agreeing = int((own.argmax(-1) == log_probs.argmax(-1)).sum())
        for tally in (tallies[name] for name, its in restored.rows.items() if its == row):
            tally.nll += nll
            tally.num_tokens += len(targets)
            tally.kl.append(kl)
            tally.num_agreeing += num_agreeing


def _diverge(
    model: Any,
    restored: Restored,
    following: torch.Tensor,
    tallies: dict[str, Tally],
    plan: Plan,
) -> None:
    """Count the greedy tokens that are the same as without the codec."""
    answers = _go_on(model, restored, following[:1], plan.greedy_tokens)
    for name, row in restored.rows.items():
        differs = (answers[row] != answers[0]).nonzero()
        tallies[name].divergence.append(int(differs[0]) if len(differs) else plan.greedy_tokens)


@torch.inference_mode()
def _go_on(model: Any, restored: Restored, tokens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`[len(restored.data), num_tokens]`: the model's choices behind each prefix and `tokens`.

    Of all at once: a step reads every weight, for however many rows.
    """
    cache, chosen = fill_cache(restored.data), []
    tokens = tokens.expand(len(restored.data), -1)
    for _ in range(num_tokens):
        logits = model(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(tokens)
    return torch.cat(chosen, dim=1)


@dataclass(frozen=True)
class Needle:
    """A fact in a long text, and the question for it."""

    depth: float
    prefix: torch.Tensor
    question: torch.Tensor
    answer: str


def make_needles(tokenizer: Any, tokens: torch.Tensor, plan: Plan) -> Iterator[Needle]:
    """One needle for each depth, in `prefix_tokens` of the text."""
    chooser = random.Random(0)
    begin = tokens[: plan.prefix_tokens]
    for index, depth in enumerate(plan.depths):
        city, number = CITIES[index % len(CITIES)], chooser.randint(10_000, 99_999)
        fact = f" The secret number of {city} is {number}. "
        reminder = f"Remember that the secret number of {city} is {number}."
        hidden = _encode(tokenizer, fact + reminder)
        asked = f"\nQuestion: what is the secret number of {city}?"
        question = _encode(tokenizer, asked + f"\nAnswer: The secret number of {city} is")
        at = int(depth * (len(begin) - len(hidden)))
        prefix = torch.cat([begin[:at], hidden, begin[at:]])[: plan.prefix_tokens]
        yield Needle(depth, prefix, question, str(number))


def _encode(tokenizer: Any, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]


def check_plan(plan: Plan) -> None:
    """Raise ConfigError unless the prefix is whole blocks."""
    if plan.prefix_tokens % BLOCK_SIZE:
        raise ConfigError(
            f"--prefix-tokens: expected a multiple of {BLOCK_SIZE}, got {plan.prefix_tokens}"
        )
