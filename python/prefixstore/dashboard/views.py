"""An engine's counters and reports as the page's JSON: bounded, without prompts and salts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import Any

from prefixstore.dashboard.sampler import HISTORY_INTERVAL_S, HISTORY_S, HistoryPoint, Sampler
from prefixstore.engine import Engine, RequestReport
from prefixstore.store import TierUse
from prefixstore.tiers.base import TierStats

MAX_REQUESTS = 40
MAX_TEXT = 64  # characters of a name that a client chose
MAX_KEYS = 16  # entries of a table whose keys others choose
WARM_SHARE = 0.5  # of a prompt that was reused, from which on its request counts as warm


def overview(engine: Engine, sampler: Sampler) -> dict[str, Any]:
    """The newest sample: gauges, counters since the start, tiers and the planner."""
    sample = sampler.latest()
    stats = sample.engine
    cache = stats.cache
    return {
        "taken_at": sample.taken_at,
        "age_s": max(0.0, time.time() - sample.taken_at),
        "watched_s": time.time() - sampler.started_at,
        "model": model_name(engine.model),
        "max_model_len": engine.max_model_len,
        "max_running": engine.config.max_running,
        "max_queued": engine.config.max_queued,
        "num_running": stats.num_running,
        "num_queued": stats.num_queued,
        "num_submitted": stats.num_submitted,
        "num_refused": stats.num_refused,
        "num_finished": _table(stats.num_finished),
        "num_preemptions": stats.num_preemptions,
        "num_steps": stats.num_steps,
        "step_s": stats.step_s,
        "model_s": stats.model_s,
        "prompt_tokens": stats.prompt_tokens,
        "computed_tokens": stats.computed_tokens,
        "output_tokens": stats.output_tokens,
        "hit_tokens": _table(stats.hit_tokens),
        "miss_tokens": _table(stats.miss_tokens),
        "num_audits": stats.num_audits,
        "audited_blocks": stats.audited_blocks,
        "num_quarantined": stats.num_quarantined,
        "pool": {
            "block_size": engine.cache.config.block_size,
            "num_blocks": cache.pool_blocks,
            "used_blocks": cache.pool_blocks - cache.pool_free_blocks,
            "cached_blocks": cache.index.num_blocks,
            "evicted_blocks": cache.evicted_blocks,
        },
        "tiers": [
            _tier(use, sample.tiers.get(use.name))
            for use in (cache.store.tiers if cache.store else ())
        ],
        "write_queue": {
            "num_blocks": cache.store.queue_entries if cache.store else 0,
            "bytes": cache.store.queue_bytes if cache.store else 0,
        },
        "planner": _plain(stats.planner),
    }


def history(points: Sequence[HistoryPoint]) -> dict[str, Any]:
    """Counters over time, one column each, oldest first."""
    tiers = list(dict.fromkeys(tier for point in points for tier in point.hit_tokens))[:MAX_KEYS]
    return {
        "interval_s": HISTORY_INTERVAL_S,
        "span_s": HISTORY_S,
        "taken_at": [round(point.taken_at, 1) for point in points],
        "hit_tokens": {
            shorten(tier): [point.hit_tokens.get(tier, 0) for point in points] for tier in tiers
        },
        "prompt_tokens": [point.prompt_tokens for point in points],
        "output_tokens": [point.output_tokens for point in points],
        "num_running": [point.num_running for point in points],
        "num_queued": [point.num_queued for point in points],
    }


def requests(reports: Sequence[RequestReport]) -> dict[str, Any]:
    """The last requests, newest first, and how soon the cold and the warm ones began to answer."""
    answered = [report for report in reports if report.times.ttft_s > 0]
    warm = [report for report in answered if _reused_share(report) >= WARM_SHARE]
    cold = [report for report in answered if _reused_share(report) < WARM_SHARE]
    return {
        "num_recent": len(reports),
        "requests": [_request(report) for report in reversed(reports[-MAX_REQUESTS:])],
        "first_token": {"cold": _first_token(cold), "warm": _first_token(warm)},
    }


def model_name(model: Any) -> str:
    """The last part of where the model came from: its path on this machine is nobody's business."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return shorten(name.replace("\\", "/").rstrip("/").rpartition("/")[2])


def shorten(text: str) -> str:
    """At most `MAX_TEXT` characters of it."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest of the values that so many percent of them do not exceed.

    Args:
        values: At least one.
        percent: 1 to 100.
    """
    return sorted(values)[-(-percent * len(values) // 100) - 1]


def _first_token(reports: Sequence[RequestReport]) -> dict[str, Any]:
    if not reports:
        return {"num_requests": 0, "seconds": []}
    seconds = [report.times.ttft_s for report in reports]
    return {
        "num_requests": len(reports),
        "seconds": [round(value, 6) for value in seconds],
        "p50_s": percentile(seconds, 50),
        "p95_s": percentile(seconds, 95),
        "median_prompt_tokens": statistics.median_low(
            report.reuse.num_prompt_tokens for report in reports
        ),
    }


def _request(report: RequestReport) -> dict[str, Any]:
    return {
        "request_id": shorten(report.request_id),
        "tenant": shorten(report.tenant),
        "times": asdict(report.times),
        "prompt_tokens": report.reuse.num_prompt_tokens,
        "reused_tokens": _table(report.reuse.tokens_by_tier),
        "recomputed_tokens": report.reuse.num_recomputed,
        "misses": _table(report.reuse.misses),
        "output_tokens": report.num_output_tokens,
        "num_preemptions": report.num_preemptions,
        "plan": report.plan,
        "saved_s": report.saved_s,
    }


def _reused_share(report: RequestReport) -> float:
    return report.reuse.num_reused / max(1, report.reuse.num_prompt_tokens)


def _tier(use: TierUse, held: TierStats | None) -> dict[str, Any]:
    known = None if held is None else asdict(held)
    return {
        "name": shorten(use.name),
        "is_down": use.is_down,
        "used_bytes": known and known["used_bytes"],  # null: the tier gave no answer
        "capacity_bytes": known and known["capacity_bytes"],  # 0: without a bound
        "num_records": known and known["num_records"],
        "num_evictions": known and known["num_evictions"],
        "num_hits": use.num_hits,
        "num_misses": use.num_misses,
        "num_corrupted": use.num_corrupted,
        "num_errors": use.num_errors,
        "num_timeouts": use.num_timeouts,
        "num_dropped": use.num_dropped,
        "read_bytes": use.read_bytes,
        "written_bytes": use.written_bytes,
    }


def _table(counts: Mapping[Any, int]) -> dict[str, int]:
    """Counts by name, the largest first, at most `MAX_KEYS`."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])[:MAX_KEYS]
    return {_word(name): count for name, count in ordered}


def _word(name: Any) -> str:
    """A table's key: a string, or an enum of strings."""
    return shorten(str(name.value if isinstance(name, Enum) else name))


def _plain(value: Any) -> Any:
    """A statistics object as JSON can hold it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(one) for name, one in vars(value).items()}
    if isinstance(value, Mapping):
        return {_word(name): _plain(one) for name, one in list(value.items())[:MAX_KEYS]}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value[:MAX_KEYS]]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no such numbers
    return value
