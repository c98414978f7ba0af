"""Hands what loads found on to faster tiers, within a bound on the memory that it keeps meanwhile.

    a load:  records of a batch, in their slab -> its promotions -> queue of blocks -> faster tiers

Writing waits until a load has all it can get: it would take the processor and the memory from who
waits for these blocks. What loads keep until then and what is queued has room in `held_bytes`
together; the rest is dropped, and counted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prefixstore.store.block_sources import WrittenRecord
from prefixstore.store.block_targets import FetchedRecord
from prefixstore.store.block_writer import BlockWriter
from prefixstore.store.config import TierPolicy
from prefixstore.store.fetcher import Slab, Slabs
from prefixstore.store.in_flight import InFlight, SharedRecord
from prefixstore.store.load import Load
from prefixstore.store.stats import Counts
from prefixstore.store.write_queue import Chooser, WriteJob, noop


class Promoter:
    """The way up.

    Args:
        policies: Of each tier, fastest first.
        writer: Takes what is to go to faster tiers.
        counts: Of the store.
        in_flight: Whose claims end where a record has arrived.
        slabs: Take back what no record stays in.
    """

    def __init__(
        self,
        policies: Sequence[TierPolicy],
        writer: BlockWriter,
        counts: Counts,
        in_flight: InFlight,
        slabs: Slabs,
    ) -> None:
        self._promoted_into = [i for i, policy in enumerate(policies) if policy.promote]
        self._writer = writer
        self._counts = counts
        self._in_flight = in_flight
        self._slabs = slabs
        # guards the next two and every load's promotions; held while records are handed on
        self._lock = threading.Lock()
        self._under_way: set[Load] = set()
        self._passed_over: list[Chooser] = []

    @contextmanager
    def passing_over(self, is_meant: Chooser) -> Iterator[None]:
        """Of loads that are under way or begin in the context, these go to no faster tier."""
        with self._lock:
            self._passed_over.append(is_meant)
            for load in self._under_way:
                load.passed_over.append(is_meant)
        try:
            yield
        finally:
            with self._lock:
                self._passed_over.remove(is_meant)

    @contextmanager
    def under_way(self, load: Load) -> Iterator[None]:
        """A load, as long as it may have something to be handed on."""
        with self._lock:
            load.passed_over += self._passed_over
            self._under_way.add(load)
        try:
            yield
        finally:
            with self._lock:
                self._under_way.remove(load)

    def add(self, load: Load, number: int, records: Sequence[FetchedRecord], slab: Slab) -> None:
        """Records of a tier were right: faster ones are to have them, and meanwhile whoever waits.

        Args:
            load: That has them.
            number: Of the tier.
            records: All that were right in the slab.
            slab: Where they lie; it is given back unless they stay there.
        """
        tiers = tuple(i for i in self._promoted_into if i < number)
        if not tiers or not records:
            self._slabs.give_back(slab)
            return
        num_bytes = sum(record.data.nbytes for record in records)
        share = -(-slab.memory.nbytes // len(records))
        # Records that fill at least half of their slab keep it. Fewer, or much shorter than their
        # rows, would hold several times their own size in memory, so they are copied.
        is_full = 2 * num_bytes >= slab.memory.nbytes
        stays = is_full and self._takes_room(load, share * len(records), len(records))
        if stays or self._takes_room(load, num_bytes, len(records)):
            kept = records
        else:
            kept = [one for one in records if self._takes_room(load, one.data.nbytes, 1)]
        for record in kept:
            data = record.data if stays else record.data.copy()
            source = WrittenRecord(data, share if stays else data.nbytes)
            self._keep(load, number, record, source, tiers)
        dropped = set(records).difference(kept)
        are_awaited = [self._give(load, number, record) for record in dropped]
        if not stays and not any(are_awaited):
            self._slabs.give_back(slab)
        if dropped:
            self._counts.add(num_promotions_dropped=len(dropped))
            self.hand_on(load)  # writing makes room for further ones

    def hand_on(self, load: Load) -> None:
        """Hand on what was loaded so far; its claims end where the records arrive."""
        # The lock: no record may slip through between `passing_over` and the emptying of the queue.
        with self._lock:
            for job in load.promotions:
                if load.passes_over(job) or not self._writer.offer(job):
                    self._counts.add(num_promotions_dropped=1)
                    job.arrived()
            load.promotions.clear()
            load.held_bytes = load.num_held = 0

    def _takes_room(self, load: Load, num_bytes: int, num_records: int) -> bool:
        """Whether there is room for that much more, which is the load's then."""
        with self._lock:
            num_held = sum(one.num_held for one in self._under_way) + num_records
            held_bytes = sum(one.held_bytes for one in self._under_way) + num_bytes
            if not self._writer.has_room(num_held, held_bytes):
                return False
            load.held_bytes += num_bytes
            load.num_held += num_records
            return True

    def _keep(
        self,
        load: Load,
        number: int,
        record: FetchedRecord,
        source: WrittenRecord,
        tiers: tuple[int, ...],
    ) -> None:
        name, is_claimed = record.key.name, record.index in load.claimed
        arrived = self._in_flight.releaser(name) if is_claimed else noop
        load.promotions.append(WriteJob(record.key, source, tiers, arrived=arrived))
        if is_claimed:
            load.claimed.discard(record.index)
            self._in_flight.share(name, SharedRecord(number, source.record))

    def _give(self, load: Load, number: int, record: FetchedRecord) -> bool:
        """Give a record that is not kept to who waits for it just now; whether anybody does."""
        if record.index not in load.claimed:
            return False
        load.claimed.discard(record.index)
        return self._in_flight.give(record.key.name, SharedRecord(number, record.data))
