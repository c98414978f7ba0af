"""Every figure of a load test as one JSON-ready dictionary; table and plot read only this."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefixstore.demo.summary import percentile
from prefixstore.loadtest.plan import PHASES
from prefixstore.loadtest.replay import Request
from prefixstore.loadtest.run import Replay
from prefixstore.loadtest.workloads import CountTokens

VERSION = 1
SHARES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
# Compared between servers and between phases, and whether more of it is better.
COMPARED = {
    "first_ttft_s": False,
    "ttft_s": False,
    "inter_token_s": False,
    "total_s": False,
    "output_tokens_per_s": True,
}


def summarise(
    replays: Sequence[Replay], settings: dict[str, Any], count_tokens: CountTokens | None = None
) -> dict[str, Any]:
    """All figures of a run.

    Args:
        replays: What was measured; the first target is the one others are compared with.
        settings: Arguments, machine, versions and date, copied into the summary.
        count_tokens: Counts the answers of servers that do not report usage; None to leave their
            tokens out.
    """
    targets = list(dict.fromkeys(replay.target for replay in replays))
    groups = [
        (target, phase, [one for one in replays if (one.target, one.phase) == (target, phase)])
        for target in targets
        for phase in PHASES
    ]
    return {
        "version": VERSION,
        **settings,
        "targets": [
            {"name": target, "model": next(one.model for one in replays if one.target == target)}
            for target in targets
        ],
        "rows": [
            {"target": target, "phase": phase, **_row(group, count_tokens)}
            for target, phase, group in groups
            if group
        ],
        "faster_than": _between_targets(replays, targets, count_tokens),
        "faster_when_warm": _between_phases(replays, targets, count_tokens),
        "requests": [
            _request(replay, request, count_tokens)
            for replay in replays
            for request in replay.requests
        ],
    }


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """Write `summary` as readable JSON."""
    path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe_spread(values: Sequence[float]) -> dict[str, float] | None:
    """Percentiles of `values`, in their unit; None of none."""
    if not values:
        return None
    return {name: percentile(values, share) for name, share in SHARES.items()}


def _row(replays: Sequence[Replay], count_tokens: CountTokens | None) -> dict[str, Any]:
    """The figures of one target and phase over all rounds; times are of requests without error."""
    requests = [request for replay in replays for request in replay.requests]
    answered = [request for request in requests if request.answer.error is None]
    output = [_output_tokens(request, count_tokens) for request in answered]
    duration_s = sum(replay.duration_s for replay in replays)
    output_tokens = _sum_known(output)
    per_token = [
        (request.answer.piece_s[-1] - request.answer.piece_s[0]) / (num_tokens - 1)
        for request, num_tokens in zip(answered, output, strict=True)
        if num_tokens is not None and num_tokens > 1 and request.answer.piece_s
    ]
    return {
        "num_requests": len(requests),
        "num_answered": len(answered),
        "errors": dict(Counter(one.answer.error for one in requests if one.answer.error)),
        "num_without_text": sum(not one.answer.piece_s for one in answered),
        "duration_s": duration_s,
        "first_ttft_s": _median_known([_first_ttft_s(replay) for replay in replays]),
        "ttft_s": describe_spread(
            [one.answer.piece_s[0] for one in answered if one.answer.piece_s]
        ),
        "inter_token_s": describe_spread([gap for one in answered for gap in _gaps(one)]),
        "time_per_token_s": describe_spread(per_token),
        "total_s": describe_spread([one.answer.end_s for one in answered]),
        "late_s": describe_spread([one.late_s for one in requests]),
        "requests_per_s": len(answered) / duration_s,
        "output_tokens": output_tokens,
        "output_tokens_per_s": None if output_tokens is None else output_tokens / duration_s,
        "prompt_tokens": _sum_known([one.answer.prompt_tokens for one in answered]),
        "cached_tokens": _sum_known([one.answer.cached_tokens for one in answered]),
    }


def _between_targets(
    replays: Sequence[Replay], targets: list[str], count_tokens: CountTokens | None
) -> list[dict[str, Any]]:
    """How many times faster the first target was than each other one, phase by phase."""
    found = []
    for other, phase in itertools.product(targets[1:], PHASES):
        pairs = _pairs(replays, (targets[0], phase), (other, phase))
        figures = _ratios(pairs, count_tokens)
        if figures:
            found.append({"target": targets[0], "than": other, "phase": phase, **figures})
    return found


def _between_phases(
    replays: Sequence[Replay], targets: list[str], count_tokens: CountTokens | None
) -> list[dict[str, Any]]:
    """How many times faster each target was in the later phases than cold."""
    found = []
    for target, phase in itertools.product(targets, PHASES[1:]):
        figures = _ratios(_pairs(replays, (target, phase), (target, "cold")), count_tokens)
        if figures:
            found.append({"target": target, "phase": phase, **figures})
    return found


def _pairs(
    replays: Sequence[Replay], left: tuple[str, str], right: tuple[str, str]
) -> Iterator[tuple[Replay, Replay]]:
    """Replays of one round, of `left`'s target and phase and of `right`'s."""
    by_key = {(one.target, one.phase, one.round_number): one for one in replays}
    for target, phase, round_number in by_key:
        other = by_key.get((*right, round_number))
        if (target, phase) == left and other is not None:
            yield by_key[(target, phase, round_number)], other


def _ratios(
    pairs: Iterator[tuple[Replay, Replay]], count_tokens: CountTokens | None
) -> dict[str, Any]:
    """By figure: how many times faster the left of each pair is, its median over the rounds and
    the least and most of them. Of times, their medians are compared."""
    rows = [(_row([left], count_tokens), _row([right], count_tokens)) for left, right in pairs]
    figures = {}
    for name, is_more_better in COMPARED.items():
        ratios = []
        for left, right in rows:
            values = [_middle(row[name]) for row in (left, right)]
            faster, slower = values if is_more_better else reversed(values)
            if faster and slower:  # None or 0: nothing was answered
                ratios.append(faster / slower)
        if ratios:
            figures[name] = {
                "median": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "num_rounds": len(ratios),
            }
    return figures


def _middle(figure: Any) -> float | None:
    value: float | None = figure["p50"] if isinstance(figure, dict) else figure
    return value


def _request(replay: Replay, request: Request, count_tokens: CountTokens | None) -> dict[str, Any]:
    answer = request.answer
    return {
        "target": replay.target,
        "round": replay.round_number,
        "phase": replay.phase,
        "conversation": request.conversation,
        "turn": request.turn,
        "sent_s": request.sent_s,
        "late_s": request.late_s,
        "ttft_s": answer.piece_s[0] if answer.piece_s else None,
        "total_s": answer.end_s,
        "inter_token_s": describe_spread(_gaps(request)),
        "num_pieces": len(answer.piece_s),
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "output_tokens": _output_tokens(request, count_tokens),
        "is_usage_reported": answer.output_tokens is not None,
        "finish_reason": answer.finish_reason,
        "error": answer.error,
        "error_text": answer.error_text,
    }


def _gaps(request: Request) -> list[float]:
    """Seconds between one piece of text and the next."""
    return [later - earlier for earlier, later in itertools.pairwise(request.answer.piece_s)]


def _first_ttft_s(replay: Replay) -> float | None:
    """Of the request that was sent first: in a cold replay nothing of its prompt is cached."""
    first = min(replay.requests, key=lambda request: request.sent_s).answer
    return first.piece_s[0] if first.piece_s and first.error is None else None


def _output_tokens(request: Request, count_tokens: CountTokens | None) -> int | None:
    """As the server says; where it does not, as the tokenizer counts the text."""
    answer = request.answer
    if answer.output_tokens is None and answer.error is None and count_tokens is not None:
        return count_tokens(answer.text)
    return answer.output_tokens


def _median_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _sum_known(values: Sequence[int | None]) -> int | None:
    """The sum; None where nobody said a number, or not of all."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None
