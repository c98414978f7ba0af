"""Choose the next token of each row of a batch, by each row's own wishes.

Greedy rows take the most likely token, of equals the one with the lowest id. The others go the way
of the field, in this order: temperature, then top-k, then top-p over what top-k left, its
probabilities summing to 1 again. Top-k and top-p keep tokens as likely as the last one they keep,
so the tokens kept depend on the probabilities alone, not on how equals were sorted.

A row's token depends on its logits, its `SamplingParams`, its seed and its position, never on the
rows beside it: probabilities become integers, whose sums are the same in whatever order a device
adds them, and each row has random numbers of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prefixstore.engine.outputs import TokenLogprob
from prefixstore.engine.sampling import MAX_LOGPROBS, SamplingParams

# Probabilities are summed as integers, times this, so that sums do not depend on their order: exact
# down to 2**-36 and zero below 2**-60. A row adds up to about 2**60, far below int64's end.
_WEIGHT_OF_ONE = 2.0**60
_SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny  # smaller ones would divide 0 by 0


@dataclass(frozen=True)
class SamplingRow:
    """What one row's token is drawn with.

    Attributes:
        params: The request's wishes.
        seed: Of the request: `params.seed`, or a number drawn for it once.
        position: Of the new token in its answer, from 0: every token has random numbers of its own.
    """

    params: SamplingParams
    seed: int
    position: int


@dataclass(frozen=True)
class SampledToken:
    """The token of one row, and how likely it was if `SamplingParams.logprobs` asked."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class NoToken:
    """What a row gets whose largest logit is no finite number, and what it is."""

    peak: float

    def __str__(self) -> str:
        return f"logits: expected a finite largest one, got {self.peak}"


def sample_tokens(
    logits: torch.Tensor, rows: Sequence[SamplingRow]
) -> list[SampledToken | NoToken]:
    """The next token of each row; none for a row with a NaN or an infinite logit, or with nothing
    but tokens that are ruled out.

    Args:
        logits: `[num_rows, vocab_size]`, any floating dtype and device. -inf rules a token out.
        rows: One for each row of `logits`.

    Raises:
        ValueError: If shapes or dtype disagree.
    """
    if logits.dim() != 2 or len(logits) != len(rows) or not logits.is_floating_point():
        raise ValueError(
            f"logits: expected floats of shape [{len(rows)}, vocab_size], got {logits.dtype} of"
            f" shape {list(logits.shape)}"
        )
    if not rows:
        return []
    # `max` gives the first of equal logits, and NaN if there is one. So one pass serves the greedy
    # rows and checks every row.
    largest, token_ids = logits.max(dim=-1)
    peaks = largest.tolist()
    sound = [at for at, peak in enumerate(peaks) if math.isfinite(peak)]
    drawn = [at for at in sound if not rows[at].params.is_greedy]
    num_at_once = _rows_at_once(logits)
    for start in range(0, len(drawn), num_at_once):
        part = drawn[start : start + num_at_once]
        token_ids[part] = _draw_tokens(_select(logits, part), [rows[at] for at in part])
    asking = [at for at in sound if rows[at].params.logprobs is not None]
    logprobs = _find_logprobs(logits, rows, token_ids, asking)
    return [
        SampledToken(one, logprobs.get(at)) if math.isfinite(peak) else NoToken(peak)
        for at, (one, peak) in enumerate(zip(token_ids.tolist(), peaks, strict=True))
    ]


