"""What a store counts."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class TierUse:
    """What a store has done with one tier.

    Attributes:
        name: The tier's name.
        num_hits: Verified records.
        num_misses: Look-ups that found nothing usable here, the corrupted and failed ones too.
        num_corrupted: Records that failed verification; deleted from the tier, or not written.
        num_errors: Calls that raised and records that met an error, but for a full tier.
        num_timeouts: Those of them for which time ran out.
        num_full: Records that found no room.
        num_skipped: Calls not made because the tier was down.
        num_written: Records put, saved or promoted.
        num_present: Records that were to be written and were there already.
        num_dropped: Records that were not written: the tier's queue was full, it was down, no
            faster tier had them any more, or they were deleted before their turn.
        read_bytes: Bytes of the records that were hits, once where two loads shared one.
        written_bytes: Bytes of the records that were put.
        is_down: Left alone just now: by look-ups, reads or writes, or by all of them.
    """

    name: str
    num_hits: int = 0
    num_misses: int = 0
    num_corrupted: int = 0
    num_errors: int = 0
    num_timeouts: int = 0
    num_full: int = 0
    num_skipped: int = 0
    num_written: int = 0
    num_present: int = 0
    num_dropped: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    is_down: bool = False


@dataclass(frozen=True)
class StoreStats:
    """What a store has done.

    Attributes:
        tiers: One entry each, in order of speed.
        num_loads: Blocks asked for.
        num_misses: Blocks that no tier had.
        num_saved: Blocks taken for writing.
        num_dropped: Blocks not written because the queue was full or closed, or because they were
            deleted before their turn.
        num_promotions_dropped: Records not moved up for the same reasons.
        num_coalesced: Blocks that another thread was fetching or had fetched just then.
        queue_entries: Blocks that wait for the writer now.
        queue_bytes: Their bytes.
    """

    tiers: tuple[TierUse, ...]
    num_loads: int = 0
    num_misses: int = 0
    num_saved: int = 0
    num_dropped: int = 0
    num_promotions_dropped: int = 0
    num_coalesced: int = 0
    queue_entries: int = 0
    queue_bytes: int = 0


class Counts:
    """Integers by name; thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, **increments: int) -> None:
        """Add to counters by name."""
        with self._lock:
            self._counts.update(increments)

    def as_dict(self) -> dict[str, int]:
        """A copy of all counters."""
        with self._lock:
            return dict(self._counts)
