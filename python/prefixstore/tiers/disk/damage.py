"""Damage to the file of the disk tier's index: finding it, and mending what its rows can mend.

The tables are one kind of tree in the file, SQLite's own indexes of them the other. Where an index
disagrees with its table the rows still tell all, and the index is made anew from them. Where pages
cannot be read, or a cell is not of its column's type, the whole file is made anew from the slabs,
which only who opens the tier alone can do (opening.py).
"""

from __future__ import annotations

import sqlite3
from contextlib import suppress

from prefixstore.tiers.disk.sql import Connection, IndexDamaged

# It compares no index with its table: that takes 10 times as long, 3 to 6 s for a million slots.
_QUICK_CHECK = "SELECT quick_check FROM pragma_quick_check WHERE quick_check != 'ok'"
_FULL_CHECK = "SELECT integrity_check FROM pragma_integrity_check WHERE integrity_check != 'ok'"
_COLUMNS = (
    "SELECT tables.name, columns.name, lower(columns.type) FROM sqlite_master AS tables"
    " JOIN pragma_table_info(tables.name) AS columns WHERE tables.name IN ('slabs', 'slots')"
)
_INDEXES = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
# Of a record that was put again because a damaged index did not show it. As if evicted.
_FREE_DOUBLES = (
    "UPDATE slots SET state = 0, rank = 0, last_used = 0, expires_at = NULL"
    " WHERE (slab_id, slot) IN (SELECT slab_id, slot FROM (SELECT slab_id, slot, row_number() OVER"
    " (PARTITION BY block_hash ORDER BY rank DESC, last_used DESC) AS number FROM slots"
    " WHERE state = 2 AND block_hash IS NOT NULL) WHERE number > 1)"
)


class IndexFile:
    """The file of an open tier's index.

    Args:
        writer: The index's connection for transactions.
    """

    def __init__(self, writer: Connection) -> None:
        self._writer = writer

    def find_damage(self) -> list[str]:
        """What is wrong, in words; the next to open the tier alone is then to mend it."""
        path, name, timeout_s = self._writer.path, self._writer.tier_name, self._writer.timeout_s
        if not path.exists():
            return [f"{name}: {path}: expected the index, got none"]
        # Not on a connection that calls have to wait for.
        connection = Connection(path, name, timeout_s)
        try:
            problems = find_damage(connection)
        finally:
            connection.close()
        if problems:
            with suppress(OSError):
                self._writer.mark.touch()
        return problems

    def mend(self) -> list[str]:
        """Make the indexes anew, if their pages can be read; returns what is wrong thereafter."""
        # In the first transaction since the damage was found: another would meet it.
        with self._writer.writing() as sql:
            if sql.execute(_QUICK_CHECK).fetchone() is None:
                rebuild_indexes(sql)
        problems = self.find_damage()
        if not problems:
            with suppress(OSError):
                self._writer.mark.unlink(missing_ok=True)
        return problems


def refuse_unreadable_pages(connection: Connection) -> None:
    """Raises IndexDamaged for pages that cannot be read."""
    with connection.reading() as sql:
        problem = sql.execute(_QUICK_CHECK).fetchone()
    if problem is not None:
        raise IndexDamaged(f"{connection.tier_name}: {connection.path}: {problem[0]}")


def find_damage(connection: Connection) -> list[str]:
    """Pages, indexes and cells that are not as they should be, in words."""
    with connection.reading() as sql:
        problems = [problem for (problem,) in sql.execute(_FULL_CHECK)]
        for table, column, kind in sql.execute(_COLUMNS).fetchall():  # SQLite takes any type
            is_odd = f"typeof({column}) NOT IN ('{kind}', 'null')"
            if sql.execute(f"SELECT 1 FROM {table} NOT INDEXED WHERE {is_odd} LIMIT 1").fetchone():
                problems.append(f"expected {column} of {table} to be {kind}")
    return [f"{connection.tier_name}: {connection.path}: {problem}" for problem in problems]


def rebuild_indexes(sql: sqlite3.Connection) -> None:
    """Make SQLite's indexes anew from the rows, in this transaction; all pages can be read."""
    indexes = sql.execute(_INDEXES).fetchall()
    # In the place of REINDEX, which fails for what a damaged unique index has let pass.
    for name, _ in indexes:
        sql.execute(f"DROP INDEX {name}")
    sql.execute(_FREE_DOUBLES)
    for _, statement in indexes:
        sql.execute(statement)
