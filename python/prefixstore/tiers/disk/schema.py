"""The tables of the disk tier's index, version 2, and how one of version 1 becomes one of those.

    slabs   one row for each payload file
    slots   one row for each of its slots, whatever its state
    clock   where the tier's time stands, see clock.py

`identity` and `block_hash` say whose record a READY slot holds. In a FREE one they say whose bytes
still lie there, as far as is known, so that an identity can be wiped to the last byte; in a WRITING
one, whose lay there when it was taken, and `expires_at` is set where those were deleted since.
`rank` is the record's priority, and `PINNED` more while the record is pinned.
"""

from __future__ import annotations

import sqlite3

from prefixstore.errors import TierUnavailable
from prefixstore.tiers.disk.space import log_pages
from prefixstore.tiers.disk.sql import Connection, IndexDamaged

VERSION = 2

# states of a slot; the literals in SQL serve the partial indexes
FREE, WRITING, READY = 0, 1, 2
LOWEST_PRIORITY = -8
PINNED = 16

_TABLES = (
    """CREATE TABLE slabs (
        slab_id INTEGER PRIMARY KEY AUTOINCREMENT,
        slot_bytes INTEGER NOT NULL,
        num_slots INTEGER NOT NULL,
        last_used INTEGER NOT NULL,
        priority INTEGER NOT NULL
    )""",
    """CREATE TABLE slots (
        slab_id INTEGER NOT NULL,
        slot INTEGER NOT NULL,
        slot_bytes INTEGER NOT NULL,
        state INTEGER NOT NULL,
        ticket INTEGER NOT NULL,
        rank INTEGER NOT NULL,
        last_used INTEGER NOT NULL,
        record_bytes INTEGER NOT NULL,
        expires_at INTEGER,
        identity BLOB,
        block_hash BLOB,
        PRIMARY KEY (slab_id, slot)
    ) WITHOUT ROWID""",
    "CREATE TABLE clock (boot_id TEXT PRIMARY KEY, offset_ns INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE UNIQUE INDEX slots_by_hash ON slots (block_hash) WHERE state = 2",
    "CREATE INDEX slots_in_use_order ON slots (slot_bytes, state, rank, last_used)",
    "CREATE INDEX slots_by_expiry ON slots (expires_at) WHERE state = 2 AND expires_at IS NOT NULL",
    f"PRAGMA user_version = {VERSION}",
)

# Finds, for deletions, free slots where a record's bytes still lie. A full tier has few of them, as
# evicted slots are written to at once.
_OF_WHAT_IS_LEFT = (
    "CREATE INDEX IF NOT EXISTS slots_by_left_hash ON slots (block_hash)"
    " WHERE state = 0 AND block_hash IS NOT NULL"
)

_SET_VERSION_1_ASIDE = (
    "DROP TABLE slabs",
    "DROP INDEX slots_by_hash",
    "DROP INDEX slots_by_use",
    "ALTER TABLE slots RENAME TO slots_v1",
)


def prepare(connection: Connection, is_alone: bool) -> None:
    """Make the tables where there are none, and see that they are ours.

    The index lives in WAL mode without a flush at each commit (`synchronous = NORMAL`): a killed
    process loses nothing, a power cut may lose the last commits but never the file's integrity.
    Its log starts over before it fills what payload leaves free for it.

    Raises:
        IndexDamaged: If these are no tables of ours.
        TierUnavailable: If they are a newer program's, or an older one's that has them open.
    """
    with connection.reading() as sql:
        sql.execute("PRAGMA journal_mode = WAL")
        sql.execute("PRAGMA synchronous = NORMAL")
        sql.execute(f"PRAGMA wal_autocheckpoint = {log_pages(connection.path.parent)}")
    where = f"{connection.tier_name}: {connection.path}"
    with connection.writing() as sql:
        (version,) = sql.execute("PRAGMA user_version").fetchone()
        (num_tables,) = sql.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 0 and num_tables == 0:
            _execute_all(sql, _TABLES)
        elif version > VERSION:
            raise TierUnavailable(
                f"{where}: expected format version {VERSION}, got {version}; open it with the"
                " program that wrote it, or use another path"
            )
        elif version == 1:
            if not is_alone:
                raise TierUnavailable(
                    f"{where}: expected format version {VERSION}, got 1 and a program that has it"
                    " open; close that first"
                )
            _execute_all(sql, (*_SET_VERSION_1_ASIDE, *_TABLES))
        elif version != VERSION:
            raise IndexDamaged(f"{where}: expected an index of ours")
        # Older versions did not create this index, but SQLite updates it for them.
        sql.execute(_OF_WHAT_IS_LEFT)


def prepare_quotas(sql: sqlite3.Connection) -> None:
    """An index that only quotas need: it would slow every put down a little."""
    sql.execute(
        "CREATE INDEX IF NOT EXISTS slots_of_identity ON slots (identity, last_used, record_bytes)"
        " WHERE state = 2"
    )


def take_over_version_1(sql: sqlite3.Connection, now: int) -> int | None:
    """Keep of the records just read from the slabs those that version 1 knew, in its order of use.

    Version 1 did not know identities; the records' own headers did. Runs in the transaction that
    entered the slabs. Returns how many records there are, or None where there was no version 1.
    """
    is_there = "SELECT 1 FROM sqlite_master WHERE name = 'slots_v1'"
    if sql.execute(is_there).fetchone() is None:
        return None
    sql.execute(
        "UPDATE slots SET state = 0, last_used = 0 WHERE state = 2 AND NOT EXISTS ("
        " SELECT 1 FROM slots_v1 AS old WHERE old.slab_id = slots.slab_id"
        " AND old.slot = slots.slot AND old.state = 2 AND old.block_hash = slots.block_hash)"
    )
    sql.execute(
        "UPDATE slots SET last_used = (SELECT min(last_used, ?) FROM slots_v1 AS old"
        " WHERE old.slab_id = slots.slab_id AND old.slot = slots.slot) WHERE state = 2",
        (now,),
    )
    sql.execute(
        "UPDATE slabs SET last_used = ifnull((SELECT max(last_used) FROM slots"
        " WHERE slots.slab_id = slabs.slab_id AND state = 2), last_used)"
    )
    sql.execute("DROP TABLE slots_v1")
    return sql.execute("SELECT count(*) FROM slots WHERE state = 2").fetchone()[0]


def _execute_all(sql: sqlite3.Connection, statements: tuple[str, ...]) -> None:
    for statement in statements:
        sql.execute(statement)
