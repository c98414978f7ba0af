"""Metrics for Prometheus: the engine's and cache's own counters, read when asked, and latencies.

No label has values that a client chooses: tiers, reasons, routes and statuses are few.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefixstore.cache import CacheStats
from prefixstore.engine import Engine, EngineStats, OutputDelta
from prefixstore.planner import PlannerStats
from prefixstore.server.worker import Worker
from prefixstore.store import StoreStats, TierUse
from prefixstore.tiers.base import TierStats

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_QUEUE_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)
# Fields of `TierStats`.
_HELD_BY_TIERS = ("capacity_bytes", "used_bytes", "num_records")
_DONE_BY_TIERS = ("num_evictions", "num_expired")

_Family = type[CounterMetricFamily] | type[GaugeMetricFamily]


@dataclass(frozen=True)
class _Named:
    """A counter or gauge: its name without the prefix, what it says, and its value."""

    name: str
    text: str
    value: float


class Latencies:
    """Histograms of what clients wait for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets_s: Sequence[float]) -> Histogram:
            return Histogram(f"kvkernels_{name}", text, buckets=buckets_s, registry=registry)

        text = "From a request's arrival at the engine to its first token."
        self._ttft = histogram("time_to_first_token_seconds", text, _TTFT_S)
        text = "Between pieces of an answer, as they reach the server."
        self._inter_token = histogram("inter_token_seconds", text, _INTER_TOKEN_S)
        text = "From a request's arrival at the engine to its admission."
        self._queue = histogram("queue_seconds", text, _QUEUE_S)

    def clock(self) -> AnswerClock:
        """For the pieces of one answer."""
        return AnswerClock(self)

    def observe_gap(self, gap_s: float) -> None:
        self._inter_token.observe(gap_s)

    def observe_end(self, delta: OutputDelta) -> None:
        if delta.report is None:
            return
        self._queue.observe(delta.report.times.queue_s)
        if delta.report.times.ttft_s:
            self._ttft.observe(delta.report.times.ttft_s)


class AnswerClock:
    """Times the pieces of one answer."""

    def __init__(self, latencies: Latencies) -> None:
        self._latencies = latencies
        self._last: float | None = None

    def observe(self, delta: OutputDelta) -> None:
        if delta.token_ids:
            now = time.perf_counter()
            if self._last is not None:
                self._latencies.observe_gap(now - self._last)
            self._last = now
        if delta.finish_reason is not None:
            self._latencies.observe_end(delta)


class EngineCollector(Collector):
    """Turns the statistics of an engine and its cache into metrics when they are asked for.

    Args:
        engine: The server's.
        reading: What a request has to get past before the engine has it.
    """

    def __init__(self, engine: Engine, reading: Worker) -> None:
        self._engine = engine
        self._reading = reading

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield from _engine_metrics(stats, self._reading.num_refused)
        yield from _planner_metrics(stats.planner)
        yield from _cache_metrics(stats.cache)
        if stats.cache.store is not None:
            yield from _store_metrics(stats.cache.store)
        yield from _tier_metrics(self._engine.cache.tier_stats())


