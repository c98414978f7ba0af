"""How fast one request really computes and loads, next to what was estimated."""

from __future__ import annotations

from dataclasses import dataclass

_NEWEST_WEIGHT = 0.7  # weight of the newest measurement in a request's estimate of its own speed
_LEAST_SCALE = 1e-3  # a clock may stand still


@dataclass
class _Work:
    """Something under way."""

    started_at: float
    expected_s: float  # by itself, as estimated
    beside_s: float = 0.0  # seconds of it in which the other side was at work too


class Side:
    """Computing or loading: what it is at, and how many times longer it takes than estimated."""

    def __init__(self, slowdown: float) -> None:
        self.scale = 1.0
        self.work: _Work | None = None
        self._slowdown = slowdown

    def done_s(self, now: float) -> float:
        """Seconds that what was done of the work so far would have taken by itself."""
        assert self.work is not None
        beside_s = self.work.beside_s
        return now - self.work.started_at - beside_s + beside_s / self._slowdown

    def left_s(self, now: float, crowding: float = 1.0) -> float:
        """Seconds, by itself, that the work still takes; once overdue, as long as it is late.

        Others of its kind make it take `crowding` times as long.
        """
        if self.work is None:
            return 0.0
        return abs(crowding * self.scale * self.work.expected_s - self.done_s(now))

    def learn(self, now: float, crowding: float = 1.0) -> None:
        """The work is over and was all that was expected."""
        assert self.work is not None
        measured = max(self.done_s(now) / (crowding * self.work.expected_s), _LEAST_SCALE)
        self.scale = (1 - _NEWEST_WEIGHT) * self.scale + _NEWEST_WEIGHT * measured


class Pace:
    """Both sides on one clock: each is slower while the other is at work too.

    Args:
        slowdown: How many times longer both take beside each other.
    """

    def __init__(self, slowdown: float) -> None:
        self.compute = Side(slowdown)
        self.load = Side(slowdown)
        self._counted_at = 0.0

    def begin(self, side: Side, expected_s: float, now: float) -> None:
        """A side begins something that takes so many seconds by itself, as estimated."""
        self.advance(now)
        side.work = _Work(now, expected_s)

    def end(self, side: Side, now: float, *, learns: bool = True, crowding: float = 1.0) -> None:
        """What `side` was at is over; without `learns` its time says nothing."""
        self.advance(now)
        if learns:
            side.learn(now, crowding)
        side.work = None

    def advance(self, now: float) -> None:
        """Count the time since the last call of any method; to be called before a side is asked."""
        if self.compute.work is not None and self.load.work is not None:
            self.compute.work.beside_s += now - self._counted_at
            self.load.work.beside_s += now - self._counted_at
        self._counted_at = now
