"""Making room for new records in the disk tier: free slots, new slabs, evicted records.

Everything here runs inside a transaction of the index.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field

from prefixstore.block_key import RecordName
from prefixstore.tiers import disk_slabs, disk_slots
from prefixstore.tiers.disk_files import Slab
from prefixstore.tiers.disk_slabs import Limits
from prefixstore.tiers.disk_slots import NOBODY, SlotRef


@dataclass(frozen=True)
class Demand:
    """Slots that are to be written to."""

    slot_bytes: int
    num_slots: int
    priority: int
    now: int


@dataclass
class Room:
    """Slots that were taken, as many as could be, and what had to go for them."""

    slots: list[SlotRef] = field(default_factory=list)
    num_evicted: int = 0
    dropped: list[Slab] = field(default_factory=list)  # their files are to be removed afterwards


def take_room(sql: sqlite3.Connection, wanted: Demand, limits: Limits) -> Room:
    """Take free slots, else those of a new slab, else of records that are worth least.

    Records of a higher priority stay, and pinned ones. Where not one slot can be had, all stay.
    """
    sql.execute("SAVEPOINT before_eviction")
    room = Room()
    while (num_missing := wanted.num_slots - len(room.slots)) > 0:
        slots = disk_slots.take_free(sql, wanted.slot_bytes, num_missing, wanted.now)
        room.slots += slots
        if slots or _add_slab(sql, wanted, limits):
            continue
        if not _evict(sql, wanted, num_missing, room):
            break
    if wanted.num_slots and not room.slots:
        sql.execute("ROLLBACK TO before_eviction")
        room = Room()
    sql.execute("RELEASE before_eviction")
    return room


def keep_quota(
    sql: sqlite3.Connection, sizes: Mapping[RecordName, int], quota_bytes: int
) -> tuple[set[RecordName], int]:
    """Let records of an identity give way to its new ones, the least recently used first.

    Pinned records stay. What is being written by others is not counted.

    Returns:
        The names that do not fit all the same, and how many records went.
    """
    refused, num_evicted = set(), 0
    for identity in {name.identity for name in sizes}:
        wanted = {name: size for name, size in sizes.items() if name.identity == identity}
        in_use, pinned = sql.execute(
            "SELECT ifnull(sum(record_bytes), 0), ifnull(sum(record_bytes * (rank >= 8)), 0)"
            " FROM slots WHERE state = 2 AND identity = ?",
            (identity,),
        ).fetchone()
        num_bytes = 0
        for name, size in wanted.items():
            if pinned + num_bytes + size > quota_bytes:
                refused.add(name)
            else:
                num_bytes += size
        num_evicted += _evict_own(sql, identity, in_use + num_bytes - quota_bytes)
    return refused, num_evicted


def _evict_own(sql: sqlite3.Connection, identity: bytes, num_bytes: int) -> int:
    """Evict so many bytes of an identity; returns how many records that were."""
    if num_bytes <= 0:
        return 0
    rows = sql.execute(
        "SELECT slab_id, slot, record_bytes FROM slots"
        " WHERE state = 2 AND identity = ? AND rank < 8 ORDER BY last_used",
        (identity,),
    )
    victims = []
    for slab_id, slot, size in rows:
        if num_bytes <= 0:
            break
        victims.append((slab_id, slot))
        num_bytes -= size
    disk_slabs.evict(sql, victims)
    return len(victims)


def _add_slab(sql: sqlite3.Connection, wanted: Demand, limits: Limits) -> bool:
    """A new slab, where the bound leaves room for one."""
    free_bytes = limits.capacity_bytes - disk_slabs.total_bytes(sql)
    num_slots = max(limits.slab_bytes // wanted.slot_bytes, 1)
    num_slots = min(num_slots, free_bytes // wanted.slot_bytes)
    if num_slots > 0:
        disk_slabs.insert_slab(sql, Slab(0, wanted.slot_bytes, num_slots), wanted.now)
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
    # without a victim, anything that is not worth more than what is to come
    limit = victims[0][:2] if victims else (wanted.priority, wanted.now + 1)
    slab = next(disk_slabs.slabs_to_drop(sql, wanted.slot_bytes, limit), None)
    if slab is not None:
        room.num_evicted += disk_slabs.drop_slab(sql, slab)
        room.dropped.append(slab)
        return True
    refs = [SlotRef(Slab(*slab), slot, ticket, NOBODY, 0) for _, _, *slab, slot, ticket in victims]
    room.slots += disk_slots.take(sql, refs, wanted.now)
    room.num_evicted += len(refs)
    return bool(refs)
