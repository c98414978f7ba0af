"""Reads records that lie protected in a tier: fetches, verifies, opens them. See protected.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from prefixstore.block_key import RecordName
from prefixstore.errors import BlockCorrupted
from prefixstore.protection import RecordKey
from prefixstore.record_header import FIXED, FIXED_BYTES, TRAILER_BYTES, FixedHeader, corrupted
from prefixstore.tiers.base import ReadOutcome, Tier
from prefixstore.tiers.scratch import Scratch, batches_of

_MAX_STORED_BYTES = (1 << 31) + TRAILER_BYTES


class Reading:
    """One key's part of a call of `get_many`."""

    def __init__(
        self,
        tier: Tier,
        key: RecordKey,
        scratch: Scratch,
        deadline: float | None,
    ) -> None:
        self._tier = tier
        self._key = key
        self._scratch = scratch
        self._deadline = deadline

    def records(
        self, names: Sequence[RecordName], outs: Sequence[memoryview], may_abandon: bool
    ) -> list[ReadOutcome]:
        """Whole records, each opened where it lies.

        Args:
            may_abandon: Whether the caller lets go of buffers as `get_or_abandon_many` says. The
                scratch buffers are never let go of.
        """
        outcomes = self._fetch(names, outs, may_abandon=may_abandon)
        # a buffer may have room for the record and none for its trailer
        tight = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, BlockCorrupted)]
        outcomes = [
            self._open(name, out, outcome)
            for name, out, outcome in zip(names, outs, outcomes, strict=True)
        ]
        sizes = [outs[i].nbytes + TRAILER_BYTES for i in tight]
        for i, (outcome, row) in zip(
            tight, self._apart([names[i] for i in tight], sizes), strict=True
        ):
            outcomes[i] = outcome
            if isinstance(outcome, int):
                _copy(outs[i], row[:outcome])
        return outcomes

    def parts(
        self, names: Sequence[RecordName], outs: Sequence[memoryview], offsets: Sequence[int]
    ) -> list[ReadOutcome]:
        """Parts of records, each verified as a whole first."""
        heads = [memoryview(bytearray(FIXED_BYTES)) for _ in names]
        outcomes = [
            _stored_bytes(head, outcome)
            for head, outcome in zip(
                heads, self._fetch(names, heads, [0] * len(names)), strict=True
            )
        ]
        there = [(i, size) for i, size in enumerate(outcomes) if isinstance(size, int)]
        fetched = self._apart([names[i] for i, _ in there], [size for _, size in there])
        for (i, _), (outcome, row) in zip(there, fetched, strict=True):
            outcomes[i] = outcome
            if isinstance(outcome, int):
                part = row[:outcome][offsets[i] : offsets[i] + outs[i].nbytes]
                _copy(outs[i], part)
                outcomes[i] = part.nbytes
        return outcomes

    def _apart(
        self, names: Sequence[RecordName], sizes: Sequence[int]
    ) -> Iterator[tuple[ReadOutcome, memoryview]]:
        """Records opened in buffers of this thread; each is to be used before the next is asked."""
        for run in batches_of(sizes):
            wanted, rows = [names[i] for i in run], self._scratch.rows([sizes[i] for i in run])
            outcomes = self._fetch(wanted, rows)
            for name, row, outcome in zip(wanted, rows, outcomes, strict=True):
                yield self._open(name, row, outcome), row

    def _fetch(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        offsets: Sequence[int] | None = None,
        may_abandon: bool = False,
    ) -> list[ReadOutcome]:
        if not names:
            return []
        stored = [self._key.stored_name(name) for name in names]
        if may_abandon:
            return self._tier.get_or_abandon_many(stored, outs, deadline=self._deadline)
        return self._tier.get_many(stored, outs, offsets=offsets, deadline=self._deadline)

    def _open(self, name: RecordName, data: memoryview, outcome: ReadOutcome) -> ReadOutcome:
        """Bytes of the plain record, once it is verified."""
        if not isinstance(outcome, int):
            return outcome
        try:
            found, num_bytes = self._key.open(data[:outcome])
        except BlockCorrupted as error:
            return BlockCorrupted(f"{self._tier.name}: {error}")
        if found != name:
            return BlockCorrupted(
                f"{self._tier.name}: name: expected {b''.join(name).hex()}, got"
                f" {b''.join(found).hex()}"
            )
        return num_bytes


def _stored_bytes(head: memoryview, outcome: ReadOutcome) -> ReadOutcome:
    """How long a record is by the first bytes of its header, which are not verified yet."""
    if not isinstance(outcome, int):
        return outcome
    if outcome < FIXED_BYTES:
        return corrupted("record", f"at least {FIXED_BYTES} bytes", outcome)
    num_bytes = FixedHeader._make(FIXED.unpack(head)).record_bytes
    if num_bytes > _MAX_STORED_BYTES:
        return corrupted("record", f"at most {_MAX_STORED_BYTES} bytes", num_bytes)
    return num_bytes


def _copy(target: memoryview, source: memoryview) -> None:
    np.copyto(np.frombuffer(target, np.uint8)[: source.nbytes], np.frombuffer(source, np.uint8))
