"""Writes records into the disk tier: takes slots, lets payload be transferred, publishes it.

    portion 1   slots | transfer ........... | publish
    portion 2          slots |   transfer ............ | publish
    portion 3                 slots |       transfer ............ | publish

Much at once goes in portions: transactions of the index run beside transfers. Of puts that follow
each other, so does the one that takes slots for the next (reserve.py). With a quota one portion
follows the other.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from prefixstore.block_key import RecordName
from prefixstore.errors import TierError, TierFull, TierTimeout
from prefixstore.tiers.base import is_past
from prefixstore.tiers.disk.config import DiskTierConfig
from prefixstore.tiers.disk.files import SlabFiles
from prefixstore.tiers.disk.index import Allocation, SlotIndex
from prefixstore.tiers.disk.jobs import Span
from prefixstore.tiers.disk.reserve import SlotReserve
from prefixstore.tiers.disk.slot_table import SlotRef
from prefixstore.tiers.disk.space import is_small
from prefixstore.tiers.disk.transfers import StillWriting, Transfers, Writing
from prefixstore.tiers.outcomes import SharedCounters
from prefixstore.tiers.pages import PAGE_BYTES, round_up

logger = logging.getLogger(__name__)

# Records that share two transactions (taking slots, publishing); one portion is transferred while
# another's transactions run. Larger is better, as a transaction takes a quarter of a millisecond of
# a processor that copies and system calls want as well: on two cores 16 MiB went a tenth faster in
# one portion than in four. Smaller for small records, for which the index takes as long each as for
# large ones and is what others wait for.
_PORTION_BYTES = 16 << 20
_SMALL_PORTION_BYTES = 8 << 20
_SMALL_BYTES = 128 << 10
# Head start for the threads that begin their system calls, for which they need the interpreter's
# lock: beside a transaction from the start, puts of 16 MiB took a fifteenth longer.
_START_S = 1e-3
# Slots released in one transaction: few enough for a seeking disk to do in 10 s.
_WIPED_AT_ONCE = 1024
# Part of a slot's lease in which writes are begun; once the lease is over the slot may belong to
# another process. Slots taken ahead have a quarter of it behind them (reserve.py), and the last
# write begun needs time to end, too.
_LEASE_PART = 0.5
_PUTS_AT_ONCE = 3  # portions at once: one is transferred, one waits for that, one is published


@dataclass
class _Put:
    """A portion of records on its way to the disk.

    Attributes:
        records: All of them, by name.
        allocation: Of which some have a slot, and some are there already.
        began: When, before it had any slots.
        writing: Those, in order.
    """

    records: Mapping[RecordName, memoryview]
    allocation: Allocation
    began: float
    writing: Writing


class RecordWriter:
    """The tier's way in. Thread-safe.

    Args:
        config: The tier's.
        index: Where slots are taken and records published.
        files: Of which dropped slabs are removed.
        transfers: Moves the payload.
        counters: The tier's.
    """

    def __init__(
        self,
        config: DiskTierConfig,
        index: SlotIndex,
        files: SlabFiles,
        transfers: Transfers,
        counters: SharedCounters,
    ) -> None:
        self._config = config
        self._index = index
        self._files = files
        self._transfers = transfers
        self._counters = counters
        self._ttl_ns = None if config.ttl_s is None else int(config.ttl_s * 1e9)
        self._reserve = SlotReserve(index, config.limits)
        # On a small file system the index must get its room for all records before payloads take
        # any.
        self._has_portions = not is_small(config.path)
        # A quota counts published records only, and only those can give way to the next portion.
        self._puts_at_once = _PUTS_AT_ONCE if config.quota_bytes is None else 1

    def write(
        self, records: Mapping[RecordName, memoryview], priority: int, deadline: float | None
    ) -> dict[RecordName, TierError]:
        """Keep records that are not there; returns why not, of those that are lost."""
        errors: dict[RecordName, TierError] = {}
        puts: deque[_Put] = deque()
        how = priority, deadline

        def end(put: _Put) -> None:
            errors.update(self._end_put(put, *how))

        try:
            for portion in _portions(records) if self._has_portions else [records]:
                if len(puts) == self._puts_at_once:
                    end(puts.popleft())
                try:
                    puts.append(self._begin_put(portion, *how))
                except TierFull as error:  # not even the index has room
                    errors |= dict.fromkeys(portion, error)
            self._take_ahead(puts, priority)
        finally:
            # The threads still read the caller's memory: wait for every put, whatever became of the
            # others.
            with ExitStack() as rest:
                for put in reversed(puts):
                    rest.callback(end, put)
        return errors

    def _begin_put(
        self, records: Mapping[RecordName, memoryview], priority: int, deadline: float | None
    ) -> _Put:
        """Take slots, and let the threads write to them."""
        began = time.monotonic()
        sizes = {name: record.nbytes for name, record in records.items()}
        allocation = self._reserve.allocate(sizes, priority, deadline)
        if allocation is None:
            allocation = self._index.allocate_many(sizes, priority, deadline)
        refs = allocation.refs.values()
        spans = [
            Span(slab, slot * slab.slot_bytes, records[name]) for slab, slot, _, name, *_ in refs
        ]
        latest = began + self._config.write_lease_s * _LEASE_PART
        try:
            self._enter(allocation)
            writing = self._transfers.begin_writing(spans, deadline, latest)
        except TierError:
            self._index.abandon([*refs, *allocation.dead])
            raise
        return _Put(records, allocation, began, writing)

    def _take_ahead(self, puts: Sequence[_Put], priority: int) -> None:
        """Take slots for another portion like the first of these, while they are transferred."""
        if not puts or not self._has_portions:
            return
        if self._transfers.is_over(puts[-1].writing, _START_S):
            return
        sizes = {name: record.nbytes for name, record in puts[0].records.items()}
        evicted = any(put.allocation.num_evicted for put in puts)
        ahead = self._reserve.take_ahead(sizes, priority, evicted)
        if ahead is None:
            return
        puts[-1].allocation.dead += ahead.dead
        try:
            self._enter(ahead)
        except TierError as error:  # not worth failing the put for
            logger.warning("files that the index dropped stay until a sweep: %s", error)

    def _enter(self, allocation: Allocation) -> None:
        """Count what had to go, and remove the files that did."""
        self._counters.add(num_evictions=allocation.num_evicted, num_expired=allocation.num_expired)
        for slab in allocation.dropped:
            self._files.remove(slab)

    def _end_put(
        self, put: _Put, priority: int, deadline: float | None
    ) -> dict[RecordName, TierError]:
        """Publish what was written, and give up the slots of what was not; returns why not."""
        refs = list(put.allocation.refs.values())
        outcomes = self._transfers.end_writing(put.writing)
        errors = {ref.name: e for ref, e in zip(refs, outcomes, strict=True) if e is not None}
        if not is_past(deadline):
            errors |= {
                name: self._past_lease() for name, e in errors.items() if type(e) is TierTimeout
            }
        # a slot that the kernel may still write to stays taken until its lease is over
        failed = [name for name, error in errors.items() if not isinstance(error, StillWriting)]
        self._index.abandon([ref for ref in refs if ref.name in failed])
        errors |= self._publish([r for r in refs if r.name not in errors], priority, deadline)
        allocation = put.allocation
        for name in put.records.keys() - allocation.refs.keys() - allocation.held.keys():
            errors[name] = self._no_room(put.records[name].nbytes, priority)
        self._index.touch(allocation.held.values(), self._ttl_ns)
        try:
            self.wipe(allocation.dead, put.began, deadline)
        except TierError as error:  # not worth failing the put for
            logger.warning("slots of writers that died stay out of use for now: %s", error)
        return errors

    def _publish(
        self, refs: Sequence[SlotRef], priority: int, deadline: float | None
    ) -> dict[RecordName, TierError]:
        """Let readers find what was written; returns why not, of those that are lost."""
        if not refs:
            return {}
        try:
            published = self._index.publish_many(refs, priority, self._ttl_ns, deadline)
        except TierFull as error:
            self._index.abandon(refs)
            return {ref.name: error for ref in refs}
        except TierError:
            self._index.abandon(refs)
            raise
        kept = [ref.record_bytes for ref in refs if ref.name in published]
        self._counters.add(num_puts=len(kept), written_bytes=sum(kept))
        return {ref.name: self._past_lease() for ref in refs if ref.name not in published}

    def nothing_ahead(self) -> AbstractContextManager[None]:
        """Meanwhile only records under way have slots; others go back with the next transaction."""
        return self._reserve.nothing_ahead()

    def wipe(self, refs: Iterable[SlotRef], taken_at: float, deadline: float | None = None) -> None:
        """Wipe and release slots that are this call's own.

        Args:
            refs: Which ones.
            taken_at: When their lease began, or before, of `time.monotonic()`.
            deadline: Likewise.

        Raises:
            TierError: If one cannot be wiped by the deadline, or within its lease, after which it
                may be another's; it stays taken until then, and is then tried again.
        """
        refs, lease_s = list(refs), self._config.write_lease_s
        errors: list[TierError] = []
        while refs and not any(isinstance(error, TierTimeout) for error in errors):
            now = time.monotonic()
            if now > taken_at + lease_s / 2:  # all may take longer than one lease
                taken_at, refs = now, self._index.renew(refs, deadline)
            some, refs = refs[:_WIPED_AT_ONCE], refs[_WIPED_AT_ONCE:]
            latest = taken_at + lease_s if deadline is None else min(deadline, taken_at + lease_s)
            outcomes = self._transfers.wipe_many([(ref.slab, ref.offset) for ref in some], latest)
            wiped = [ref for ref, error in zip(some, outcomes, strict=True) if error is None]
            self._index.release(wiped, deadline)
            errors += [error for error in outcomes if error is not None]
        if errors:
            raise errors[0]

    def _past_lease(self) -> TierTimeout:
        lease = f"{self._config.write_lease_s} s (write_lease_s)"
        return TierTimeout(f"{self._config.name}: expected a write within {lease}, got more")

    def _no_room(self, num_bytes: int, priority: int) -> TierFull:
        return TierFull(
            f"{self._config.name}: expected room for {num_bytes} bytes of priority {priority}"
            f" within {self._config.capacity_bytes}, or within its identity's quota; what is there"
            " is too small, pinned, in use or of a higher priority"
        )


def _portions(
    records: Mapping[RecordName, memoryview],
) -> Iterator[Mapping[RecordName, memoryview]]:
    """All of them, in their order; each portion ends with the record that fills it."""
    portion: dict[RecordName, memoryview] = {}
    num_bytes = 0
    for name, record in records.items():
        portion[name] = record
        num_bytes += round_up(record.nbytes, PAGE_BYTES)
        is_small = num_bytes < _SMALL_BYTES * len(portion)
        if num_bytes >= (_SMALL_PORTION_BYTES if is_small else _PORTION_BYTES):
            yield portion
            portion, num_bytes = {}, 0
    if portion:
        yield portion
