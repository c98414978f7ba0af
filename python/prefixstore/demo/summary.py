"""Every figure of the demo as one JSON-ready dictionary; the table and the plot read only this."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefixstore.demo.measure import Measured
from prefixstore.demo.prompts import AgentLoop
from prefixstore.demo.run import Outcome

VERSION = 1
PHASES = ("off", "empty", "on", "restart")
# Rows of the table: key and what it is called.
ROWS = {
    "off": "cache off",
    "empty": "cache on, empty",
    "first": "cache on, first",
    "warm": "cache on, later",
    "restart": "after a restart",
}


def summarise(
    loop: AgentLoop, outcome: Outcome, settings: dict[str, Any], decode: Any
) -> dict[str, Any]:
    """All figures of a run.

    Args:
        loop: What was asked.
        outcome: What was measured.
        settings: Arguments, machine, versions and model, copied into the summary.
        decode: Turns a list of token ids into text.
    """
    by_row = _split_rows(outcome.measured)
    tiers = list(outcome.tier_bytes)
    rows = {row: _row(measured, tiers) for row, measured in by_row.items() if measured}
    for row in rows.values():
        row["speedup"] = rows["off"]["ttft_s"]["median"] / row["ttft_s"]["median"]
    warm = by_row["warm"] or by_row["first"]
    return {
        "version": VERSION,
        **settings,
        "prompt": {
            "num_shared_tokens": loop.num_shared_tokens,
            "num_prompt_tokens": [len(request.token_ids) for request in loop.requests],
            "sources": list(loop.sources),
        },
        "rows": rows,
        "loop": _loop_seconds(by_row, len(loop.requests)),
        "empty_over_off": rows["empty"]["ttft_s"]["median"] / rows["off"]["ttft_s"]["median"],
        "tier_bytes": outcome.tier_bytes,
        "open_s": outcome.open_s,
        "flush_s": outcome.flush_s,
        "is_flushed": outcome.is_flushed,
        "problems": list(outcome.problems),
        "answers": compare_answers(outcome.measured),
        "example": {"question": warm[-1].question, "answer": decode(list(warm[-1].answer))},
        "requests": [_request(measured, tiers) for measured in outcome.measured],
    }


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """Write `summary` as readable JSON."""
    path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def compare_answers(measured: Sequence[Measured]) -> dict[str, Any]:
    """How many greedy answers with the cache equal those without it, token for token.

    Only requests run in both ways count. `differences` names each that differs, with the number
    of equal tokens before the first that does not.
    """
    without = {one.question: one.answer for one in measured if one.phase == "off"}
    compared = [one for one in measured if one.phase != "off" and one.question in without]
    differences = [
        {
            "phase": one.phase,
            "question": one.question,
            "num_equal_tokens": _common_length(one.answer, without[one.question]),
        }
        for one in compared
        if one.answer != without[one.question]
    ]
    return {
        "num_compared": len(compared),
        "num_equal": len(compared) - len(differences),
        "differences": differences,
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _split_rows(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    phases = {phase: [one for one in measured if one.phase == phase] for phase in PHASES}
    return {
        "off": phases["off"],
        "empty": phases["empty"],
        "first": phases["on"][:1],
        "warm": phases["on"][1:],
        "restart": phases["restart"],
    }


def _row(measured: list[Measured], tiers: list[str]) -> dict[str, Any]:
    ttft = [one.ttft_s for one in measured]
    return {
        "num_requests": len(measured),
        "ttft_s": {
            "median": statistics.median(ttft),
            "p90": percentile(ttft, 0.9),
            "min": min(ttft),
        },
        "total_s": {"median": statistics.median(one.total_s for one in measured)},
        # Per request, so that rows of different lengths can be compared.
        "tokens_by_tier": {
            tier: round(statistics.mean(one.tokens_by_tier.get(tier, 0) for one in measured))
            for tier in tiers
        },
        "num_recomputed": round(statistics.mean(one.num_recomputed for one in measured)),
    }


def _loop_seconds(by_row: dict[str, list[Measured]], num_requests: int) -> dict[str, Any]:
    """The whole loop with the cache on, and off: measured, or reckoned from the requests run."""
    off = [one.total_s for one in by_row["off"]]
    on_s = sum(one.total_s for one in by_row["first"] + by_row["warm"])
    off_s = statistics.mean(off) * num_requests
    return {
        "num_requests": num_requests,
        "on_s": on_s,
        "off_s": off_s,
        "num_off_measured": len(off),
        "speedup": off_s / on_s,
    }


def _request(measured: Measured, tiers: list[str]) -> dict[str, Any]:
    return {
        "phase": measured.phase,
        "question": measured.question,
        "num_prompt_tokens": measured.num_prompt_tokens,
        "ttft_s": measured.ttft_s,
        "total_s": measured.total_s,
        "tokens_by_tier": {tier: measured.tokens_by_tier.get(tier, 0) for tier in tiers},
        "num_recomputed": measured.num_recomputed,
        "answer_ids": list(measured.answer),
    }


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
