"""Which slabs the disk tier has, and which of them goes first.

Everything here runs inside a transaction of the index. A slab serves one slot size for all its
life; where another size needs the room, the slab that is worth least is dropped whole. What is
worth least is of the lowest priority, and of that has been idle longest.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prefixstore.tiers.disk.files import Slab
from prefixstore.tiers.disk.headers import FoundRecord

_SELECT = "SELECT slab_id, slot_bytes, num_slots FROM slabs"
_EVICT = (
    "UPDATE slots SET state = 0, rank = 0, last_used = 0, expires_at = NULL"
    " WHERE slab_id = ? AND slot = ?"
)

Worth = tuple[int, int]
"""Priority, and when last used: the smaller goes first."""


@dataclass(frozen=True)
class Limits:
    """What allocation must keep to, and for whom."""

    tier_name: str
    capacity_bytes: int
    slab_bytes: int
    write_lease_s: float
    quota_bytes: int | None = None


def list_slabs(sql: sqlite3.Connection) -> list[Slab]:
    """Every slab that the index knows."""
    return [Slab(*row) for row in sql.execute(_SELECT + " ORDER BY slab_id")]


def expire(sql: sqlite3.Connection, now: int) -> tuple[int, int]:
    """Free the slots of records past their time, but for pinned ones; records and their bytes."""
    rows = sql.execute(
        "SELECT slab_id, slot, record_bytes FROM slots WHERE state = 2 AND expires_at <= ?"
        " AND rank < 8",
        (now,),
    ).fetchall()
    if rows:
        sql.executemany(_EVICT, [row[:2] for row in rows])
    return len(rows), sum(row[2] for row in rows)


def keep_quota(
    sql: sqlite3.Connection, identity: bytes, num_bytes: int, quota_bytes: int
) -> int | None:
    """Let an identity's least recently used records give way until so much more fits.

    Returns how many did; None where that is not enough, and then all stay.
    """
    query = "SELECT ifnull(sum(record_bytes), 0) FROM slots WHERE state = 2 AND identity = ?"
    excess_bytes = sql.execute(query, (identity,)).fetchone()[0] + num_bytes - quota_bytes
    victims = []
    for slab_id, slot, record_bytes in sql.execute(
        "SELECT slab_id, slot, record_bytes FROM slots WHERE state = 2 AND identity = ?"
        " AND rank < 8 ORDER BY last_used",
        (identity,),
    ):
        if excess_bytes <= 0:
            break
        victims.append((slab_id, slot))
        excess_bytes -= record_bytes
    if excess_bytes > 0:
        return None
    sql.executemany(_EVICT, victims)
    return len(victims)


def shrink(sql: sqlite3.Connection, capacity_bytes: int) -> list[Slab]:
    """Drop the slabs worth least until the rest fits, but for those with pinned records."""
    dropped = []
    while total_bytes(sql) > capacity_bytes:
        slab = next(slabs_to_drop(sql, 0, None), None)
        if slab is None:
            break
        drop_slab(sql, slab)
        dropped.append(slab)
    return dropped


def insert_slab(sql: sqlite3.Connection, slab: Slab, last_used: int) -> None:
    """Enter a slab with all its slots free; slab_id 0 takes the next one."""
    cursor = sql.execute(
        "INSERT INTO slabs VALUES (?, ?, ?, ?, -8)",
        (slab.slab_id or None, slab.slot_bytes, slab.num_slots, last_used),
    )
    # In one statement, without the interpreter's lock: there may be thousands.
    sql.execute(
        "WITH RECURSIVE free (slot) AS"
        " (SELECT 0 WHERE ?3 > 0 UNION ALL SELECT slot + 1 FROM free WHERE slot + 1 < ?3)"
        " INSERT INTO slots SELECT ?1, slot, ?2, 0, 0, 0, 0, 0, NULL, NULL, NULL FROM free",
        (cursor.lastrowid, slab.slot_bytes, slab.num_slots),
    )


def fill_slab(
    sql: sqlite3.Connection, slab: Slab, found: Iterable[FoundRecord], last_used: int
) -> None:
    """Enter records read back from a slab.

    Where another slot holds the same block already, this one stays free, under the block's name.
    """
    for record in found:
        place = slab.slab_id, record.slot
        sql.execute(
            "UPDATE slots SET identity = ?, block_hash = ? WHERE slab_id = ? AND slot = ?",
            (*record.name, *place),
        )
        sql.execute(
            "UPDATE OR IGNORE slots SET state = 2, record_bytes = ?, last_used = ?"
            " WHERE slab_id = ? AND slot = ?",
            (record.record_bytes, last_used, *place),
        )
    touch_slabs(sql, [slab.slab_id], last_used, 0)


def touch_slabs(sql: sqlite3.Connection, slab_ids: Iterable[int], now: int, priority: int) -> None:
    """Records of that priority, or a higher one, were put into these slabs or used."""
    sql.executemany(
        "UPDATE slabs SET last_used = max(last_used, ?), priority = max(priority, ?)"
        " WHERE slab_id = ?",
        [(now, priority, slab_id) for slab_id in sorted(set(slab_ids))],
    )


def drop_slab(sql: sqlite3.Connection, slab: Slab) -> int:
    """Forget a slab; returns how many records it held."""
    (num_records,) = sql.execute(
        "SELECT count(*) FROM slots WHERE slab_id = ? AND state = 2", (slab.slab_id,)
    ).fetchone()
    sql.execute("DELETE FROM slots WHERE slab_id = ?", (slab.slab_id,))
    sql.execute("DELETE FROM slabs WHERE slab_id = ?", (slab.slab_id,))
    return num_records


def total_bytes(sql: sqlite3.Connection) -> int:
    """Bytes of all slabs."""
    return sql.execute("SELECT ifnull(sum(slot_bytes * num_slots), 0) FROM slabs").fetchone()[0]


def slot_sizes(sql: sqlite3.Connection) -> Iterator[int]:
    """Each once, by one look-up in the order of use: there are few sizes, and may be many slabs."""
    query = "SELECT min(slot_bytes) FROM slots WHERE slot_bytes > ?"
    slot_bytes = 0
    while (slot_bytes := sql.execute(query, (slot_bytes,)).fetchone()[0]) is not None:
        yield slot_bytes


def slabs_to_drop(
    sql: sqlite3.Connection, but_of_slot_bytes: int, limit: Worth | None
) -> Iterator[Slab]:
    """Slabs that are worth less than the limit, the least first; none that is in use."""
    rows = sql.execute(
        "SELECT priority, last_used, slab_id, slot_bytes, num_slots FROM slabs"
        " WHERE slot_bytes != ? ORDER BY priority, last_used",
        (but_of_slot_bytes,),
    ).fetchall()
    for priority, last_used, *fields in rows:
        if limit is not None and (priority, last_used) >= limit:
            return
        is_in_use = sql.execute(
            "SELECT 1 FROM slots WHERE slab_id = ? AND (state = 1 OR state = 2 AND rank >= 8)"
            " LIMIT 1",
            (fields[0],),
        ).fetchone()
        if is_in_use is None:
            yield Slab(*fields)
