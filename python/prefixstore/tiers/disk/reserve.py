"""Slots that the disk tier's writer takes ahead, for the records that most likely come next.

    put 1    slots | transfer ............ | publish
                     slots for put 2
    put 2                                            | transfer ............ | publish
                                                       slots for put 3

Where puts follow each other, the transaction that takes slots runs beside the transfer of the put
before, and the next transfer begins without one. In the index they are as those of any writer,
under a ticket and a lease: where this process dies, whoever allocates next has them. They are used
only while nobody else changed the index, who may have had them meanwhile, and go back when other
puts come, and on closing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from prefixstore.block_key import RecordName
from prefixstore.errors import TierError
from prefixstore.tiers.disk.index import Allocation, SlotIndex
from prefixstore.tiers.disk.slab_table import Limits
from prefixstore.tiers.disk.slot_table import SlotRef
from prefixstore.tiers.disk.sql import NOW
from prefixstore.tiers.pages import PAGE_BYTES, round_up

logger = logging.getLogger(__name__)

_NS = 1_000_000_000
_LEAST_BYTES = 1 << 20  # smaller puts are over before slots could be taken ahead
# Slots taken ahead may evict records: at most a sixteenth of the capacity, and none while puts find
# free slots by themselves.
_PART_OF_CAPACITY = 16
_NEXT_WITHIN_NS = _NS  # where puts are rarer than that, none waits for a transaction
# Slots are used only in the first quarter of their lease, as writing takes time too.
_LEASE_PARTS = 4


class _Kind(NamedTuple):
    """Of slots: who may have them."""

    slot_bytes: int
    priority: int


class _Ahead(NamedTuple):
    """Slots taken ahead.

    Attributes:
        kind: What they are for.
        refs: Theirs.
        when: By the tier's time.
        version: Of the index, as others left it.
        evicted: Whether records had to go for them.
    """

    kind: _Kind
    refs: list[SlotRef]
    when: int
    version: int
    evicted: bool


class _Put(NamedTuple):
    """What was put last: the kind of its slots, by the tier's time, and the index then."""

    kind: _Kind
    when: int
    version: int


class SlotReserve:
    """Slots taken ahead for the next put. Thread-safe; nobody waits for anybody.

    Args:
        index: Where they are taken.
        limits: The tier's. With a quota nothing is taken ahead: what may give way depends on whose
            record comes.
    """

    def __init__(self, index: SlotIndex, limits: Limits) -> None:
        self._index = index
        self._limits = limits
        self._lock = threading.Lock()
        self._ahead: _Ahead | None = None
        self._last: _Put | None = None

    def allocate(
        self, sizes: Mapping[RecordName, int], priority: int, deadline: float | None
    ) -> Allocation | None:
        """Slots for those records that are not there, without a transaction.

        None where there are too few of their kind; what there is goes back with the next one.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            allocation = None
            if self._ahead is not None:
                try:
                    allocation = self._allocate(self._ahead, sizes, priority, deadline)
                finally:
                    if allocation is None:
                        self._give_back()
            return allocation
        finally:
            self._lock.release()

    def take_ahead(
        self, sizes: Mapping[RecordName, int], priority: int, evicted: bool
    ) -> Allocation | None:
        """Take slots for another put like this one, if the last one was like it, too.

        Args:
            sizes: Of the records of this put.
            priority: Theirs.
            evicted: Whether records had to go for them just now.

        Returns:
            What was done for that, or None.
        """
        kind = _kind_of(sizes, priority)
        if self._limits.quota_bytes is not None or not self._lock.acquire(blocking=False):
            return None
        try:
            last, self._last = self._last, None
            if kind is None:
                return None
            put = _Put(kind, self._index.now(), self._index.version_of_others(NOW))
            self._last = put
            # where other processes write too, slots taken ahead would hardly ever be usable
            if last is None or (last.kind, last.version) != (kind, put.version):
                return None
            if put.when - last.when > _NEXT_WITHIN_NS:
                return None
            return self._take(put, len(sizes), evicted)
        except TierError as error:  # not an error yet: the put that needs slots reports it
            logger.debug("no slots are taken ahead: %s", error)
            return None
        finally:
            self._lock.release()

    @contextmanager
    def nothing_ahead(self) -> Iterator[None]:
        """What was taken ahead goes back with the next transaction, and nothing is meanwhile."""
        with self._lock:
            self._give_back()
            yield

    def _allocate(
        self,
        ahead: _Ahead,
        sizes: Mapping[RecordName, int],
        priority: int,
        deadline: float | None,
    ) -> Allocation | None:
        lease_ns = int(self._limits.write_lease_s * _NS)
        is_new = self._index.now() - ahead.when <= lease_ns // _LEASE_PARTS
        if not is_new or ahead.kind != _kind_of(sizes, priority):
            return None
        held = self._index.held_at_version(sizes, ahead.version, deadline)
        if held is None or len(sizes) - len(held) > len(ahead.refs):
            return None
        names = [name for name in sizes if name not in held]
        self._ahead = ahead._replace(refs=ahead.refs[len(names) :])
        refs = {
            name: ref._replace(name=name, record_bytes=sizes[name])
            for name, ref in zip(names, ahead.refs, strict=False)
        }
        return Allocation(refs=refs, held=held)

    def _take(self, put: _Put, num_slots: int, evicted: bool) -> Allocation | None:
        slot_bytes, priority = put.kind
        most_bytes = self._limits.capacity_bytes // _PART_OF_CAPACITY
        if not _LEAST_BYTES <= num_slots * slot_bytes <= most_bytes:
            return None
        ahead = self._ahead  # slots that this put left over, or that another thread's left
        if ahead is not None and (ahead.kind, ahead.version) != (put.kind, put.version):
            self._give_back()
            ahead = None
        refs: list[SlotRef] = []
        when = put.when
        if ahead is not None:
            evicted |= ahead.evicted
            refs, when = ahead.refs, ahead.when if ahead.refs else put.when
        if len(refs) >= num_slots:
            return None
        allocation, taken, version = self._index.take_slots(
            slot_bytes, num_slots - len(refs), priority, may_evict=evicted, deadline=NOW
        )
        if version != put.version:  # another process has written since
            self._give_back()
            refs, when = [], put.when
        self._ahead = _Ahead(put.kind, refs + taken, when, version, allocation.num_evicted > 0)
        return allocation

    def _give_back(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._index.give_back(ahead.refs, ahead.version)


def _kind_of(sizes: Mapping[RecordName, int], priority: int) -> _Kind | None:
    """Of the slots that records need, if that is one."""
    slot_bytes = {round_up(max(size, 1), PAGE_BYTES) for size in sizes.values()}
    return _Kind(slot_bytes.pop(), priority) if len(slot_bytes) == 1 else None
