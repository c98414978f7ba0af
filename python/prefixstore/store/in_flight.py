"""Records that some thread is fetching: who wants one too waits for it, and fetches none twice.

    claim -> fetched and right: shared -> written to a faster tier: released
          -> fetched, and no room to keep it: given to who waits
          -> not there, or wrong: released

Who waits does so for the fetching alone. From the sharing on, the record is taken from where it was
fetched to: its way to the faster tier leads through the writers' queue, and no request waits for
what is written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from prefixstore.block_key import RecordName


@dataclass(frozen=True)
class SharedRecord:
    """A record that another thread fetched, whose memory is not written to again.

    Attributes:
        number: Of the tier that it came from.
        data: All of it, uint8; verified against what its thread expected of it.
    """

    number: int
    data: np.ndarray


@dataclass(eq=False)
class _Claim:
    """One thread's, for one record.

    Attributes:
        is_awaited: Whether somebody waits for it.
        is_settled: Set once the record is shared, or will never be.
        shared: The record, once it is.
    """

    is_awaited: bool = False
    is_settled: threading.Event = field(default_factory=threading.Event)
    shared: SharedRecord | None = None


class InFlight:
    """One claim for each name at a time. Thread-safe."""

    def __init__(self) -> None:
        self._claims: dict[RecordName, _Claim] = {}
        self._lock = threading.Lock()

    def claim(self, names: Sequence[RecordName]) -> list[bool]:
        """For each whether it is the caller's now; another thread has the rest, or the caller has
        had them before: of a name that comes twice the first is claimed.
        """
        with self._lock:
            is_mine = []
            for name in names:
                is_mine.append(name not in self._claims)
                self._claims.setdefault(name, _Claim())
            return is_mine

    def share(self, name: RecordName, record: SharedRecord) -> None:
        """Have whoever waits for the caller's claim take its record from here, until `release`."""
        with self._lock:
            claim = self._claims[name]
            claim.shared = record
            claim.is_settled.set()

    def give(self, name: RecordName, record: SharedRecord) -> bool:
        """Have those who wait for the caller's claim just now take its record, and end the claim.

        Returns:
            False if there are none: nobody has the record's memory then.
        """
        with self._lock:
            claim = self._claims.pop(name)
            if claim.is_awaited:
                claim.shared = record
            claim.is_settled.set()
            return claim.is_awaited

    def release(self, names: Iterable[RecordName]) -> None:
        """The caller's claims are over; names that are not claimed are passed over."""
        with self._lock:
            for name in names:
                claim = self._claims.pop(name, None)
                if claim is not None:
                    claim.is_settled.set()

    def releaser(self, name: RecordName) -> Callable[[], None]:
        """To be called where the record's way ends."""
        return partial(self.release, [name])

    def wait(self, names: Sequence[RecordName], deadline: float) -> list[SharedRecord | None]:
        """Wait until nobody is fetching any of these, or until the deadline.

        Returns:
            For each what was shared; None where the fastest tier may have it, or nobody.
        """
        with self._lock:
            claims = [self._claims.get(name) for name in names]
            for claim in claims:
                if claim is not None:
                    claim.is_awaited = True
        for claim in claims:
            if claim is not None:
                claim.is_settled.wait(max(0.0, deadline - time.monotonic()))
        return [None if claim is None else claim.shared for claim in claims]
