"""Reads records of a tier into buffers, one batch ahead of whoever decodes them.

    fetching   | batch 0 | batch 1 | batch 2 |
    decoding             | batch 0 | batch 1 | batch 2 |

A disk or a server idles while its caller decodes, and the processor while it waits for them; so the
two take turns on two buffers.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from prefixstore.block_key import BlockKey
from prefixstore.record_header import TRAILER_BYTES
from prefixstore.store.guarded_tier import GuardedTier
from prefixstore.store.header_check import Found
from prefixstore.tiers.pages import PAGE_BYTES, page_aligned, round_up

_MAX_FREE = 4


def record_room(key: BlockKey) -> int:
    """Bytes that a record is read into: a protected one is opened where it lies."""
    return round_up(key.layout.max_record_bytes + TRAILER_BYTES, PAGE_BYTES)


@dataclass(eq=False)
class Slab:
    """Memory that records are read into, uint8; it begins on a page."""

    memory: np.ndarray
    is_abandoned: bool = False  # a tier that missed its deadline may still write to it

    def abandon(self) -> None:
        """Never use it again: a tier may still write to it."""
        self.is_abandoned = True


class Slabs:
    """Buffers that were used before: a new one costs a page fault every few pages. Thread-safe."""

    def __init__(self) -> None:
        self._free: list[Slab] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Slab:
        """One of that size at least; the caller's."""
        with self._lock:
            # The last one may still be in a processor's cache.
            for number in reversed(range(len(self._free))):
                if self._free[number].memory.nbytes >= num_bytes:
                    return self._free.pop(number)
        return Slab(page_aligned(num_bytes))

    def give_back(self, slab: Slab) -> None:
        """Nobody reads or writes it any more, unless it is abandoned: then it is let go."""
        if slab.is_abandoned:
            return
        with self._lock:
            self._free.append(slab)
            if len(self._free) > _MAX_FREE:
                del self._free[0]


Fetched = tuple[Sequence[int], list[Found | None], Slab]


class Fetcher:
    """Reads batches of one load from one tier.

    Args:
        tier: Where from.
        keys: Of all blocks of the load.
        deadline: What is not there by then is a miss.
        slabs: Where buffers come from.
    """

    def __init__(
        self, tier: GuardedTier, keys: Sequence[BlockKey], deadline: float, slabs: Slabs
    ) -> None:
        self._tier = tier
        self._keys = keys
        self._deadline = deadline
        self._slabs = slabs

    def fetch_ahead(self, batches: Sequence[Sequence[int]]) -> Generator[Fetched, None, None]:
        """Each batch, what was found of it, and the slab it lies in, which is the caller's then.

        Closing it early waits for the batch under way.
        """
        if len(batches) == 1:
            yield self._fetch(batches[0])
            return
        # A thread for this load alone. A shared pool would have to survive forks, and loads would
        # wait for each other in it. Starting a thread takes 0.1 ms, a batch some milliseconds.
        with ThreadPoolExecutor(1, thread_name_prefix="prefixstore-fetch") as thread:
            ahead = self._begin(batches[0], thread)
            for following in batches[1:]:
                fetched = ahead.result()
                ahead = self._begin(following, thread)
                yield fetched
            yield ahead.result()

    def _begin(self, batch: Sequence[int], thread: ThreadPoolExecutor) -> Future[Fetched]:
        """Fetch a batch in that thread; at once in this one where that cannot be had."""
        try:
            return thread.submit(self._fetch, batch)
        except RuntimeError:  # no thread can be begun, as when the interpreter ends
            # it has kept the batch, and would fetch it again if it had a thread later
            thread.shutdown(cancel_futures=True)
        fetched: Future[Fetched] = Future()
        fetched.set_result(self._fetch(batch))
        return fetched

    def _fetch(self, batch: Sequence[int]) -> Fetched:
        keys = [self._keys[i] for i in batch]
        row_bytes = max(map(record_room, keys))
        slab = self._slabs.take(len(keys) * row_bytes)
        rows = slab.memory[: len(keys) * row_bytes].reshape(len(keys), row_bytes)
        found = self._tier.fetch_many(keys, list(rows), self._deadline, slab.abandon)
        return batch, found, slab
