"""Records that some thread is fetching: who wants one too waits for it, and fetches none twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from prefixstore.block_key import RecordName


class InFlight:
    """One claim for each name at a time. Thread-safe."""

    def __init__(self) -> None:
        self._claims: dict[RecordName, threading.Event] = {}
        self._lock = threading.Lock()

    def claim(self, names: Sequence[RecordName]) -> list[bool]:
        """For each whether it is the caller's now; another thread has the rest."""
        with self._lock:
            is_mine = [name not in self._claims for name in names]
            for name, mine in zip(names, is_mine, strict=True):
                if mine:
                    self._claims[name] = threading.Event()
            return is_mine

    def release(self, names: Iterable[RecordName]) -> None:
        """The caller's claims are over; names that are not claimed are passed over."""
        with self._lock:
            for name in names:
                claim = self._claims.pop(name, None)
                if claim is not None:
                    claim.set()

    def releaser(self, name: RecordName) -> Callable[[], None]:
        """To be called where the record's way ends."""
        return partial(self.release, [name])

    def wait(self, names: Iterable[RecordName], deadline: float) -> bool:
        """Wait until nobody fetches any of these; False once it is past the deadline."""
        with self._lock:
            claims = [self._claims[name] for name in names if name in self._claims]
        return all(claim.wait(max(0.0, deadline - time.monotonic())) for claim in claims)
