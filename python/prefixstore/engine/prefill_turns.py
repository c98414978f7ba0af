"""How prompts share the tokens of a forward pass: by tenant, the short one and the oldest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_TOKENS = 32  # of a share: a chunk takes its part of a pass however short it is


@dataclass(frozen=True)
class Prefill:
    """A prompt in prefill.

    Attributes:
        tenant: Whose it is.
        num_left: Tokens that are not there yet.
    """

    tenant: str
    num_left: int


def prefill_turns(prompts: Sequence[Prefill]) -> list[tuple[int, float]]:
    """In which order prompts are asked for a chunk, and for which share of what is left by then.

    Tenants have equal shares. Of one tenant's prompts the one with the fewest tokens left has half
    of the share, so that it does not wait for long ones, and the oldest the other half, so that it
    does not wait for ever. Prompts of equal length are so computed one after the other: the first
    is done sooner, and the last no later, than if all went on side by side. Others take what those
    leave, the shorter first.

    Args:
        prompts: The oldest first.

    Returns:
        Indices into `prompts`, and shares above 0 and up to 1.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: prompts[i].num_left)
    shortest: dict[str, int] = {}
    oldest: dict[str, int] = {}
    for i in by_length:
        shortest.setdefault(prompts[i].tenant, i)
    for i, prompt in enumerate(prompts):
        oldest.setdefault(prompt.tenant, i)
    weights = [
        (shortest[one.tenant] == i) / 2 + (oldest[one.tenant] == i) / 2
        for i, one in enumerate(prompts)
    ]
    first = [i for i in by_length if weights[i]]
    shares = []
    left = sum(weights)
    for i in first:
        shares.append((i, weights[i] / left))
        left -= weights[i]
    return shares + [(i, 1.0) for i in by_length if not weights[i]]


def chunk_tokens(budget: int, share: float) -> int:
    """The most tokens of a chunk that has this share of `budget`."""
    return min(budget, max(LEAST_TOKENS, round(budget * share)))
