"""The disk tier's index: which slot holds which record.

    FREE (0) ------ allocate ------> WRITING (1) ------ publish ------> READY (2)
       ^                                |    ^                             |
       +----- release, once wiped ------+    +-------- unpublish ----------+
       +---------------------------- evict, expire ------------------------+

Each step is one transaction for many slots, so several processes may take them at once. Taking a
slot raises its `ticket`: a writer that was too slow finds its ticket gone and publishes nothing; a
reader that was overtaken by an eviction finds another ticket and reports a miss. A slot that stays
WRITING for longer than its lease is its dead writer's: whoever allocates or sweeps next takes it
over, wipes it and releases it. Marks of use, and slots that are given up, gather in memory and go
along with the next transaction. What only looks is in look_ups.py.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from prefixstore.block_key import RecordName
from prefixstore.errors import TierError, TierTimeout
from prefixstore.tiers.disk import deletion, slab_table, slot_table
from prefixstore.tiers.disk.clock import Clock
from prefixstore.tiers.disk.damage import IndexFile
from prefixstore.tiers.disk.files import Slab
from prefixstore.tiers.disk.look_ups import LookUps
from prefixstore.tiers.disk.pending import PendingChanges
from prefixstore.tiers.disk.room import Demand, admit, take_room
from prefixstore.tiers.disk.slab_table import Limits
from prefixstore.tiers.disk.slot_table import SlotRef
from prefixstore.tiers.disk.sql import NOW, Connection, data_version
from prefixstore.tiers.pages import PAGE_BYTES, round_up

logger = logging.getLogger(__name__)

_NS = 1_000_000_000


@dataclass
class Allocation:
    """Slots to write to.

    Attributes:
        refs: By name; a record without one is held, or has no room.
        held: Records that were there already.
        dead: Slots taken over from dead writers, to be wiped and released.
        dropped: Slabs that had to go; their files are to be removed.
        num_evicted: Records that had to go.
        num_expired: Records that had to go anyway.
    """

    refs: dict[RecordName, SlotRef] = field(default_factory=dict)
    held: dict[RecordName, SlotRef] = field(default_factory=dict)
    dead: list[SlotRef] = field(default_factory=list)
    dropped: list[Slab] = field(default_factory=list)
    num_evicted: int = 0
    num_expired: int = 0


class SlotIndex:
    """The table of slots.

    Args:
        reader: For look-ups.
        writer: For transactions; its tables are prepared.
        limits: Bounds of the tier.
        clock: The tier's time.

    Attributes:
        look_ups: What the table says, outside of transactions.
        file: What SQLite says of the file.
        now: The tier's time, in nanoseconds.
    """

    def __init__(
        self, reader: Connection, writer: Connection, limits: Limits, clock: Clock
    ) -> None:
        self.look_ups = LookUps(reader, clock)
        self.file = IndexFile(writer)
        self._writer = writer
        self._limits = limits
        self.now = clock
        self._pending = PendingChanges()

    # ---- what waits for the next transaction ---------------------------------------------------

    def touch(self, refs: Iterable[SlotRef], ttl_ns: int | None = None) -> None:
        """Mark as used, and give `ttl_ns` from now on, unless that is None.

        Nobody waits for that: the record has been read.
        """
        if self._pending.mark(refs, self.now(), ttl_ns):
            self._write_pending(NOW)

    def abandon(self, refs: Iterable[SlotRef]) -> None:
        """Leave slots to whoever allocates next, without a transaction: the disk just failed."""
        self._pending.abandon(refs)

    def give_back(self, refs: Iterable[SlotRef], version: int) -> None:
        """Free slots of `take_slots` that nothing was written to."""
        self._pending.give_back(refs, version)

    # ---- transactions ------------------------------------------------------------------------

    def allocate_many(
        self, sizes: Mapping[RecordName, int], priority: int, deadline: float | None = None
    ) -> Allocation:
        """Take a slot for each record that is not there: a dead writer's, a free one, a new slab's,
        or an evicted record's.

        Args:
            sizes: Bytes of the records, by name.
            priority: Of the records; nothing of a higher one is evicted for them.
            deadline: Of `time.monotonic()`.
        """
        allocation = Allocation()
        with self._writing(deadline) as sql:
            now = self.now()
            self._take_over(sql, allocation, now)
            allocation.held = _held_among(sql, sizes, now)
            if allocation.held:
                sizes = {n: size for n, size in sizes.items() if n not in allocation.held}
            admitted, num_evicted = admit(sql, sizes, self._limits.quota_bytes)
            allocation.num_evicted += num_evicted
            names_by_size: dict[int, list[RecordName]] = {}
            for name in admitted:
                slot_bytes = round_up(max(sizes[name], 1), PAGE_BYTES)
                names_by_size.setdefault(slot_bytes, []).append(name)
            for slot_bytes, names in names_by_size.items():
                wanted = Demand(slot_bytes, len(names), priority, now)
                slots = self._take_slots(sql, allocation, wanted)
                for name, (slab, slot, ticket, *_) in zip(names, slots, strict=False):
                    allocation.refs[name] = SlotRef(slab, slot, ticket, name, sizes[name])
        return allocation

    def take_slots(
        self,
        slot_bytes: int,
        num_slots: int,
        priority: int,
        may_evict: bool,
        deadline: float | None = None,
    ) -> tuple[Allocation, list[SlotRef], int]:
        """Take slots before it is known for which records.

        Returns what was done for that, the slots, and the `version_of_others`.
        """
        allocation = Allocation()
        with self._writing(deadline) as sql:
            now = self.now()
            self._take_over(sql, allocation, now)
            wanted = Demand(slot_bytes, num_slots, priority, now, may_evict)
            slots = self._take_slots(sql, allocation, wanted)
            return allocation, slots, data_version(sql)

    def held_at_version(
        self, names: Collection[RecordName], version: int, deadline: float | None = None
    ) -> dict[RecordName, SlotRef] | None:
        """Those that are there; None where that is not the `version_of_others` any more."""
        # the writer's connection: a reader's cache does not have what was just changed
        with self._writer.reading(deadline) as sql:
            return _held_among(sql, names, self.now()) if data_version(sql) == version else None

    def version_of_others(self, deadline: float | None = None) -> int:
        """`LookUps.version`, but what this process changes through this index does not count."""
        with self._writer.reading(deadline) as sql:
            return data_version(sql)

    def publish_many(
        self,
        refs: Sequence[SlotRef],
        priority: int,
        ttl_ns: int | None,
        deadline: float | None = None,
    ) -> set[RecordName]:
        """Let readers find records; returns them, but for those whose slot was lost to a lease.

        Where another writer published the same block first, its record stands.
        """
        with self._writing(deadline) as sql:
            now = self.now()
            expires_at = None if ttl_ns is None else now + ttl_ns
            published = slot_table.publish(sql, refs, priority, now, expires_at)
            slab_table.touch_slabs(sql, {ref.slab.slab_id for ref in refs}, now, priority)
        return published

    def unpublish_many(
        self, names: Set[RecordName], deadline: float | None = None
    ) -> tuple[list[SlotRef], set[RecordName]]:
        """Hide records from readers, and take the free slots where their bytes still lie.

        Returns the slots, which are the caller's until `release`, and the records that were there.
        """
        with self._writing(deadline) as sql:
            return deletion.take_names(sql, names, self.now())

    def unpublish_identity(self, identity: bytes) -> tuple[list[SlotRef], int]:
        """Hide all records of an identity, and take the free slots where its bytes still lie.

        Returns the slots, and how many of them held a record.
        """
        with self._writing() as sql:
            return deletion.take_identity(sql, identity, self.now())

    def release(self, refs: Sequence[SlotRef], deadline: float | None = None) -> None:
        """Give back slots that were wiped."""
        if refs:
            with self._writing(deadline) as sql:
                slot_table.release_wiped(sql, refs)

    def renew(self, refs: Sequence[SlotRef], deadline: float | None = None) -> list[SlotRef]:
        """Begin the leases of slots anew; returns those that nobody has taken over since."""
        with self._writing(deadline) as sql:
            return slot_table.renew(sql, refs, self.now())

    def pin_many(self, names: Sequence[RecordName], is_pinned: bool) -> set[RecordName]:
        """Pin or unpin those that are there; returns them."""
        found = self.look_ups.names_among(names)
        with self._writing() as sql:
            slot_table.set_pinned(sql, found, is_pinned)
            return slot_table.ready_among(sql, found)

    def expire(self) -> tuple[int, int]:
        """Forget what is past its time; how many records, and their bytes."""
        with self._writing() as sql:
            return slab_table.expire(sql, self.now())

    def take_dead(self) -> list[SlotRef]:
        """Slots of writers whose lease is over, to be wiped and released."""
        with self._writing() as sql:
            now = self.now()
            return slot_table.take_dead(sql, self._lease_end(now), now)

    @contextmanager
    def frozen(self) -> Iterator[sqlite3.Connection]:
        """No process can take, give or evict a slot meanwhile."""
        with self._writing() as sql:
            yield sql

    def close(self) -> None:
        """Write what is pending, if that can be done, and disconnect."""
        try:
            if self._pending:
                self._write_pending()
        finally:
            self.look_ups.close()
            self._writer.close()

    def _take_over(self, sql: sqlite3.Connection, allocation: Allocation, now: int) -> None:
        """Take what dead writers left, and forget what expired."""
        allocation.dead = slot_table.take_dead(sql, self._lease_end(now), now)
        allocation.num_expired, _ = slab_table.expire(sql, now)

    def _take_slots(
        self, sql: sqlite3.Connection, allocation: Allocation, wanted: Demand
    ) -> list[SlotRef]:
        """As many as can be had, of dead writers first."""
        slots = _pop_dead(allocation.dead, wanted.slot_bytes, wanted.num_slots)
        wanted = replace(wanted, num_slots=wanted.num_slots - len(slots))
        room = take_room(sql, wanted, self._limits)
        allocation.num_evicted += room.num_evicted
        allocation.dropped += room.dropped
        return slots + room.slots

    def _lease_end(self, now: int) -> int:
        return now - int(self._limits.write_lease_s * _NS)

    def _write_pending(self, deadline: float | None = None) -> None:
        try:
            with self._writing(deadline):
                pass
        except TierError as error:
            # another process holding the index just now is nothing unusual
            is_usual = deadline is not None and isinstance(error, TierTimeout)
            level = logging.DEBUG if is_usual else logging.WARNING
            logger.log(level, "marks of use have to wait for another transaction: %s", error)

    @contextmanager
    def _writing(self, deadline: float | None = None) -> Iterator[sqlite3.Connection]:
        """A transaction that takes along what is pending; it stays pending if this fails."""
        with self._writer.writing(deadline) as sql:
            made = self._pending.apply(sql)
            yield sql
        self._pending.forget(made)


def _held_among(
    sql: sqlite3.Connection, names: Collection[RecordName], now: int
) -> dict[RecordName, SlotRef]:
    """The records of these names that are there."""
    held: dict[RecordName, SlotRef] = {}
    for hashes in slot_table.batches_of_hashes(names):
        # mostly none is there, and the names alone are found in half the time
        if slot_table.names_among(sql, hashes, now):
            found = slot_table.find(sql, hashes, now)
            held.update((ref.name, ref) for ref in found if ref.name in names)
    return held


def _pop_dead(dead: list[SlotRef], slot_bytes: int, at_most: int) -> list[SlotRef]:
    """Remove slots of that size from those to be wiped: a record will be written over them."""
    taken = [ref for ref in dead if ref.slab.slot_bytes == slot_bytes][:at_most]
    dead[:] = [ref for ref in dead if ref not in taken]
    return taken
