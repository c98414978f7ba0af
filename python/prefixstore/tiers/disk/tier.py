"""Records on a local disk: payload files in slots, an index in SQLite, shared by processes.

    DIR/index.sqlite (-wal, -shm)     which slot holds which block; can be rebuilt from the slabs
    DIR/slab-v1-000001-...kvb         records, see files.py
    DIR/tier.lock                     held shared while the tier is open, alone while it is mended

A record is written whole before the index shows it, and hidden before its slot is used again. The
payload is not flushed to the platters first: after a kill -9 it is where it was written, and after
a power cut a torn record fails its checksums and is a miss. Flushing every record would cost more
than the cache wins. Every reader must verify what it gets. The directory must be on a local file
system (SQLite's WAL needs shared memory between the processes).

    get_many    one look-up -> transfers (transfers.py) -> are they still there? One more look-up,
                where anything at all has changed in the index meanwhile
    put_many    slots are taken -> transfers -> records are published (writer.py)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from prefixstore.block_key import RecordName
from prefixstore.errors import BlockCorrupted, TierError, TierTimeout
from prefixstore.tiers.base import (
    Held,
    LookOutcome,
    ReadOutcome,
    Swept,
    Tier,
    TierStats,
    check_priority,
    is_past,
    too_late,
)
from prefixstore.tiers.disk import slab_table
from prefixstore.tiers.disk.check import Checker
from prefixstore.tiers.disk.config import DiskTierConfig as DiskTierConfig
from prefixstore.tiers.disk.files import Slab, SlabFiles
from prefixstore.tiers.disk.jobs import Span
from prefixstore.tiers.disk.opening import Directory
from prefixstore.tiers.disk.slot_table import SlotRef
from prefixstore.tiers.disk.transfers import Transfers
from prefixstore.tiers.disk.writer import RecordWriter
from prefixstore.tiers.outcomes import SharedCounters, of_each_mention
from prefixstore.tiers.pages import flat_bytes

logger = logging.getLogger(__name__)

_Read = Callable[[Sequence[Span], float | None], list[int | TierError]]


class DiskTier(Tier):
    """A bounded tier in a directory; of the lowest priority, least recently used records give way.

    Args:
        config: Where, how large, and how.
        clock: Seconds by which records age, in place of the time that clock.py tells.

    Raises:
        TierUnavailable: On opening, if the directory cannot be written, holds the files of a newer
            version, or has a damaged, older or removed index that other processes have open.
    """

    def __init__(self, config: DiskTierConfig, clock: Callable[[], float] | None = None) -> None:
        self._config = config
        self._ttl_ns = None if config.ttl_s is None else int(config.ttl_s * 1e9)
        self._counters = SharedCounters()
        self._directory = Directory(config)
        clock_ns = None if clock is None else lambda: int(clock() * 1e9)
        try:
            self._files = SlabFiles(config.path, config.name, config.io)
            self._transfers = Transfers(self._files, config.name, config.num_threads)
            self._index = self._directory.open_index(self._files, self._transfers, clock_ns)
        except BaseException:
            self._directory.close()
            raise
        self._look_ups = self._index.look_ups
        self._writer = RecordWriter(
            config, self._index, self._files, self._transfers, self._counters
        )

    @property
    def name(self) -> str:
        return self._config.name

    @property
    def knows_what_it_holds(self) -> bool:
        return True

    def get_many(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        *,
        offsets: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        starts: Sequence[int | None] = [None] * len(names) if offsets is None else offsets
        return self._get_many(names, outs, starts, deadline, self._transfers.read_many)

    def get_or_abandon_many(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        *,
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        read = self._transfers.read_or_abandon_many
        return self._get_many(names, outs, [None] * len(names), deadline, read)

    def peek(self, name: RecordName, out: memoryview) -> int | None:
        """`get` for who only looks: the record does not count as used."""
        ((outcome,), _) = self._read_many([name], [out], [None], None, self._transfers.read_many)
        if isinstance(outcome, TierError):
            raise outcome
        return outcome

    def put_many(
        self,
        names: Sequence[RecordName],
        records: Sequence[memoryview],
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> list[TierError | None]:
        check_priority(priority)
        if is_past(deadline):
            return [too_late(self.name)] * len(names)
        given: dict[RecordName, memoryview] = {}
        for name, record in zip(names, records, strict=True):
            given.setdefault(name, flat_bytes(record))
        errors = self._writer.write(given, priority, deadline) if given else {}
        return [errors.get(name) for name in names]

    def contains_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[LookOutcome]:
        found = self._look_ups.names_among(names, deadline)
        return [name in found for name in names]

    def delete_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[LookOutcome]:
        now = time.monotonic()
        hidden, held = self._index.unpublish_many(set(names), deadline)
        self._counters.add(num_deletes=len(held))
        self._writer.wipe(hidden, now, deadline)
        return of_each_mention(names, {name: name in held for name in names})

    def delete_identity(self, identity: bytes) -> None:
        """Forget every record of an identity: of one model and salt. None is found afterwards.

        What lies of it in slots and files that are no longer in use is wiped as well, so that no
        rebuilt index will find it.
        """
        with self._writer.nothing_ahead():
            now = time.monotonic()
            hidden, num_deletes = self._index.unpublish_identity(identity)
        self._counters.add(num_deletes=num_deletes)
        self._writer.wipe(hidden, now)
        self._remove_orphans()

    def pin_many(self, names: Sequence[RecordName], is_pinned: bool = True) -> list[bool]:
        """Keep records from eviction and expiry, or no longer; False where there was none.

        A pin is in the index: it holds until it is taken away, by whichever process.
        """
        found = self._index.pin_many(names, is_pinned)
        return [name in found for name in names]

    def list_identities(self) -> dict[bytes, Held]:
        return {identity: Held(*held) for identity, *held in self._look_ups.list_identities()}

    def list_records(self) -> list[tuple[RecordName, int]]:
        """Name and bytes of every record there is now, in the order in which they lie."""
        return self._look_ups.list_records()

    def stats(self) -> TierStats:
        num_records, used_bytes = self._look_ups.totals()
        counters = self._counters.copy()
        return counters.stats(self._config.capacity_bytes, used_bytes, num_records)

    def check(self, fix: bool = False) -> list[str]:
        """Recount everything; what does not add up, in words. Empty when all is well.

        Slabs are looked at only by an index that is sound itself.

        Args:
            fix: Make SQLite's indexes anew where one disagrees with its table, free the slots that
                do not hold their record, read slabs anew that do not fit the index, forget those
                whose file is gone, and remove files that nobody knows. Damage to SQLite's own pages
                or to single cells stays, and is told once more: it is mended when the tier is next
                opened while no other process has it.
        """
        checker = Checker(
            self._index, self._files, self._config.limits, self._writer.wipe if fix else None
        )
        with self._writer.nothing_ahead():
            checker.run()
        for slab in checker.dropped:
            self._files.remove(slab)
        if checker.errors:
            raise checker.errors[0]
        if fix and checker.is_index_sound:
            self._remove_orphans()
        return checker.problems

    def sweep(self) -> Swept:
        """Give back what expired, and what a process that died left behind.

        Orphans are slots of writes that were never finished, and files that the index does not
        know.
        """
        with self._writer.nothing_ahead():
            num_expired, num_bytes = self._index.expire()
        self._counters.add(num_expired=num_expired)
        now = time.monotonic()
        dead = self._index.take_dead()
        self._writer.wipe(dead, now)
        orphans = self._remove_orphans()
        num_bytes += sum(ref.slab.slot_bytes for ref in dead)
        num_bytes += sum(slab.num_bytes for slab in orphans)
        return Swept(num_expired, len(dead) + len(orphans), num_bytes)

    def close(self) -> None:
        try:
            with self._writer.nothing_ahead():
                self._index.close()
        finally:
            self._transfers.close()
            self._files.close()
            self._directory.close()

    # ---- helpers -----------------------------------------------------------------------------

    def _get_many(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        starts: Sequence[int | None],
        deadline: float | None,
        read: _Read,
    ) -> list[ReadOutcome]:
        if is_past(deadline):
            return [too_late(self.name)] * len(names)
        outcomes, used = self._read_many(names, outs, starts, deadline, read)
        refreshed_ns = self._ttl_ns if self._config.refresh_ttl else None
        self._index.touch(used, refreshed_ns)
        self._counters.add_reads(outcomes)
        return outcomes

    def _read_many(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        starts: Sequence[int | None],
        deadline: float | None,
        read: _Read,
    ) -> tuple[list[ReadOutcome], list[SlotRef]]:
        """The outcomes, and which records they are of where that is a number of bytes.

        Args:
            starts: Of parts, the byte of the record to begin at; None for whole records.
        """
        outcomes: list[ReadOutcome] = [None] * len(names)
        found, version = self._look_ups.find_at_version(names, deadline)
        asked: list[tuple[int, SlotRef]] = []
        spans = []
        for number, (name, out, start) in enumerate(zip(names, outs, starts, strict=True)):
            ref = found.get(name)
            if ref is None:
                continue
            if start is None and ref.record_bytes > out.nbytes:
                outcomes[number] = BlockCorrupted(
                    f"{self.name}: expected a record of at most {out.nbytes} bytes,"
                    f" got {ref.record_bytes}"
                )
                continue
            asked.append((number, ref))
            spans.append(_span(ref, out, start or 0))
        if not asked:
            return outcomes, []
        results = read(spans, deadline)
        # a slot is overwritten only after the eviction shows in the index: names still there were
        # read intact
        intact = None
        if self._look_ups.version(deadline) != version:
            intact = self._look_ups.places_among([ref.name for _, ref in asked], deadline)
        used = []
        for (number, ref), result in zip(asked, results, strict=True):
            # (a buffer that may still be written to is reported even if its record is gone)
            if intact is None or ref.place in intact or isinstance(result, TierTimeout):
                outcomes[number] = result
                if isinstance(result, int):
                    used.append(ref)
        return outcomes, used

    def _remove_orphans(self) -> list[Slab]:
        """Delete the files that the index does not know; returns them.

        A file is made after its row and deleted after it, so nobody can be about to use one.
        """
        with self._index.frozen() as sql:
            known = set(slab_table.list_slabs(sql))
            orphans = [slab for slab in self._files.list_slabs() if slab not in known]
            for slab in orphans:
                self._files.remove(slab)
        return orphans


def _span(ref: SlotRef, out: memoryview, start: int) -> Span:
    """What `out` takes of a record from `start` on."""
    num_bytes = min(out.nbytes, max(ref.record_bytes - start, 0))
    return Span(ref.slab, ref.offset + start, flat_bytes(out)[:num_bytes])