def _rows_at_once(logits: torch.Tensor) -> int:
    if logits.device.type != "cpu":
        return len(logits)
    # At most 2 MB of weights at once: larger temporaries (16 rows of 49,152) were returned to the
    # system at every step, and faulting their 3,000 pages in again took longer than the arithmetic.
    return max(1, (1 << 18) // logits.shape[-1])


def _draw_tokens(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Tokens of rows that are not greedy, `[num_rows]`, int64.

    Top-p needs no sorting: a token is drawn from all, and drawn again if it turns out to lie
    outside, which is so if the tokens above it already make up `top_p`. What is not more likely
    than a rejected token lies outside as well and is out of the next draw, so few draws suffice.
    """
    weights = _weigh(logits, [row.params for row in rows])
    totals = weights.sum(dim=-1)
    top_p = torch.tensor([row.params.top_p for row in rows], dtype=torch.float64)
    top_p = top_p.to(logits.device)
    needed = torch.where(top_p < 1, (totals * top_p).ceil().long(), totals)
    streams = [_random_stream(row) for row in rows]
    tokens = torch.empty_like(totals)
    waiting = list(range(len(rows)))
    while waiting:
        drawn = _draw_once(weights, [streams[at] for at in waiting])
        tokens[waiting] = drawn[:, 0]
        if all(rows[at].params.top_p == 1 for at in waiting):
            break
        # Keep only tokens that are likelier than the drawn one.
        weights.masked_fill_(weights <= weights.gather(-1, drawn), 0)
        is_outside = weights.sum(dim=-1) >= needed
        weights, needed = weights[is_outside], needed[is_outside]
        waiting = [at for at, out in zip(waiting, is_outside.tolist(), strict=True) if out]
    return tokens


def _weigh(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Probabilities after temperature and top-k as integers, `[num_rows, vocab_size]`, int64."""
    temperatures = [max(one.temperature, _SMALLEST_TEMPERATURE) for one in params]
    scores = _widen(logits)
    # Subtract the peak before dividing: a small temperature would make it infinite.
    scores = scores - scores.amax(dim=-1, keepdim=True)
    scores /= torch.tensor(temperatures, device=logits.device).unsqueeze(-1)
    weights = scores.softmax(dim=-1).mul_(_WEIGHT_OF_ONE).long()
    floors = torch.zeros_like(weights[:, :1])
    for top_k in {one.top_k for one in params if 0 < one.top_k < logits.shape[-1]}:
        chosen = [at for at, one in enumerate(params) if one.top_k == top_k]
        best = _select(weights, chosen).topk(top_k, sorted=False).values
        floors[chosen] = best.amin(dim=-1, keepdim=True)
    return weights.masked_fill_(weights < floors, 0) if floors.any() else weights


def _select(values: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """Some rows of `values`, in order; not copied if they are all."""
    return values if len(chosen) == len(values) else values[chosen]


def _widen(logits: torch.Tensor) -> torch.Tensor:
    """As float32, or float64 as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _draw_once(weights: torch.Tensor, streams: Sequence[np.random.Philox]) -> torch.Tensor:
    """A token of each row with a probability in proportion to its weight, `[num_rows, 1]`."""
    sums = weights.cumsum(dim=-1)
    totals = sums[:, -1:]
    uniform = [[(stream.random_raw() >> 11) * 2.0**-53] for stream in streams]  # in [0, 1)
    points = torch.tensor(uniform, dtype=torch.float64).to(weights.device) * totals
    # Rounding may give the total itself; a point must lie within the last token.
    points = torch.minimum(points.long(), totals - 1)
    return torch.searchsorted(sums, points, right=True)


def _random_stream(row: SamplingRow) -> np.random.Philox:
    """Random numbers that a counter-based generator gives for this seed and position alone."""
    return np.random.Philox(key=row.seed % 2**64, counter=row.position << 64)


def _find_logprobs(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    token_ids: torch.Tensor,
    asking: list[int],
) -> dict[int, TokenLogprob]:
    """Log-probabilities by row, of the rows `asking`."""
    if not asking:
        return {}
    logprobs = _widen(_select(logits, asking)).log_softmax(dim=-1)
    chosen = token_ids[asking].unsqueeze(-1)
    # Always the same number: which of several equal tokens `topk` takes may depend on it.
    best = logprobs.topk(min(MAX_LOGPROBS, logits.shape[-1]))
    found = {}
    for at, token_id, logprob, ids, values in zip(
        asking,
        token_ids[asking].tolist(),
        logprobs.gather(-1, chosen)[:, 0].tolist(),
        best.indices.tolist(),
        best.values.tolist(),
        strict=True,
    ):
        possible = [
            (one, value) for one, value in zip(ids, values, strict=True) if value > -math.inf
        ]
        possible.sort(key=lambda pair: (-pair[1], pair[0]))
        found[at] = TokenLogprob(token_id, logprob, tuple(possible[: rows[at].params.logprobs]))
    return found
