"""Recounting a disk tier: does each slot hold what the index says, and mending where it does not.

Records are counted from the rows of the index each time, so there are no totals that could be
wrong. Each slab is looked at in a transaction of its own: others go on meanwhile.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from prefixstore.block_key import BlockHash, RecordName
from prefixstore.tiers.disk import slab_table, slot_table
from prefixstore.tiers.disk.files import Slab, SlabFiles
from prefixstore.tiers.disk.index import SlotIndex
from prefixstore.tiers.disk.opening import QUICK_CHECK
from prefixstore.tiers.disk.schema import READY
from prefixstore.tiers.disk.slab_table import Limits
from prefixstore.tiers.disk.slot_table import SlotRef


class _Row(NamedTuple):
    slot: int
    slot_bytes: int
    state: int
    ticket: int
    identity: bytes
    block_hash: BlockHash
    record_bytes: int


_SELECT_ROWS = f"SELECT {', '.join(_Row._fields)} FROM slots WHERE slab_id = ? ORDER BY slot"


class Checker:
    """Finds what does not add up, and can mend it.

    Attributes:
        problems: What was found, in words.
        wrong: With `fix`, slots without the record they should hold, which nobody else has now:
            they are to be wiped and released.
        dropped: With `fix`, slabs that were forgotten; their files are to be removed.
    """

    def __init__(self, index: SlotIndex, files: SlabFiles, limits: Limits, fix: bool) -> None:
        self._index = index
        self._files = files
        self._limits = limits
        self._fix = fix
        self.problems: list[str] = []
        self.wrong: list[SlotRef] = []
        self.dropped: list[Slab] = []

    def run(self) -> None:
        name, bound = self._limits.tier_name, self._limits.capacity_bytes
        with self._index.frozen() as sql:
            self.problems += [f"{name}: index: {row[0]}" for row in sql.execute(QUICK_CHECK)]
            if (num_bytes := slab_table.total_bytes(sql)) > bound:
                self.problems.append(f"{name}: expected at most {bound} bytes, got {num_bytes}")
                if self._fix:
                    self.dropped += slab_table.shrink(sql, bound)
            slabs = slab_table.list_slabs(sql)
        for slab in slabs:
            with self._index.frozen() as sql:
                if slab in slab_table.list_slabs(sql):  # not dropped meanwhile
                    self._check_slab(sql, slab)

    def _check_slab(self, sql: sqlite3.Connection, slab: Slab) -> None:
        where = f"{self._limits.tier_name}: {slab.file_name}"
        rows = [_Row(*row) for row in sql.execute(_SELECT_ROWS, (slab.slab_id,))]
        misshapen = [
            f"{where}: slot {row.slot} does not fit its slab"
            for row in rows
            if row.slot_bytes != slab.slot_bytes or row.record_bytes > row.slot_bytes
        ]
        if [row.slot for row in rows] != list(range(slab.num_slots)):
            misshapen.append(f"{where}: expected {slab.num_slots} slots, got {len(rows)}")
        wrong = self._find_wrong(slab, rows)
        self.problems += misshapen
        self.problems += [
            f"{where}: slot {ref.slot} does not hold the record {ref.name.block_hash.hex()}"
            for ref in wrong
        ]
        if not self._fix:
            return
        now = self._index.now()
        if wrong and self._files.num_bytes(slab) is None:
            slab_table.drop_slab(sql, slab)
            self.dropped.append(slab)
        elif misshapen:
            slab_table.drop_slab(sql, slab)
            slab_table.insert_slab(sql, slab, now)
            found = self._files.find_records(slab, range(slab.num_slots))
            slab_table.fill_slab(sql, slab, found, now)
        else:
            self.wrong += slot_table.take(sql, wrong, now)

    def _find_wrong(self, slab: Slab, rows: list[_Row]) -> list[SlotRef]:
        """Slots that do not hold the record they should."""
        ready = [row for row in rows if row.state == READY]
        found = {
            record.slot: (record.name, record.record_bytes)
            for record in self._files.find_records(slab, [row.slot for row in ready])
        }
        refs = [
            SlotRef(
                slab,
                row.slot,
                row.ticket,
                RecordName(row.identity, row.block_hash),
                row.record_bytes,
            )
            for row in ready
        ]
        return [ref for ref in refs if found.get(ref.slot) != (ref.name, ref.record_bytes)]
