"""What can be done with slots of the disk tier's index; see index.py for the order of things.

Everything here runs inside a transaction of the index, or is a single look-up.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from prefixstore.block_key import BlockHash, RecordName
from prefixstore.tiers.disk import slab_table
from prefixstore.tiers.disk.files import Slab
from prefixstore.tiers.disk.runs import runs_of
from prefixstore.tiers.disk.schema import LOWEST_PRIORITY, PINNED
from prefixstore.tiers.disk.sql import IndexDamaged

_MAX_SQL_VALUES = 500
NOBODY = RecordName(b"", BlockHash(b""))  # the name in a slot that is taken, but not for a record
_SLOT = "slab_id = ? AND slot = ? AND ticket = ?"
_RUN = "slab_id = ? AND slot BETWEEN ? AND ?"
_IS_IN_TIME = "(expires_at IS NULL OR expires_at > ? OR rank >= 8)"


class Place(NamedTuple):
    """A slot, for as long as its ticket is not raised."""

    slab_id: int
    slot: int
    ticket: int


class SlotRef(NamedTuple):
    """A slot as the holder of its ticket sees it."""

    slab: Slab
    slot: int
    ticket: int
    name: RecordName
    record_bytes: int
    expires_at: int | None = None

    @property
    def place(self) -> Place:
        """What names the slot in the index."""
        return Place(self.slab.slab_id, self.slot, self.ticket)

    @property
    def offset(self) -> int:
        """In the slab's file."""
        return self.slot * self.slab.slot_bytes


class Mark(NamedTuple):
    """A use of a record; `expires_at` where that moved its time to live."""

    when: int
    expires_at: int | None


def refs_of(rows: Iterable[tuple[int, int, int, int, int]]) -> list[SlotRef]:
    """Slots out of rows of slab_id, slot_bytes, num_slots, slot and ticket; of nobody yet."""
    refs, slab = [], None  # neighbouring rows are mostly of one slab
    for slab_id, slot_bytes, num_slots, slot, ticket in rows:
        if not (type(slot) is type(slot_bytes) is type(ticket) is int):
            raise TypeError(f"expected a slot's numbers, got {(slot, slot_bytes, ticket)!r:.100}")
        if slab is None or slab.slab_id != slab_id:
            slab = Slab(slab_id, slot_bytes, num_slots)
        refs.append(SlotRef(slab, slot, ticket, NOBODY, 0))
    return refs


def _for_each(sql: sqlite3.Connection, statement: str, rows: Sequence[Sequence[object]]) -> int:
    """Execute a statement with each row of values; how many rows of the table it changed.

    Most of what a transaction takes along is empty most of the time, and a statement without rows
    would be prepared all the same.
    """
    return sql.executemany(statement, rows).rowcount if rows else 0


def batches_of_hashes(names: Iterable[RecordName]) -> Iterator[list[BlockHash]]:
    """As many at a time as a statement takes, each once."""
    hashes = list({name.block_hash for name in names})
    for start in range(0, len(hashes), _MAX_SQL_VALUES):
        yield hashes[start : start + _MAX_SQL_VALUES]


def find(sql: sqlite3.Connection, hashes: Sequence[BlockHash], now: int) -> Iterator[SlotRef]:
    """The records of these hashes that are there, and not past their time."""
    query = (
        "SELECT slab_id, slots.slot_bytes, num_slots, slot, ticket, identity, block_hash,"
        " record_bytes, expires_at FROM slots JOIN slabs USING (slab_id)"
        f" WHERE state = 2 AND block_hash IN ({','.join('?' * len(hashes))}) AND {_IS_IN_TIME}"
    )
    slab_of = cache(Slab)
    for row in sql.execute(query, (*hashes, now)):
        slab_id, slot_bytes, num_slots, slot, ticket, *name, size, expires_at = row
        if not (type(slot) is type(slot_bytes) is type(size) is int):
            raise TypeError(f"expected a record's numbers, got {(slot, slot_bytes, size)!r:.100}")
        slab = slab_of(slab_id, slot_bytes, num_slots)
        yield SlotRef(slab, slot, ticket, RecordName(*name), size, expires_at)


def names_among(sql: sqlite3.Connection, hashes: Sequence[BlockHash], now: int) -> set[RecordName]:
    """`find` for who asks no more than whether they are there: in half the time."""
    query = (
        "SELECT identity, block_hash FROM slots WHERE state = 2"
        f" AND block_hash IN ({','.join('?' * len(hashes))}) AND {_IS_IN_TIME}"
    )
    return {RecordName(*row) for row in sql.execute(query, (*hashes, now))}


