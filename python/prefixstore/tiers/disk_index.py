"""The disk tier's index: which slot holds which block.

    FREE (0) ------ allocate ------> WRITING (1) ------ publish ------> READY (2)
       ^                                |    ^                             |
       +----- release, lease over ------+    +-------- unpublish ----------+
       +-------------------------------- evict ----------------------------+

Each step is one transaction, so several processes may take them at once. Taking a slot raises its
`ticket`: a writer that was too slow finds its ticket gone and publishes nothing; a reader that was
overtaken by an eviction finds the ticket changed and reports a miss. Marks of use gather in memory
and go along with the next transaction.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prefixstore.block_key import BlockHash
from prefixstore.errors import TierError
from prefixstore.tiers import disk_slabs
from prefixstore.tiers.disk_files import Slab
from prefixstore.tiers.disk_slabs import Evicted, Limits
from prefixstore.tiers.disk_sql import Connection, IndexDamaged

logger = logging.getLogger(__name__)

READY = 2
_MAX_SQL_VALUES = 500


@dataclass(frozen=True)
class SlotRef:
    """A slot as the holder of its ticket sees it."""

    slab: Slab
    slot: int
    ticket: int
    block_hash: BlockHash
    record_bytes: int

    @property
    def place(self) -> tuple[int, int, int]:
        return self.slab.slab_id, self.slot, self.ticket


class SlotIndex:
    """The table of slots, on one connection."""

    def __init__(self, connection: Connection, limits: Limits) -> None:
        self._connection = connection
        self._limits = limits
        self._pending_lock = threading.Lock()
        self._touched: dict[BlockHash, int] = {}
        self._abandoned: list[SlotRef] = []

    def find(self, block_hash: BlockHash) -> SlotRef | None:
        with self._connection.reading() as sql:
            row = sql.execute(
                "SELECT slab_id, slots.slot_bytes, num_slots, slot, ticket, record_bytes FROM slots"
                " JOIN slabs USING (slab_id) WHERE state = 2 AND block_hash = ?",
                (block_hash,),
            ).fetchone()
        return row and SlotRef(Slab(*row[:3]), row[3], row[4], block_hash, row[5])

    def holds(self, ref: SlotRef) -> bool:
        """Whether the slot still holds the record that `find` told of."""
        with self._connection.reading() as sql:
            row = sql.execute(
                "SELECT state FROM slots WHERE slab_id = ? AND slot = ? AND ticket = ?", ref.place
            ).fetchone()
        return row == (READY,)

    def find_many(self, block_hashes: Sequence[BlockHash]) -> set[BlockHash]:
        found: set[BlockHash] = set()
        for start in range(0, len(block_hashes), _MAX_SQL_VALUES):
            part = list(block_hashes[start : start + _MAX_SQL_VALUES])
            places = ",".join("?" * len(part))
            query = f"SELECT block_hash FROM slots WHERE state = 2 AND block_hash IN ({places})"
            with self._connection.reading() as sql:
                found.update(row[0] for row in sql.execute(query, part))
        return found

    def list_records(self) -> list[tuple[BlockHash, int]]:
        """Hash and bytes of every record there is now, in the order of the files."""
        with self._connection.reading() as sql:
            rows = sql.execute(
                "SELECT block_hash, record_bytes FROM slots WHERE state = 2 ORDER BY slab_id, slot"
            ).fetchall()
        return [(BlockHash(block_hash), record_bytes) for block_hash, record_bytes in rows]

    def touch(self, block_hash: BlockHash) -> None:
        """Mark as used."""
        with self._pending_lock:
            self._touched[block_hash] = time.time_ns()

    def allocate(
        self, block_hash: BlockHash, record_bytes: int, slot_bytes: int
    ) -> tuple[SlotRef, Evicted]:
        """Take a slot for writing: a free one, else a new slab's, else an evicted record's.

        Raises:
            TierFull: If nothing may be evicted for it.
        """
        now = time.time_ns()
        lease_end = now - int(self._limits.write_lease_s * 1e9)
        with self._writing() as sql:
            sql.execute(
                "UPDATE slots SET state = 0 WHERE slot_bytes = ? AND state = 1 AND last_used < ?",
                (slot_bytes, lease_end),
            )
            evicted = disk_slabs.make_room(sql, slot_bytes, self._limits)
            free = sql.execute(
                "SELECT slab_id, slot, ticket + 1, num_slots FROM slots JOIN slabs USING (slab_id)"
                " WHERE slots.slot_bytes = ? AND state = 0 LIMIT 1",
                (slot_bytes,),
            ).fetchone()
            if free is None:
                raise IndexDamaged(
                    f"{self._limits.tier_name}: expected a free slot in a known slab, got one in"
                    " none"
                )
            slab_id, slot, ticket, num_slots = free
            sql.execute(
                "UPDATE slots SET state = 1, ticket = ?, block_hash = NULL, last_used = ?"
                " WHERE slab_id = ? AND slot = ?",
                (ticket, now, slab_id, slot),
            )
        slab = Slab(slab_id, slot_bytes, num_slots)
        return SlotRef(slab, slot, ticket, block_hash, record_bytes), evicted

    def publish(self, ref: SlotRef) -> bool:
        """Let readers find the record; False if the slot was lost to the end of the lease.

        Where another writer published the same block first, its record stands.
        """
        now = time.time_ns()
        with self._writing() as sql:
            twin = "SELECT 1 FROM slots WHERE state = 2 AND block_hash = ?"
            if sql.execute(twin, (ref.block_hash,)).fetchone():
                _release(sql, ref)
                return True
            cursor = sql.execute(
                "UPDATE slots SET state = 2, block_hash = ?, record_bytes = ?, last_used = ?"
                " WHERE slab_id = ? AND slot = ? AND ticket = ? AND state = 1",
                (ref.block_hash, ref.record_bytes, now, *ref.place),
            )
            _touch_slab(sql, ref.slab.slab_id, now)
            return cursor.rowcount == 1

    def unpublish(self, block_hash: BlockHash) -> SlotRef | None:
        """Hide a record from readers; the slot is then the caller's until `release`."""
        ref = self.find(block_hash)
        if ref is None:
            return None
        with self._writing() as sql:
            cursor = sql.execute(
                "UPDATE slots SET state = 1, ticket = ticket + 1, block_hash = NULL, last_used = ?"
                " WHERE slab_id = ? AND slot = ? AND ticket = ? AND state = 2",
                (time.time_ns(), *ref.place),
            )
        if cursor.rowcount != 1:
            return None
        return SlotRef(ref.slab, ref.slot, ref.ticket + 1, block_hash, ref.record_bytes)

    def release(self, ref: SlotRef) -> None:
        """Give a slot back that was allocated or unpublished."""
        with self._writing() as sql:
            _release(sql, ref)

    def abandon(self, ref: SlotRef) -> None:
        """`release` with the next transaction: for when the disk has just failed."""
        with self._pending_lock:
            self._abandoned.append(ref)

    def totals(self) -> tuple[int, int]:
        """Records, and their bytes."""
        with self._connection.reading() as sql:
            return sql.execute(
                "SELECT count(*), ifnull(sum(record_bytes), 0) FROM slots WHERE state = 2"
            ).fetchone()

    @contextmanager
    def frozen(self) -> Iterator[sqlite3.Connection]:
        """No process can take, give or evict a slot meanwhile."""
        with self._writing() as sql:
            yield sql

    def close(self) -> None:
        """Write the last marks of use, if that can be done, and disconnect."""
        try:
            if self._touched or self._abandoned:
                with self._writing():
                    pass
        except TierError as error:
            logger.warning("the order of use since the last write is lost: %s", error)
        finally:
            self._connection.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that takes along what is pending; it stays pending if this fails."""
        with self._pending_lock:
            touched, abandoned = dict(self._touched), list(self._abandoned)
        with self._connection.writing() as sql:
            for ref in abandoned:
                _release(sql, ref)
            for block_hash, when in touched.items():
                _touch(sql, block_hash, when)
            yield sql
        with self._pending_lock:
            self._abandoned = [ref for ref in self._abandoned if ref not in abandoned]
            for block_hash, when in touched.items():
                if self._touched.get(block_hash) == when:
                    del self._touched[block_hash]


def _release(sql: sqlite3.Connection, ref: SlotRef) -> None:
    sql.execute(
        "UPDATE slots SET state = 0, last_used = 0"
        " WHERE slab_id = ? AND slot = ? AND ticket = ? AND state = 1",
        ref.place,
    )


def _touch(sql: sqlite3.Connection, block_hash: BlockHash, when: int) -> None:
    query = "SELECT slab_id, slot FROM slots WHERE state = 2 AND block_hash = ?"
    row = sql.execute(query, (block_hash,)).fetchone()
    if row is not None:
        sql.execute("UPDATE slots SET last_used = ? WHERE slab_id = ? AND slot = ?", (when, *row))
        _touch_slab(sql, row[0], when)


def _touch_slab(sql: sqlite3.Connection, slab_id: int, when: int) -> None:
    sql.execute("UPDATE slabs SET last_used = max(last_used, ?) WHERE slab_id = ?", (when, slab_id))
