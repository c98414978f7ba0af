"""Look-ups in the disk tier's index, on a connection of their own: none waits for a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from prefixstore.block_key import BlockHash, RecordName
from prefixstore.tiers.disk import slot_table
from prefixstore.tiers.disk.clock import Clock
from prefixstore.tiers.disk.slot_table import Place, SlotRef
from prefixstore.tiers.disk.sql import Connection, data_version

T = TypeVar("T")

_MAX_FOUND = 10_000  # some 5 MB


class LookUps:
    """What the table of slots says now.

    Args:
        reader: For nothing else.
        clock: The tier's time.
    """

    def __init__(self, reader: Connection, clock: Clock) -> None:
        self._reader = reader
        self._now = clock
        # what was found at version `_found_at`; guarded by the turn at the reader
        self._found: dict[RecordName, SlotRef] = {}
        self._found_at: int | None = None

    def version(self, deadline: float | None = None) -> int:
        """A number that every transaction changes, of this process and of others: between two
        calls with the same result nobody changed anything."""
        # SQLite's data_version leaves out changes of its own connection, but this one only reads.
        with self._reader.reading(deadline) as sql:
            return data_version(sql)

    def find_many(
        self, names: Iterable[RecordName], deadline: float | None = None
    ) -> dict[RecordName, SlotRef]:
        """Those that are there and not past their time."""
        return self.find_at_version(names, deadline)[0]

    def find_at_version(
        self, names: Iterable[RecordName], deadline: float | None = None
    ) -> tuple[dict[RecordName, SlotRef], int]:
        """`find_many`, and the `version` from before.

        What was found at that version before is not looked up again.
        """
        now = self._now()
        found: dict[RecordName, SlotRef] = {}
        unknown: list[RecordName] = []
        with self._reader.reading(deadline) as sql:
            version = data_version(sql)
            if version != self._found_at:
                self._found.clear()
                self._found_at = version
            for name in names:
                ref = self._found.get(name)
                if ref is not None and (ref.expires_at is None or ref.expires_at > now):
                    found[name] = ref
                else:
                    unknown.append(name)

        def look(sql: sqlite3.Connection, hashes: Sequence[BlockHash]) -> list[SlotRef]:
            refs = list(slot_table.find(sql, hashes, now))
            if len(self._found) > _MAX_FOUND:
                self._found.clear()
            # found at that version or a later one; in the second case they are forgotten next time
            self._found.update((ref.name, ref) for ref in refs)
            return refs

        if unknown:
            found.update((ref.name, ref) for ref in self._look_up(look, unknown, deadline))
        return found, version

    def names_among(
        self, names: Iterable[RecordName], deadline: float | None = None
    ) -> set[RecordName]:
        """The names of `find_many`."""
        now = self._now()
        return set(
            self._look_up(
                lambda sql, hashes: slot_table.names_among(sql, hashes, now), names, deadline
            )
        )

    def places_among(
        self, names: Iterable[RecordName], deadline: float | None = None
    ) -> set[Place]:
        """Where those lie that are there, in time or past it."""
        return set(self._look_up(slot_table.places_among, names, deadline))

    def _look_up(
        self,
        look: Callable[[sqlite3.Connection, Sequence[BlockHash]], Iterable[T]],
        names: Iterable[RecordName],
        deadline: float | None,
    ) -> list[T]:
        """What it finds of the names, as many at a time as a statement takes."""
        found: list[T] = []
        for hashes in slot_table.batches_of_hashes(names):
            with self._reader.reading(deadline) as sql:
                found += look(sql, hashes)
        return found

    def list_records(self) -> list[tuple[RecordName, int]]:
        """Name and bytes of every record there is now, in the order of the files."""
        with self._reader.reading() as sql:
            return slot_table.list_names(sql, self._now())

    def list_identities(self) -> list[tuple[bytes, int, int]]:
        """Each identity, how many records it has, and their bytes."""
        with self._reader.reading() as sql:
            return slot_table.list_identities(sql, self._now())

    def totals(self) -> tuple[int, int]:
        """Records, and their bytes."""
        with self._reader.reading() as sql:
            return sql.execute(
                "SELECT count(*), ifnull(sum(record_bytes), 0) FROM slots WHERE state = 2"
            ).fetchone()

    def close(self) -> None:
        self._reader.close()
