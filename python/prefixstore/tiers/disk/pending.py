"""What goes along with the next transaction of the disk tier's index, whatever that is for."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from prefixstore.tiers.disk import slot_table
from prefixstore.tiers.disk.slot_table import Mark, Place, SlotRef
from prefixstore.tiers.disk.sql import data_version

_MAX_MARKS = 10_000  # some 3 MB


@dataclass
class Changes:
    """Changes that wait.

    Attributes:
        marks: Uses of records.
        abandoned: Slots whose leases end: something of a record may lie there.
        unused: Slots that were taken and not written to, with the version of the index then.
    """

    marks: dict[Place, Mark] = field(default_factory=dict)
    abandoned: list[SlotRef] = field(default_factory=list)
    unused: list[tuple[SlotRef, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.marks or self.abandoned or self.unused)


class PendingChanges:
    """Gathers them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changes = Changes()

    def __bool__(self) -> bool:
        return bool(self._changes)

    def mark(self, refs: Iterable[SlotRef], now: int, ttl_ns: int | None) -> bool:
        """Mark as used, and give `ttl_ns` from now on, unless that is None.

        Returns whether that should not wait. The order of use can. An expiry cannot, as other
        processes go by it; it is moved when a sixteenth of its time is over, not at every use.
        """
        is_due = False
        with self._lock:
            marks = self._changes.marks
            for ref in refs:
                pending = marks.get(ref.place)
                expires_at = pending.expires_at if pending is not None else None
                if ttl_ns is not None and abs(now + ttl_ns - (ref.expires_at or 0)) > ttl_ns // 16:
                    expires_at = now + ttl_ns
                    is_due = True
                marks[ref.place] = Mark(now, expires_at)
            return is_due or len(marks) >= _MAX_MARKS

    def abandon(self, refs: Iterable[SlotRef]) -> None:
        """End the leases of slots."""
        with self._lock:
            self._changes.abandoned += refs

    def give_back(self, refs: Iterable[SlotRef], version: int) -> None:
        """Free slots that were not written to, and were taken at that version of the index."""
        with self._lock:
            self._changes.unused += [(ref, version) for ref in refs]

    def apply(self, sql: sqlite3.Connection) -> Changes:
        """Make the changes in this transaction; they stay pending until `forget`."""
        with self._lock:
            pending = self._changes
            going = Changes(dict(pending.marks), list(pending.abandoned), list(pending.unused))
        slot_table.end_leases(sql, going.abandoned)
        if going.unused:
            version = data_version(sql)
            slot_table.release(sql, [ref for ref, then in going.unused if then == version])
            # Another process may meanwhile have deleted an identity whose bytes still lie in these
            # slots. It could not wipe slots that were taken, so their lease ends and whoever takes
            # them over wipes them.
            slot_table.end_leases(sql, [ref for ref, then in going.unused if then != version])
        slot_table.mark_used(sql, going.marks)
        return going

    def forget(self, made: Changes) -> None:
        """What was made is committed."""
        if not made:
            return
        abandoned, unused = set(made.abandoned), set(made.unused)
        with self._lock:
            pending = self._changes
            pending.abandoned = [ref for ref in pending.abandoned if ref not in abandoned]
            pending.unused = [one for one in pending.unused if one not in unused]
            for place, mark in made.marks.items():
                if pending.marks.get(place) == mark:
                    del pending.marks[place]