def places_among(sql: sqlite3.Connection, hashes: Sequence[BlockHash]) -> list[Place]:
    """`find` for who asks no more than where they are: in a third less time."""
    query = (
        "SELECT slab_id, slot, ticket FROM slots WHERE state = 2"
        f" AND block_hash IN ({','.join('?' * len(hashes))})"
    )
    return [Place(*row) for row in sql.execute(query, hashes)]


def list_names(sql: sqlite3.Connection, now: int) -> list[tuple[RecordName, int]]:
    """Name and bytes of every record, in the order of the files."""
    rows = sql.execute(
        "SELECT identity, block_hash, record_bytes FROM slots"
        f" WHERE state = 2 AND {_IS_IN_TIME} ORDER BY slab_id, slot",
        (now,),
    )
    return [(RecordName(*name), num_bytes) for *name, num_bytes in rows]


def list_identities(sql: sqlite3.Connection, now: int) -> list[tuple[bytes, int, int]]:
    """Each identity, how many records it has, and their bytes."""
    return sql.execute(
        "SELECT identity, count(*), sum(record_bytes) FROM slots"
        f" WHERE state = 2 AND {_IS_IN_TIME} GROUP BY identity",
        (now,),
    ).fetchall()


def ready_among(sql: sqlite3.Connection, names: Iterable[RecordName]) -> set[RecordName]:
    """Those that have a record, in time or past it."""
    by_hash = {name.block_hash: name for name in names}
    ready: set[RecordName] = set()
    for hashes in batches_of_hashes(by_hash.values()):
        places = ",".join("?" * len(hashes))
        query = f"SELECT block_hash FROM slots WHERE state = 2 AND block_hash IN ({places})"
        ready.update(by_hash[block_hash] for (block_hash,) in sql.execute(query, hashes))
    return ready


def take_free(sql: sqlite3.Connection, slot_bytes: int, num_wanted: int, now: int) -> list[SlotRef]:
    """So many slots for writing, of those that are free; neighbours where there are.

    Raises:
        IndexDamaged: If a slot belongs to no slab.
    """
    rows = sql.execute(
        "SELECT slab_id, slots.slot_bytes, num_slots, slot, ticket FROM slots"
        " LEFT JOIN slabs USING (slab_id) WHERE slots.slot_bytes = ? AND state = 0 LIMIT ?",
        (slot_bytes, num_wanted),
    ).fetchall()
    for slab_id, _, num_slots, *_ in rows:
        if num_slots is None:
            raise IndexDamaged(f"expected a free slot in a known slab, got one in {slab_id}")
    return take(sql, refs_of(rows), now)


def take_dead(sql: sqlite3.Connection, lease_end: int, now: int) -> list[SlotRef]:
    """The slots whose writers had their lease before that time and are taken for dead."""
    refs = []
    for slot_bytes in slab_table.slot_sizes(sql):
        rows = sql.execute(
            "SELECT slab_id, slots.slot_bytes, num_slots, slot, ticket FROM slots"
            " JOIN slabs USING (slab_id)"
            " WHERE slots.slot_bytes = ? AND state = 1 AND rank = 0 AND slots.last_used < ?",
            (slot_bytes, lease_end),
        )
        refs += refs_of(rows)
    return take(sql, refs, now)


def take(sql: sqlite3.Connection, refs: Sequence[SlotRef], now: int) -> list[SlotRef]:
    """Hide slots from everybody else, under a new ticket and lease.

    They were looked up in this transaction. Their rows keep the names of what lies there.
    """
    if not refs:
        return []
    _for_each(
        sql,
        "UPDATE slots SET state = 1, ticket = ticket + 1, rank = 0, last_used = ?,"
        f" expires_at = NULL WHERE {_RUN}",
        [
            (now, *run.place)
            for run in runs_of((slab.slab_id, slot, (), None) for slab, slot, *_ in refs)
        ],
    )
    return [
        SlotRef(slab, slot, ticket + 1, name, num_bytes, expires_at)
        for slab, slot, ticket, name, num_bytes, expires_at in refs
    ]


