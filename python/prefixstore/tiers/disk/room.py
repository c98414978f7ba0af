"""Making room for new records in the disk tier: free slots, new slabs, evicted records.

Everything here runs inside a transaction of the index.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from prefixstore.block_key import RecordName
from prefixstore.tiers.disk import slab_table, slot_table
from prefixstore.tiers.disk.files import Slab
from prefixstore.tiers.disk.slab_table import Limits
from prefixstore.tiers.disk.slot_table import SlotRef


@dataclass(frozen=True)
class Demand:
    """Slots that are to be written to; whether records may have to go for them."""

    slot_bytes: int
    num_slots: int
    priority: int
    now: int
    may_evict: bool = True


@dataclass
class Room:
    """Slots that were taken, as many as could be, and what had to go for them."""

    slots: list[SlotRef] = field(default_factory=list)
    num_evicted: int = 0
    # Slabs whose files are to be removed once the transaction is over.
    dropped: list[Slab] = field(default_factory=list)


def admit(
    sql: sqlite3.Connection, sizes: Mapping[RecordName, int], quota_bytes: int | None
) -> tuple[list[RecordName], int]:
    """Those of some new records that their identities' quotas have room for.

    An identity's older records give way for them. Its writes under way do not count yet.

    Args:
        sql: The index.
        sizes: Bytes of the records, by name.
        quota_bytes: Of each identity; None for no bound.

    Returns:
        The names, and how many records gave way.
    """
    if quota_bytes is None:
        return list(sizes), 0
    admitted, num_evicted = [], 0
    num_bytes: Counter[bytes] = Counter()  # by identity: bytes admitted so far
    for name, size in sizes.items():
        num_gone = slab_table.keep_quota(
            sql, name.identity, num_bytes[name.identity] + size, quota_bytes
        )
        if num_gone is not None:
            num_bytes[name.identity] += size
            num_evicted += num_gone
            admitted.append(name)
    return admitted, num_evicted


def take_room(sql: sqlite3.Connection, wanted: Demand, limits: Limits) -> Room:
    """Take free slots, else those of a new slab, else of records that are worth least.

    Records of a higher priority stay, and pinned ones. Where not one slot can be had, all stay.
    """
    sql.execute("SAVEPOINT before_eviction")
    room = Room()
    while (num_missing := wanted.num_slots - len(room.slots)) > 0:
        slots = slot_table.take_free(sql, wanted.slot_bytes, num_missing, wanted.now)
        room.slots += slots
        if slots or _add_slab(sql, wanted, limits):
            continue
        if not (wanted.may_evict and _evict(sql, wanted, num_missing, room)):
            break
    if wanted.num_slots and not room.slots:
        sql.execute("ROLLBACK TO before_eviction")
        room = Room()
    sql.execute("RELEASE before_eviction")
    return room


def _add_slab(sql: sqlite3.Connection, wanted: Demand, limits: Limits) -> bool:
    """A new slab, where the bound leaves room for one."""
    free_bytes = limits.capacity_bytes - slab_table.total_bytes(sql)
    num_slots = max(limits.slab_bytes // wanted.slot_bytes, 1)
    num_slots = min(num_slots, free_bytes // wanted.slot_bytes)
    if num_slots > 0:
        slab_table.insert_slab(sql, Slab(0, wanted.slot_bytes, num_slots), wanted.now)
    return num_slots > 0


def _evict(sql: sqlite3.Connection, wanted: Demand, num_slots: int, room: Room) -> bool:
    """Take so many slots at most, or drop a slab of another size where that is worth less.

    Returns False if nothing may go.
    """
    victims = sql.execute(
        "SELECT rank, slots.last_used, slab_id, slots.slot_bytes, num_slots, slot, ticket"
        " FROM slots JOIN slabs USING (slab_id)"
        " WHERE slots.slot_bytes = ? AND state = 2 AND rank <= ?"
        " ORDER BY rank, slots.last_used LIMIT ?",
        (wanted.slot_bytes, wanted.priority, num_slots),
    ).fetchall()
    # without a victim of that size: any slab worth no more than the new record
    limit = victims[0][:2] if victims else (wanted.priority, wanted.now + 1)
    slab = next(slab_table.slabs_to_drop(sql, wanted.slot_bytes, limit), None)
    if slab is not None:
        room.num_evicted += slab_table.drop_slab(sql, slab)
        room.dropped.append(slab)
        return True
    refs = slot_table.refs_of(row[2:] for row in victims)
    room.slots += slot_table.take(sql, refs, wanted.now)
    room.num_evicted += len(refs)
    return bool(refs)
