"""The time by which a disk tier's records age, which no step of the wall clock touches.

It runs with the machine's boot clock, which is the same for all processes, counts while the machine
sleeps, and is never set. The index keeps how far it lies behind the tier's time:

    tier's time = boot clock + offset            offset: set once for each start of the machine

So within one run of the machine a time to live is exact, whatever happens to the wall clock. Over a
restart of the machine the wall clock says how long it was off; one that was set back says "not at
all", and one that is ahead ages every record by as much.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Callable
from pathlib import Path

Clock = Callable[[], int]
"""Nanoseconds; never goes back."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def open_clock(sql: sqlite3.Connection) -> Clock:
    """The tier's time, carried on from where the index was last used.

    Args:
        sql: The index, in a transaction.
    """
    offset_ns = read_offset(sql, boot_id(), boot_ns(), time.time_ns())
    return lambda: boot_ns() + offset_ns


def read_offset(sql: sqlite3.Connection, boot: str, boot_now_ns: int, wall_now_ns: int) -> int:
    """How far the tier's time is ahead of the boot clock; after a restart it is set anew."""
    row = sql.execute("SELECT offset_ns FROM clock WHERE boot_id = ?", (boot,)).fetchone()
    if row is not None:
        return row[0]
    # after a reboot the clock must not go behind any last use, or the order of use would break
    (last_used,) = sql.execute("SELECT ifnull(max(last_used), 0) FROM slabs").fetchone()
    offset_ns = max(wall_now_ns, last_used) - boot_now_ns
    sql.execute("DELETE FROM clock")
    sql.execute("INSERT INTO clock VALUES (?, ?)", (boot, offset_ns))
    return offset_ns


def boot_id() -> str:
    """Names this run of the machine; where it has no name, every opening counts as a restart."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return uuid.uuid4().hex


def boot_ns() -> int:
    """Nanoseconds since this machine was started, those in suspend included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
