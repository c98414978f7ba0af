"""The disk tier's connection to SQLite: transactions, deadlines, and errors in our own words."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefixstore.errors import TierError, TierFull, TierTimeout, TierUnavailable

VERSION = 1
_SCHEMA = (
    """CREATE TABLE slabs (
        slab_id INTEGER PRIMARY KEY AUTOINCREMENT,
        slot_bytes INTEGER NOT NULL,
        num_slots INTEGER NOT NULL,
        last_used INTEGER NOT NULL
    )""",
    """CREATE TABLE slots (
        slab_id INTEGER NOT NULL,
        slot INTEGER NOT NULL,
        slot_bytes INTEGER NOT NULL,
        state INTEGER NOT NULL,
        ticket INTEGER NOT NULL,
        block_hash BLOB,
        record_bytes INTEGER NOT NULL,
        last_used INTEGER NOT NULL,
        PRIMARY KEY (slab_id, slot)
    ) WITHOUT ROWID""",
    "CREATE UNIQUE INDEX slots_by_hash ON slots (block_hash) WHERE state = 2",
    "CREATE INDEX slots_by_use ON slots (slot_bytes, state, last_used)",
    f"PRAGMA user_version = {VERSION}",
)


class IndexDamaged(TierUnavailable):
    """The index cannot be read; the slabs can, and it can be rebuilt from them."""


class Connection:
    """One SQLite connection, shared by this process's threads, one at a time.

    The index lives in WAL mode without a flush at each commit (`synchronous = NORMAL`): a killed
    process loses nothing, a power cut may lose the last commits but never the file's integrity.
    """

    def __init__(self, path: Path, tier_name: str, timeout_s: float) -> None:
        self._path = path
        self._tier_name = tier_name
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._pid = os.getpid()
        with self._errors():
            self._sql: sqlite3.Connection | None = sqlite3.connect(
                path, timeout=timeout_s, isolation_level=None, check_same_thread=False
            )
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """For single SELECTs."""
        sql = self._acquire()
        try:
            with self._errors():
                yield sql
        finally:
            self._lock.release()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, alone among all processes; undone where anything is raised."""
        sql = self._acquire()
        try:
            with self._errors():
                sql.execute("BEGIN IMMEDIATE")
                try:
                    yield sql
                    sql.execute("COMMIT")
                finally:
                    if sql.in_transaction:
                        sql.execute("ROLLBACK")
        finally:
            self._lock.release()

    def close(self) -> None:
        with self._lock:
            sql, self._sql = self._sql, None
            # after a fork the connection is the parent's: closing it here would break its locks
            if sql is not None and self._pid == os.getpid():
                with self._errors():
                    sql.close()

    def _prepare(self) -> None:
        with self.reading() as sql:
            sql.execute("PRAGMA journal_mode = WAL")
            sql.execute("PRAGMA synchronous = NORMAL")
        with self.writing() as sql:
            (version,) = sql.execute("PRAGMA user_version").fetchone()
            (num_tables,) = sql.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version == 0 and num_tables == 0:
                for statement in _SCHEMA:
                    sql.execute(statement)
            elif version > VERSION:
                raise TierUnavailable(
                    f"{self._tier_name}: {self._path}: expected format version {VERSION}, got"
                    f" {version}; open it with the program that wrote it, or use another path"
                )
            elif version != VERSION:
                raise IndexDamaged(f"{self._tier_name}: {self._path}: expected an index of ours")

    def _acquire(self) -> sqlite3.Connection:
        if not self._lock.acquire(timeout=self._timeout_s):
            raise TierTimeout(
                f"{self._tier_name}: expected the index within {self._timeout_s} s, got no turn"
            )
        sql = self._sql
        if sql is None or self._pid != os.getpid():
            self._lock.release()
            state = "closed" if sql is None else "forked"
            raise TierUnavailable(f"{self._tier_name}: expected an open tier, got a {state} one")
        return sql

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translated(error) from error
        except UnicodeDecodeError as error:  # SQLite's own message quotes the damaged bytes
            raise IndexDamaged(f"{self._tier_name}: {self._path}: {error}") from error

    def _translated(self, error: sqlite3.Error) -> TierError:
        text = str(error)  # the numeric code came only with Python 3.11
        message = f"{self._tier_name}: {self._path}: {text}"
        if "locked" in text or "busy" in text:
            return TierTimeout(f"{message} for {self._timeout_s} s")
        if "disk is full" in text:
            return TierFull(message)
        is_other = isinstance(error, sqlite3.OperationalError) and "no such" not in text
        if is_other or not isinstance(error, sqlite3.DatabaseError):
            return TierUnavailable(message)
        return IndexDamaged(message)
