"""A bounded memory of record names."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from prefixstore.block_key import RecordName


class RecentNames:
    """The names added last, each for a while. Thread-safe.

    Args:
        capacity: At most so many; the oldest give way.
        ttl_s: Seconds that a name stays; None for as long as there is room.
    """

    def __init__(
        self,
        capacity: int = 1 << 16,
        ttl_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = capacity
        self._ttl_s = ttl_s
        self._clock = clock
        self._added_s: OrderedDict[RecordName, float] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, names: Iterable[RecordName]) -> list[bool]:
        """Add names; for each whether it was new."""
        with self._lock:
            now = self._clock()
            is_new = []
            for name in names:
                is_new.append(not self._holds(name, now))
                self._added_s[name] = now
                self._added_s.move_to_end(name)
            while len(self._added_s) > self._capacity:
                self._added_s.popitem(last=False)
            return is_new

    def contains_many(self, names: Sequence[RecordName]) -> list[bool]:
        """For each name whether it was added lately."""
        if not self._added_s:
            return [False] * len(names)
        with self._lock:
            now = self._clock()
            return [self._holds(name, now) for name in names]

    def discard(self, names: Iterable[RecordName]) -> None:
        """Forget names, whether they are there or not."""
        with self._lock:
            for name in names:
                self._added_s.pop(name, None)

    def _holds(self, name: RecordName, now: float) -> bool:
        added_s = self._added_s.get(name)
        return added_s is not None and (self._ttl_s is None or now - added_s < self._ttl_s)
