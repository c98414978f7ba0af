"""The disk tier's connection to SQLite: transactions, deadlines, and errors in our own words."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prefixstore.errors import TierError, TierFull, TierTimeout, TierUnavailable

MARK_OF_DAMAGE = "index.damaged"
NOW = 0.0  # a deadline that has passed: do not wait for a turn


class IndexDamaged(TierUnavailable):
    """The index cannot be read; the slabs can, and it can be rebuilt from them.

    A call that finds this out leaves a mark beside the index (`Connection.mark`), for whoever opens
    the tier alone: not all damage shows in the check that is fast enough for each opening.
    """


def data_version(sql: sqlite3.Connection) -> int:
    """A number that every transaction of another connection changes."""
    return sql.execute("PRAGMA data_version").fetchone()[0]


class Connection:
    """One SQLite connection, shared by this process's threads, one at a time."""

    def __init__(self, path: Path, tier_name: str, timeout_s: float) -> None:
        self.path = path
        self.mark = path.with_name(MARK_OF_DAMAGE)
        self.tier_name = tier_name
        self.timeout_s = timeout_s
        self._busy_timeout_s = timeout_s
        self._lock = threading.Lock()
        self._pid = os.getpid()
        with self._errors():
            self._sql: sqlite3.Connection | None = sqlite3.connect(
                path, timeout=timeout_s, isolation_level=None, check_same_thread=False
            )

    def reading(self, deadline: float | None = None) -> _Turn:
        """For single SELECTs.

        Raises:
            TierTimeout: If there is no turn within the tier's timeout, or by the deadline.
        """
        return _Turn(self, self._patience_s(deadline))

    @contextmanager
    def writing(self, deadline: float | None = None) -> Iterator[sqlite3.Connection]:
        """One transaction, alone among all processes; undone where anything is raised.

        Raises:
            TierTimeout: As `reading` does. Past the deadline it still goes ahead where nobody is
                in the way: what is half done can then be ended.
        """
        patience_s = self._patience_s(deadline)
        with _Turn(self, patience_s) as sql:
            self._set_busy_timeout(sql, patience_s)
            sql.execute("BEGIN IMMEDIATE")
            try:
                yield sql
                sql.execute("COMMIT")
            finally:
                if sql.in_transaction:
                    sql.execute("ROLLBACK")

    def close(self) -> None:
        with self._lock:
            sql, self._sql = self._sql, None
            # after a fork the connection is the parent's: closing it here would break its locks
            if sql is not None and self._pid == os.getpid():
                with self._errors():
                    sql.close()

    def _patience_s(self, deadline: float | None) -> float:
        if deadline is None:
            return self.timeout_s
        return max(min(self.timeout_s, deadline - time.monotonic()), 0.0)

    def _set_busy_timeout(self, sql: sqlite3.Connection, seconds: float) -> None:
        if seconds != self._busy_timeout_s:
            sql.execute(f"PRAGMA busy_timeout = {int(1e3 * seconds)}")
            self._busy_timeout_s = seconds

    def _acquire(self, patience_s: float) -> sqlite3.Connection:
        if not self._lock.acquire(timeout=patience_s):
            raise TierTimeout(
                f"{self.tier_name}: expected the index within {patience_s:.3g} s, got no turn"
            )
        sql = self._sql
        if sql is None or self._pid != os.getpid():
            self._lock.release()
            state = "closed" if sql is None else "forked"
            raise TierUnavailable(f"{self.tier_name}: expected an open tier, got a {state} one")
        return sql

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._raise_translated(error)
            raise

    def _raise_translated(self, error: BaseException | None) -> None:
        """Raise in our own words what SQLite raised."""
        if isinstance(error, sqlite3.Error):
            raise self._translated(error) from error
        # Text that is none (SQLite's own message quotes the damaged bytes), and numbers that are
        # none: its tables take any value in any column.
        if isinstance(error, (UnicodeDecodeError, TypeError, OverflowError)):
            raise self._damaged(f"{self.tier_name}: {self.path}: {error}") from error

    def _translated(self, error: sqlite3.Error) -> TierError:
        text = str(error)  # the numeric code came only with Python 3.11
        message = f"{self.tier_name}: {self.path}: {text}"
        if "locked" in text or "busy" in text:
            return TierTimeout(f"{message} for {self._busy_timeout_s:.3g} s")
        if "disk is full" in text:
            return TierFull(message)
        is_other = isinstance(error, sqlite3.OperationalError) and "no such" not in text
        if is_other or not isinstance(error, sqlite3.DatabaseError):
            return TierUnavailable(message)
        return self._damaged(message)

    def _damaged(self, message: str) -> IndexDamaged:
        with suppress(OSError):
            self.mark.touch()
        return IndexDamaged(message)


class _Turn:
    """Has the connection to itself while entered; what SQLite raises is raised in our own words.

    A class, for every look-up takes one: as two generators it took 25 microseconds more whenever
    records had just been copied, which leaves nothing of this code in the processor's caches.
    """

    def __init__(self, connection: Connection, patience_s: float) -> None:
        self._connection = connection
        self._patience_s = patience_s

    def __enter__(self) -> sqlite3.Connection:
        return self._connection._acquire(self._patience_s)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._connection._lock.release()
        self._connection._raise_translated(error)
