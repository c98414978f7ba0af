"""How the score of a query and a key becomes a weight: what all attention kernels are told."""

from __future__ import annotations

from typing import NamedTuple

import torch

# A tree mask has one bit for each new token of a sequence.
MAX_TREE_TOKENS = 16


# Longer than any sequence, and still small enough for 32-bit arithmetic with positions.
WIDEST_WINDOW = 1 << 30


class Scoring(NamedTuple):
    """The rules of one attention call, as the implementations take them.

    For a query at position p and a key at position t of its sequence::

        s = sm_scale * (query . key)
        s = soft_cap * tanh(s / soft_cap)            with a soft cap
        s = s - alibi_slope * |p - t|                with ALiBi
        s = minus infinity                           where the query does not see the key
        weight = exp(s) / (sum over keys of exp(s) + exp(sink))

    Attributes:
        sm_scale: See above; finite.
        causal: Whether a query sees only keys with t <= p.
        window: Whether a query sees only keys with t > p - window; 0 for all, `WIDEST_WINDOW` at
            most.
        soft_cap: Positive, or 0 for none.
        sinks: `[num_heads]`, float32: logit of each head's sink, a key without a value (as in
            gpt-oss). The log-sum-exp counts it.
        alibi_slopes: `[num_heads]`, float32.
        tree_mask: `[num_tokens]`, int32: bit j says whether a new token sees the j-th new token of
            its sequence, of at most 16. All see what came before the new ones. A token's position
            is that of the first new one plus the number of other new tokens that it sees.
    """

    sm_scale: float
    causal: bool = True
    window: int = 0
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    tree_mask: torch.Tensor | None = None
