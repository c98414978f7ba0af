"""A breaker: what keeps failing is left alone, for longer each time."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from prefixstore.errors import TierTimeout
from prefixstore.settings import check_count, check_seconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BreakerConfig:
    """When a tier is left alone.

    Attributes:
        failures: This many ...
        window_s: ... within this time, and the tier is down.
        pause_s: How long it is first left alone; each failed trial doubles it.
        max_pause_s: The longest pause.
        timeout_failures: So many failures is one `TierTimeout`: it cost a request all its patience,
            where another failure costs next to nothing.
    """

    failures: int = 5
    window_s: float = 10.0
    pause_s: float = 1.0
    max_pause_s: float = 60.0
    timeout_failures: int = 3

    def __post_init__(self) -> None:
        for name in ("failures", "timeout_failures"):
            check_count(name, getattr(self, name), 1)
        for name in ("window_s", "pause_s", "max_pause_s"):
            check_seconds(name, getattr(self, name))


@dataclass(frozen=True)
class Leave:
    """To make one call; comes back with what became of it.

    Attributes:
        outage: Number of the outage that the call is a trial of; None where the tier was up.
        until: When the next may begin if it never ends.
    """

    outage: int | None
    until: float | None = None


_WHILE_UP = Leave(None)


class Breaker:
    """Up: every call is allowed. Down: none until the pause is over, then one trial at a time; it
    brings the tier back or begins the next pause, or tells nothing, and the next call is the trial.
    A call that began before the tier went down says nothing of how it is now, whether it fails or
    succeeds. Thread-safe; logs changes of state only.
    """

    def __init__(
        self,
        name: str,
        config: BreakerConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: deque[float] = deque(maxlen=config.failures)
        self._pause_s = config.pause_s
        self._down_until: float | None = None
        self._num_outages = 0

    @property
    def is_down(self) -> bool:
        """Whether an outage goes on, be it in a pause or in a trial."""
        return self._down_until is not None

    @property
    def is_pausing(self) -> bool:
        """Whether `allows` would give no leave now."""
        down_until = self._down_until
        return down_until is not None and self._clock() < down_until

    def allows(self) -> Leave | None:
        """Leave to call the tier now, or None; where it is a trial, others wait for its outcome."""
        if self._down_until is None:
            return _WHILE_UP
        with self._lock:
            now = self._clock()
            if self._down_until is None:
                return _WHILE_UP
            if now < self._down_until:
                return None
            # If this trial never ends, another may begin after the pause.
            self._down_until = now + self._pause_s
            return Leave(self._num_outages, self._down_until)

    def succeeded(self, leave: Leave) -> None:
        """A call that had leave succeeded: a trial ends its outage."""
        if leave.outage is None:
            return
        with self._lock:
            if self._down_until is None or leave.outage != self._num_outages:
                return
            self._down_until = None
            self._failures.clear()
            self._pause_s = self._config.pause_s
        logger.warning("tier %s: back", self._name)

    def told_nothing(self, leave: Leave) -> None:
        """The call neither failed nor succeeded: where it was a trial, the next one is it."""
        with self._lock:
            if leave.until is not None and leave.until == self._down_until:
                self._down_until = self._clock()

    def failed(self, error: BaseException, leave: Leave) -> None:
        """A call that had leave failed: a trial prolongs the pause, others may begin an outage."""
        with self._lock:
            now = self._clock()
            if self._down_until is not None:
                if leave.outage == self._num_outages:
                    self._pause_s = min(self._pause_s * 2, self._config.max_pause_s)
                    self._down_until = now + self._pause_s
                return
            weight = self._config.timeout_failures if isinstance(error, TierTimeout) else 1
            self._failures.extend([now] * weight)
            is_full = len(self._failures) == self._config.failures
            if not is_full or now - self._failures[0] > self._config.window_s:
                return
        self.trip(error)

    def trip(self, error: BaseException) -> None:
        """Take the tier down at once."""
        with self._lock:
            was_down = self._down_until is not None
            self._num_outages += not was_down
            self._down_until = self._clock() + self._pause_s
        if not was_down:
            logger.warning("tier %s: down for %s s: %s", self._name, self._pause_s, error)