def publish(
    sql: sqlite3.Connection,
    refs: Sequence[SlotRef],
    priority: int,
    now: int,
    expires_at: int | None,
) -> set[RecordName]:
    """Let readers find records; returns them, but for those whose slot was lost.

    Where another slot has a record of the same block already, that one stands, and this is freed.
    """
    rows = (
        (
            slab.slab_id,
            slot,
            (ticket, num_bytes, name.identity, len(name.block_hash)),
            name.block_hash,
        )
        for slab, slot, ticket, name, num_bytes, _ in refs
    )
    values = []
    for run in runs_of(rows):
        ticket, num_bytes, identity, hash_bytes = run.common
        hashes = b"".join(run.payload), run.first, hash_bytes, hash_bytes
        record = priority, now, expires_at, num_bytes, identity, *hashes
        values.append((*record, *run.place, ticket))
    num_published = _for_each(
        sql,
        "UPDATE OR IGNORE slots SET state = 2, rank = ?, last_used = ?, expires_at = ?,"
        " record_bytes = ?, identity = ?, block_hash = substr(?, (slot - ?) * ? + 1, ?)"
        f" WHERE {_RUN} AND ticket = ? AND state = 1",
        values,
    )
    names = {ref.name for ref in refs}
    if num_published == len(refs):
        return names
    _release_written(sql, refs)  # of those that are no longer being written to, none
    return ready_among(sql, names)


def release_wiped(sql: sqlite3.Connection, refs: Iterable[SlotRef]) -> None:
    """Free slots where no record lies any more."""
    _for_each(
        sql,
        "UPDATE slots SET state = 0, last_used = 0, identity = NULL, block_hash = NULL"
        f" WHERE {_SLOT} AND state = 1",
        [ref.place for ref in refs],
    )


def release(sql: sqlite3.Connection, refs: Iterable[SlotRef]) -> None:
    """Free slots that nothing was written to; they keep the names of what lies there.

    Where that was deleted meanwhile the lease ends instead: whoever takes the slot over wipes it.
    """
    _for_each(
        sql,
        "UPDATE slots SET state = (expires_at IS NOT NULL), last_used = 0"
        f" WHERE {_SLOT} AND state = 1",
        [ref.place for ref in refs],
    )


def _release_written(sql: sqlite3.Connection, refs: Iterable[SlotRef]) -> None:
    """Free slots that were written to for nothing; they keep the names of what lies there."""
    _for_each(
        sql,
        "UPDATE slots SET state = 0, last_used = 0, identity = ?, block_hash = ?"
        f" WHERE {_SLOT} AND state = 1",
        [(*ref.name, *ref.place) for ref in refs],
    )


def set_pinned(sql: sqlite3.Connection, names: Iterable[RecordName], is_pinned: bool) -> None:
    """Pin records, or let them go."""
    change, is_due = (PINNED, "rank < 8") if is_pinned else (-PINNED, "rank >= 8")
    _for_each(
        sql,
        f"UPDATE slots SET rank = rank + {change} WHERE state = 2 AND block_hash = ? AND {is_due}",
        [(name.block_hash,) for name in names],
    )


def end_leases(sql: sqlite3.Connection, refs: Iterable[SlotRef]) -> None:
    """Let the writers count as dead."""
    _for_each(
        sql,
        f"UPDATE slots SET last_used = 0 WHERE {_SLOT} AND state = 1",
        [ref.place for ref in refs],
    )


def renew(sql: sqlite3.Connection, refs: Sequence[SlotRef], now: int) -> list[SlotRef]:
    """Begin the leases of slots anew; returns those that nobody has taken over since."""
    rows = ((ref.slab.slab_id, ref.slot, (ref.ticket,), ref) for ref in refs)
    held: list[SlotRef] = []
    for run in runs_of(rows):
        where = f"{_RUN} AND ticket = ? AND state = 1"
        values = (*run.place, *run.common)
        sql.execute(f"UPDATE slots SET last_used = ? WHERE {where}", (now, *values))
        found = sql.execute(f"SELECT slot FROM slots WHERE {where}", values)
        slots = {slot for (slot,) in found}
        held += [ref for ref in run.payload if ref.slot in slots]
    return held


def mark_used(sql: sqlite3.Connection, marks: Mapping[Place, Mark]) -> None:
    """Enter when records were used, of those that are still there."""
    if not marks:
        return
    rows = (
        (slab_id, slot, (*mark, ticket), None) for (slab_id, slot, ticket), mark in marks.items()
    )
    _for_each(
        sql,
        "UPDATE slots SET last_used = max(last_used, ?), expires_at = ifnull(?, expires_at)"
        f" WHERE {_RUN} AND ticket = ? AND state = 2",
        [(*run.common[:-1], *run.place, run.common[-1]) for run in runs_of(rows)],
    )
    last_used: dict[int, int] = {}
    for place, mark in marks.items():
        last_used[place.slab_id] = max(last_used.get(place.slab_id, 0), mark.when)
    for slab_id, when in last_used.items():
        slab_table.touch_slabs(sql, [slab_id], when, LOWEST_PRIORITY)
