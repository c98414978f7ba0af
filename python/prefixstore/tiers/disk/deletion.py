"""Which slots have to be wiped, so that not even a rebuilt index finds a deleted record again.

Everything here runs inside a transaction of the index. A record that was evicted or expired, or
that another writer was faster with, lies in a FREE slot as it lay before, header and all, until
another one is written over it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Set

from prefixstore.block_key import RecordName
from prefixstore.tiers.disk import slab_table
from prefixstore.tiers.disk.schema import FREE, READY
from prefixstore.tiers.disk.slot_table import (
    SlotRef,
    batches_of_hashes,
    names_among,
    refs_of,
    take,
)


def take_names(
    sql: sqlite3.Connection, names: Set[RecordName], now: int
) -> tuple[list[SlotRef], set[RecordName]]:
    """The slots where bytes of these blocks lie, and those that had a record in time."""
    refs: list[SlotRef] = []
    held: set[RecordName] = set()
    for hashes in batches_of_hashes(names):
        held |= names_among(sql, hashes, now) & names
        places = ",".join("?" * len(hashes))
        for state in (FREE, READY):  # each state has a partial index of its own
            rows = sql.execute(
                "SELECT slab_id, slots.slot_bytes, num_slots, slot, ticket, identity, block_hash"
                " FROM slots JOIN slabs USING (slab_id)"
                f" WHERE state = {state} AND block_hash IN ({places})",
                hashes,
            )
            refs += refs_of(row[:5] for row in rows if RecordName(*row[5:]) in names)
        # Slots that other writers have taken, perhaps before they know their records, are only
        # marked: `release` frees them.
        for slot_bytes in slab_table.slot_sizes(sql):
            sql.execute(
                "UPDATE slots SET expires_at = 0 WHERE slot_bytes = ? AND state = 1"
                f" AND block_hash IN ({places})",
                (slot_bytes, *hashes),
            )
    return take(sql, refs, now), held


def take_identity(sql: sqlite3.Connection, identity: bytes, now: int) -> tuple[list[SlotRef], int]:
    """The slots where bytes of an identity lie, and how many of them held a record."""
    rows = sql.execute(
        "SELECT slab_id, slots.slot_bytes, num_slots, slot, ticket, state FROM slots"
        " JOIN slabs USING (slab_id) WHERE identity = ? AND state != 1",
        (identity,),
    ).fetchall()
    refs = refs_of(row[:-1] for row in rows)
    return take(sql, refs, now), sum(row[-1] == READY for row in rows)
