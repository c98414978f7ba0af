"""What the page shows of the last quarter of an hour: samples of an engine's counters."""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass

from prefixstore.engine import Engine, EngineStats
from prefixstore.tiers.base import TierStats

logger = logging.getLogger(__name__)

SAMPLE_INTERVAL_S = 1.0
HISTORY_INTERVAL_S = 5.0
HISTORY_S = 900.0


@dataclass(frozen=True)
class Sample:
    """An engine at one moment.

    Attributes:
        taken_at: On the clock of `time.time`.
        engine: Its counters.
        tiers: What each tier holds, by name; None where it gave no answer.
    """

    taken_at: float
    engine: EngineStats
    tiers: dict[str, TierStats | None]


@dataclass(frozen=True)
class HistoryPoint:
    """The counters that are drawn over time, since the engine's start, and two gauges."""

    taken_at: float
    hit_tokens: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    num_running: int
    num_queued: int


class Sampler:
    """Asks an engine for its counters once a second, however many pages are open.

    It runs all the while: what happened before somebody looked is what they want to see, and a
    sample costs some 50 microseconds. Tiers are asked only every `HISTORY_INTERVAL_S`, for some are
    servers elsewhere, and from this thread alone: no page waits for one. The history is bounded,
    `HISTORY_S / HISTORY_INTERVAL_S` points and one.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.started_at = time.time()
        self._lock = threading.Lock()  # over the latest sample, the history and the thread
        self._latest: Sample | None = None
        self._newest_s = -math.inf  # of the history, on `time.monotonic`
        self._history: deque[HistoryPoint] = deque(maxlen=int(HISTORY_S / HISTORY_INTERVAL_S) + 1)
        self._has_failed = False  # the last time
        self._is_stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Sample in the background, if that is not done yet, until `stop` or until nobody but the
        thread has the sampler. May be started again after `stop`."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._is_stopped.clear()
            self._thread = threading.Thread(
                target=_run,
                args=(weakref.ref(self), self._is_stopped),
                name="dashboard-sampler",
                daemon=True,
            )
            self._thread.start()

    def stop(self) -> None:
        """End the background thread and wait for it."""
        self._is_stopped.set()
        if self._thread is not None:
            self._thread.join()

    def sample(self) -> Sample:
        """Ask the engine now; asks the tiers and adds to the history where it is time to."""
        before = self._latest
        # Points have the time of a clock that may be set back; the next one is due all the same.
        now, ticks_s = time.time(), time.monotonic()
        # Half an interval of tolerance: a tick that comes a little early is the one that was meant.
        is_due = ticks_s - self._newest_s > HISTORY_INTERVAL_S - SAMPLE_INTERVAL_S / 2
        stats = self._engine.stats()
        if before is None or is_due:
            tiers = self._engine.cache.tier_stats()
        else:
            tiers = before.tiers
        latest = Sample(now, stats, tiers)
        with self._lock:
            self._latest = latest
            if is_due:
                self._history.append(_history_point(latest))
                self._newest_s = ticks_s
        return latest

    def latest(self) -> Sample:
        """The newest sample; takes the first one where there is none yet."""
        with self._lock:
            latest = self._latest
        return latest if latest is not None else self.sample()

    def history(self) -> list[HistoryPoint]:
        """Oldest first, at most a quarter of an hour."""
        with self._lock:
            return list(self._history)

    def try_sample(self) -> None:
        """`sample`, whose failure is logged."""
        try:
            self.sample()
        except Exception:
            # The page says how old the last sample is; the log says why, once.
            if not self._has_failed:
                logger.exception("the dashboard's sampler failed, and goes on trying")
            self._has_failed = True
        else:
            self._has_failed = False


def _run(found: weakref.ref[Sampler], is_stopped: threading.Event) -> None:
    while True:
        sampler = found()
        if sampler is None:
            return
        sampler.try_sample()
        del sampler  # the thread alone keeps no sampler, and so no engine
        if is_stopped.wait(SAMPLE_INTERVAL_S):
            return


def _history_point(sample: Sample) -> HistoryPoint:
    stats = sample.engine
    return HistoryPoint(
        taken_at=sample.taken_at,
        hit_tokens=dict(stats.hit_tokens),
        prompt_tokens=stats.prompt_tokens,
        output_tokens=stats.output_tokens,
        num_running=stats.num_running,
        num_queued=stats.num_queued,
    )