def _engine_metrics(stats: EngineStats, num_unread: int) -> Iterator[Metric]:
    num_refused = stats.num_refused + num_unread
    yield from _counters(
        _Named("requests_submitted", "Requests taken on.", stats.num_submitted),
        _Named("requests_refused", "Requests that found all places taken.", num_refused),
        _Named("preemptions", "Requests that gave their blocks away.", stats.num_preemptions),
        _Named("engine_steps", "Forward passes.", stats.num_steps),
        _Named("engine_step_seconds", "Time in steps of the engine.", stats.step_s),
        _Named("engine_model_seconds", "Of that, inside the model.", stats.model_s),
        _Named("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
        _Named("computed_tokens", "Tokens run through the model.", stats.computed_tokens),
        _Named("output_tokens", "Tokens of answers.", stats.output_tokens),
        _Named("audits", "Prompts whose reused blocks were computed again.", stats.num_audits),
        _Named("audited_blocks", "Blocks compared in audits.", stats.audited_blocks),
        _Named("quarantined_blocks", "Blocks found wrong, and those after.", stats.num_quarantined),
    )
    yield from _gauges(
        _Named("requests_running", "Requests in the batch.", stats.num_running),
        _Named("requests_queued", "Requests that wait to be admitted.", stats.num_queued),
    )
    yield _labelled("requests_finished", "Ended requests.", "reason", stats.num_finished)
    yield _labelled("hit_tokens", "Reused tokens, by where they lay.", "tier", stats.hit_tokens)
    yield _labelled(
        "miss_tokens", "Tokens of whole blocks not reused, by why.", "reason", stats.miss_tokens
    )


def _planner_metrics(stats: PlannerStats) -> Iterator[Metric]:
    """What was planned; `prefixstore/planner/stats.py` says what the numbers are."""
    modes = stats.modes.items()
    for field, name, text in (
        ("num_plans", "plans", "Plans, by what was chosen."),
        ("num_finished", "plans_finished", "Plans that were carried out and measured."),
        ("predicted_s", "plan_predicted_seconds", "Of finished plans, as predicted."),
        ("measured_s", "plan_measured_seconds", "Of finished plans, as measured."),
    ):
        yield _labelled(name, text, "mode", {mode: getattr(one, field) for mode, one in modes})
    saved = {mode: one.saved_s for mode, one in modes}
    text = "Computing all, as predicted, less what finished plans took; may fall."
    yield _labelled("plan_saved_seconds", text, "mode", saved, GaugeMetricFamily)
    yield from _counters(
        _Named("plan_probes", "Plans that measure a tier.", stats.num_probes),
        _Named("plan_given_up", "Plans whose load disappointed.", stats.num_given_up),
        _Named("plan_computed_blocks", "Of finished plans.", stats.computed_blocks),
        _Named("plan_loaded_blocks", "Of finished plans.", stats.loaded_blocks),
        _Named("plan_dropped_blocks", "Loaded too late to be used.", stats.dropped_blocks),
    )


def _cache_metrics(stats: CacheStats) -> Iterator[Metric]:
    index = stats.index
    windows = {str(one.window): one for one in stats.pools if one.window is not None}
    sizes = {window: one.num_blocks for window, one in windows.items()}
    text = "Blocks of the pool of layers with such a window."
    yield _labelled("window_pool_blocks", text, "window", sizes, GaugeMetricFamily)
    free = {window: one.num_free for window, one in windows.items()}
    yield _labelled(
        "window_pool_free_blocks", "Those that are free.", "window", free, GaugeMetricFamily
    )
    yield from _gauges(
        _Named("pool_blocks", "Blocks of the device pool.", stats.pool_blocks),
        _Named("pool_free_blocks", "Those of them that are free.", stats.pool_free_blocks),
        _Named("index_blocks", "Blocks that the prefix index knows.", index.num_blocks),
        _Named("index_salts", "Namespaces in the prefix index.", index.num_salts),
        _Named("index_bytes", "Of the prefix index.", index.token_bytes + index.overhead_bytes),
    )
    yield from _counters(
        _Named("pool_evicted_blocks", "Blocks evicted from the pool.", stats.evicted_blocks),
        _Named(
            "pool_stripped_blocks",
            "Blocks given up of layers with a window, their prefixes staying.",
            stats.index.stripped_blocks,
        ),
        _Named("index_lookup_blocks", "Whole blocks of all prompts.", index.lookup_blocks),
        _Named("index_hit_blocks", "Those of them found in the pool.", index.hit_blocks),
    )


def _store_metrics(stats: StoreStats) -> Iterator[Metric]:
    yield from _counters(
        _Named("store_loads", "Blocks asked of the tiers.", stats.num_loads),
        _Named("store_misses", "Blocks that no tier had.", stats.num_misses),
        _Named("store_saved", "Blocks taken for writing.", stats.num_saved),
        _Named("store_dropped", "Blocks that found the queue full.", stats.num_dropped),
    )
    yield from _gauges(
        _Named("store_queue_blocks", "Blocks that wait to be written.", stats.queue_entries),
        _Named("store_queue_bytes", "Bytes of these.", stats.queue_bytes),
    )
    names = [one.name for one in fields(TierUse) if one.name not in ("name", "is_down")]
    tiers = [(use.name, use) for use in stats.tiers]
    yield from _tier_fields("TierUse", tiers, names, CounterMetricFamily)
    up = {use.name: float(not use.is_down) for use in stats.tiers}
    yield _labelled("tier_up", "0 while a tier is left alone.", "tier", up, GaugeMetricFamily)


def _tier_metrics(tiers: Mapping[str, TierStats | None]) -> Iterator[Metric]:
    """What tiers hold; one that gave no answer is left out."""
    known = [(name, stats) for name, stats in tiers.items() if stats is not None]
    yield from _tier_fields("TierStats", known, _HELD_BY_TIERS, GaugeMetricFamily)
    yield from _tier_fields("TierStats", known, _DONE_BY_TIERS, CounterMetricFamily)


def _tier_fields(
    kind: str, tiers: Sequence[tuple[str, Any]], names: Iterable[str], family: _Family
) -> Iterator[Metric]:
    """A metric for each of some fields; `tiers` has a tier's name and its statistics."""
    for name in names:
        values = {tier: getattr(stats, name) for tier, stats in tiers}
        text = f"{kind}.{name} of a tier."
        yield _labelled(f"tier_{name.removeprefix('num_')}", text, "tier", values, family)


def _counters(*all_named: _Named) -> Iterator[Metric]:
    return _unlabelled(CounterMetricFamily, all_named)


def _gauges(*all_named: _Named) -> Iterator[Metric]:
    return _unlabelled(GaugeMetricFamily, all_named)


def _unlabelled(family: _Family, all_named: Iterable[_Named]) -> Iterator[Metric]:
    for one in all_named:
        yield family(f"kvkernels_{one.name}", one.text, value=one.value)


def _labelled(
    name: str,
    text: str,
    label: str,
    values: Mapping[Any, float] | Iterable[tuple[Any, float]],
    family: _Family = CounterMetricFamily,
) -> Metric:
    metric = family(f"kvkernels_{name}", text, labels=[label])
    for key, value in dict(values).items():
        metric.add_metric([str(getattr(key, "value", key))], value)
    return metric
