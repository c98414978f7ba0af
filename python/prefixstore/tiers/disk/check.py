"""Recounting a disk tier: does each slot hold what the index says, and mending where it does not.

Records are counted from the rows of the index each time, so there are no totals that could be
wrong. Each slab is looked at in a transaction of its own: others go on meanwhile.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable

from prefixstore.block_key import RecordName
from prefixstore.errors import TierError
from prefixstore.tiers.disk import slab_table, slot_table
from prefixstore.tiers.disk.files import Slab, SlabFiles
from prefixstore.tiers.disk.headers import find_records
from prefixstore.tiers.disk.index import SlotIndex
from prefixstore.tiers.disk.opening import read_anew
from prefixstore.tiers.disk.schema import READY
from prefixstore.tiers.disk.slab_table import Limits
from prefixstore.tiers.disk.slot_table import SlotRef

_MISSHAPEN = (
    "SELECT slot FROM slots JOIN slabs USING (slab_id) WHERE slab_id = ?"
    " AND (slots.slot_bytes <> slabs.slot_bytes OR record_bytes > slots.slot_bytes) ORDER BY slot"
)
_COUNT = "SELECT count(*), min(slot), max(slot) FROM slots WHERE slab_id = ?"
_READY = (
    "SELECT slot, ticket, ifnull(identity, x''), ifnull(block_hash, x''), record_bytes FROM slots"
    f" WHERE slab_id = ? AND state = {READY} ORDER BY slot"
)


class Checker:
    """Finds what does not add up, and can mend it.

    Attributes:
        problems: What was found, in words.
        dropped: Where it mends, slabs that were forgotten; their files are to be removed.
        is_index_sound: Whether the index's file is, after mending; otherwise no slab was looked at.
        errors: Why slots that should hold a record, and do not, could not be wiped.

    Args:
        index: The tier's.
        files: Of the slabs.
        limits: Bounds of the tier.
        wipe: Wipes and releases slots that were taken at a time; None where nothing is mended.
    """

    def __init__(
        self,
        index: SlotIndex,
        files: SlabFiles,
        limits: Limits,
        wipe: Callable[[list[SlotRef], float], None] | None,
    ) -> None:
        self._index = index
        self._files = files
        self._limits = limits
        self._wipe = wipe
        self.problems: list[str] = []
        self.is_index_sound = True
        self.dropped: list[Slab] = []
        self.errors: list[TierError] = []

    def run(self) -> None:
        self.is_index_sound = self._check_index_file()
        if not self.is_index_sound:  # what it says of slabs may be wrong, and transactions fail
            return
        name, bound = self._limits.tier_name, self._limits.capacity_bytes
        with self._index.frozen() as sql:
            if (num_bytes := slab_table.total_bytes(sql)) > bound:
                self.problems.append(f"{name}: expected at most {bound} bytes, got {num_bytes}")
                if self._wipe is not None:
                    self.dropped += slab_table.shrink(sql, bound)
            slabs = slab_table.list_slabs(sql)
        for slab in slabs:
            now, taken = time.monotonic(), list[SlotRef]()
            with self._index.frozen() as sql:
                if slab in slab_table.list_slabs(sql):  # not dropped meanwhile
                    taken = self._check_slab(sql, slab)
            if self._wipe is not None:  # at once: all slabs may take longer than a lease
                try:
                    self._wipe(taken, now)
                except TierError as error:
                    self.errors.append(error)

    def _check_index_file(self) -> bool:
        """Whether all is well with it, in the end."""
        file = self._index.file
        problems = file.find_damage()
        self.problems += problems
        if problems and self._wipe is not None:
            problems = file.mend()
            self.problems += [f"{one}; whoever opens the tier alone mends it" for one in problems]
        return not problems

    def _check_slab(self, sql: sqlite3.Connection, slab: Slab) -> list[SlotRef]:
        """Returns slots that nobody else has now, and that are to be wiped and released."""
        where = f"{self._limits.tier_name}: {slab.file_name}"
        # Counted in SQL: of a slab with thousands of slots few may be in use.
        misshapen = [
            f"{where}: slot {slot} does not fit its slab"
            for (slot,) in sql.execute(_MISSHAPEN, (slab.slab_id,))
        ]
        num_slots, first, last = sql.execute(_COUNT, (slab.slab_id,)).fetchone()
        if (num_slots, first, last) != (slab.num_slots, 0, slab.num_slots - 1):
            misshapen.append(f"{where}: expected {slab.num_slots} slots, got {num_slots}")
        wrong = self._find_wrong(sql, slab)
        self.problems += misshapen
        self.problems += [
            f"{where}: slot {ref.slot} does not hold the record {ref.name.block_hash.hex()}"
            for ref in wrong
        ]
        if self._wipe is None:
            return []
        now = self._index.now()
        if wrong and self._files.num_bytes(slab) is None:
            slab_table.drop_slab(sql, slab)
            self.dropped.append(slab)
        elif misshapen:
            slab_table.drop_slab(sql, slab)
            read_anew(sql, self._files, slab, now, now)
        else:
            return slot_table.take(sql, wrong, now)
        return []

    def _find_wrong(self, sql: sqlite3.Connection, slab: Slab) -> list[SlotRef]:
        """Slots that do not hold the record they should.

        Of one that cannot be read no more is known: it is a problem, and stays as it is.
        """
        refs = [
            SlotRef(slab, slot, ticket, RecordName(identity, block_hash), record_bytes)
            for slot, ticket, identity, block_hash, record_bytes in sql.execute(
                _READY, (slab.slab_id,)
            )
        ]
        records, unreadable = find_records(self._files, slab, [ref.slot for ref in refs])
        for slot, error in unreadable.items():
            self.problems.append(f"{error}: slot {slot} cannot be read")
        found = {record.slot: (record.name, record.record_bytes) for record in records}
        return [
            ref
            for ref in refs
            if ref.slot not in unreadable and found.get(ref.slot) != (ref.name, ref.record_bytes)
        ]
