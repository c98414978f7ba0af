"""Which slabs the disk tier has: making room in them and shrinking to the bound.

Everything here runs inside a transaction of the index. A slab serves one slot size for all its
life; where another size needs the room, the slab that has been idle longest is dropped whole.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass

from prefixstore.errors import TierFull
from prefixstore.tiers.disk_files import FoundRecord, Slab

_SELECT = "SELECT slab_id, slot_bytes, num_slots FROM slabs"


@dataclass(frozen=True)
class Limits:
    """What allocation must keep to, and for whom."""

    tier_name: str
    capacity_bytes: int
    slab_bytes: int
    write_lease_s: float


@dataclass(frozen=True)
class Evicted:
    """What had to go for a new record."""

    num_records: int
    slabs: list[Slab]  # their files are to be removed once the transaction stands


def list_slabs(sql: sqlite3.Connection) -> list[Slab]:
    return [Slab(*row) for row in sql.execute(_SELECT + " ORDER BY slab_id")]


def make_room(sql: sqlite3.Connection, slot_bytes: int, limits: Limits) -> Evicted:
    """See to it that a slot of this size is free.

    Raises:
        TierFull: If nothing may be evicted for it.
    """
    num_records, dropped = 0, []
    while not _has_free_slot(sql, slot_bytes):
        room = limits.capacity_bytes - _total_bytes(sql)
        num_slots = min(max(limits.slab_bytes // slot_bytes, 1), room // slot_bytes)
        if num_slots > 0:
            insert_slab(sql, Slab(0, slot_bytes, num_slots), time.time_ns())
            continue
        victim = sql.execute(
            "SELECT last_used, slab_id, slot FROM slots WHERE slot_bytes = ? AND state = 2"
            " ORDER BY last_used LIMIT 1",
            (slot_bytes,),
        ).fetchone()
        coldest = sql.execute(
            "SELECT last_used, slab_id, slot_bytes, num_slots FROM slabs WHERE slot_bytes != ?"
            " AND slab_id NOT IN (SELECT slab_id FROM slots WHERE state = 1)"
            " ORDER BY last_used LIMIT 1",
            (slot_bytes,),
        ).fetchone()
        if coldest is not None and (victim is None or coldest[0] < victim[0]):
            dropped.append(Slab(*coldest[1:]))
            num_records += drop_slab(sql, dropped[-1])
        elif victim is not None:
            sql.execute("UPDATE slots SET state = 0 WHERE slab_id = ? AND slot = ?", victim[1:])
            num_records += 1
        else:
            raise TierFull(
                f"{limits.tier_name}: expected room for {slot_bytes} bytes within"
                f" {limits.capacity_bytes}, all of it is too small or in use"
            )
    return Evicted(num_records, dropped)


def shrink(sql: sqlite3.Connection, capacity_bytes: int) -> list[Slab]:
    """Drop the longest unused slabs until the rest fits; returns them."""
    dropped = []
    while _total_bytes(sql) > capacity_bytes:
        row = sql.execute(_SELECT + " ORDER BY last_used LIMIT 1").fetchone()
        dropped.append(Slab(*row))
        drop_slab(sql, dropped[-1])
    return dropped


def insert_slab(sql: sqlite3.Connection, slab: Slab, last_used: int) -> None:
    """Enter a slab with all its slots free; slab_id 0 takes the next one."""
    cursor = sql.execute(
        "INSERT INTO slabs VALUES (?, ?, ?, ?)",
        (slab.slab_id or None, slab.slot_bytes, slab.num_slots, last_used),
    )
    rows = ((cursor.lastrowid, slot, slab.slot_bytes) for slot in range(slab.num_slots))
    sql.executemany("INSERT INTO slots VALUES (?, ?, ?, 0, 0, NULL, 0, 0)", rows)


def fill_slab(
    sql: sqlite3.Connection, slab: Slab, found: list[FoundRecord], last_used: int
) -> None:
    """Enter records read back from a slab, but for blocks that another slot holds already."""
    for record in found:
        sql.execute(
            "UPDATE OR IGNORE slots SET state = 2, block_hash = ?, record_bytes = ?, last_used = ?"
            " WHERE slab_id = ? AND slot = ?",
            (record.block_hash, record.record_bytes, last_used, slab.slab_id, record.slot),
        )


def clamp_last_used(sql: sqlite3.Connection, now: int) -> None:
    """Let nothing be used later than now.

    After the clock was set back, old records would outlive every new one otherwise.
    """
    for table in ("slots", "slabs"):
        sql.execute(f"UPDATE {table} SET last_used = ? WHERE last_used > ?", (now, now))


def drop_slab(sql: sqlite3.Connection, slab: Slab) -> int:
    """Forget a slab; returns how many records it held."""
    (num_records,) = sql.execute(
        "SELECT count(*) FROM slots WHERE slab_id = ? AND state = 2", (slab.slab_id,)
    ).fetchone()
    sql.execute("DELETE FROM slots WHERE slab_id = ?", (slab.slab_id,))
    sql.execute("DELETE FROM slabs WHERE slab_id = ?", (slab.slab_id,))
    return num_records


def _has_free_slot(sql: sqlite3.Connection, slot_bytes: int) -> bool:
    query = "SELECT 1 FROM slots WHERE slot_bytes = ? AND state = 0 LIMIT 1"
    return sql.execute(query, (slot_bytes,)).fetchone() is not None


def _total_bytes(sql: sqlite3.Connection) -> int:
    return sql.execute("SELECT ifnull(sum(slot_bytes * num_slots), 0) FROM slabs").fetchone()[0]
