"""A tier whose records only the holders of a key can write, or read: for stores that are shared.

It wraps any tier, which then keeps protected records under names of the key; protection.py says
how. What comes back is verified in the caller's buffer and is the plain record, or `BlockCorrupted`
with the reason: the key of another, no protection, a wrong tag, a record under another's name.

A record may be an older one that somebody kept and put back: it was written under the same name, so
it holds the KV of the same tokens, and nothing more is promised of when it was written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from prefixstore.block_key import RecordName
from prefixstore.errors import BlockCorrupted, TierError
from prefixstore.keys import ProtectionConfig
from prefixstore.protection import RecordKey, make_record_keys
from prefixstore.record_header import FIXED, FIXED_BYTES, TRAILER_BYTES, FixedHeader, corrupted
from prefixstore.tiers.base import (
    PAGE_BYTES,
    Held,
    ReadOutcome,
    Swept,
    Tier,
    TierStats,
    page_aligned,
    round_up,
)

_BATCH_BYTES = 16 << 20  # of protected records that this tier holds itself, in each thread
_MAX_STORED_BYTES = (1 << 31) + TRAILER_BYTES


class ProtectedTier(Tier):
    """Another tier under keys. Owns it: `close` closes it.

    Its name, bounds and statistics are those of the other tier, trailers and all. It does not tell
    what gives way (`on_evict`): that would have to be opened under the other tier's lock.

    Args:
        tier: Where protected records are kept. Nothing else should put records there, but for
            tiers with other keys: they do not meet.
        config: The keys. The first writes; records of the others are found too, at the price of
            one more look-up of what the first does not find.

    Raises:
        ConfigError: If `cryptography` is not installed.
    """

    def __init__(self, tier: Tier, config: ProtectionConfig) -> None:
        self._tier = tier
        self._keys = make_record_keys(config)
        # apart: a write that the other tier gave up may still be under way in its medium, and
        # must find nothing there but protected records
        self._to_write = _Scratch()
        self._to_read = _Scratch()

    @property
    def name(self) -> str:
        return self._tier.name

    def get_many(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        *,
        offsets: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        """See `Tier.get_many`.

        A whole record is verified where it is read, in a buffer that is TRAILER_BYTES longer than
        the record; in a shorter one it arrives by way of another buffer and a second look-up. A
        part cannot be verified alone, so with `offsets` whole records are read, after their
        headers, and the parts copied out.
        """
        outcomes: list[ReadOutcome] = [None] * len(names)
        for key in self._keys:
            missing = [i for i, outcome in enumerate(outcomes) if outcome is None]
            read = _Reading(self._tier, key, self._to_read, deadline)
            wanted = [names[i] for i in missing], [outs[i] for i in missing]
            if offsets is None:
                found = read.records(*wanted)
            else:
                found = read.parts(*wanted, [offsets[i] for i in missing])
            for i, outcome in zip(missing, found, strict=True):
                outcomes[i] = outcome
        return outcomes

    @property
    def gives_parts(self) -> bool:
        return False  # a part cannot be verified alone

    def put_many(
        self,
        names: Sequence[RecordName],
        records: Sequence[memoryview],
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> list[TierError | None]:
        """See `Tier.put_many`; `BlockCorrupted` for what is not a plain record of that name."""
        outcomes: list[TierError | None] = [None] * len(names)
        sizes = [record.nbytes + TRAILER_BYTES for record in records]
        for run in _runs(sizes):
            protected: list[tuple[int, memoryview]] = []
            for i, row in zip(run, self._to_write.rows([sizes[i] for i in run]), strict=True):
                error = _protect(self._keys[0], names[i], records[i], row)
                if error is None:
                    protected.append((i, row))
                outcomes[i] = error
            errors = self._tier.put_many(
                [self._keys[0].stored_name(names[i]) for i, _ in protected],
                [row for _, row in protected],
                priority=priority,
                deadline=deadline,
            )
            for (i, _), failure in zip(protected, errors, strict=True):
                outcomes[i] = failure
        return outcomes

    def contains_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[bool]:
        found = [False] * len(names)
        for key in self._keys:
            missing = [i for i, is_there in enumerate(found) if not is_there]
            stored = [key.stored_name(names[i]) for i in missing]
            answers = self._tier.contains_many(stored, deadline=deadline) if stored else []
            for i, is_there in zip(missing, answers, strict=True):
                found[i] = is_there
        return found

    def delete_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[bool]:
        return self._any_key(
            names, lambda stored: self._tier.delete_many(stored, deadline=deadline)
        )

    def delete_identity(self, identity: bytes) -> None:
        for key in self._keys:
            self._tier.delete_identity(key.stored_identity(identity))

    def pin_many(self, names: Sequence[RecordName], is_pinned: bool = True) -> list[bool]:
        return self._any_key(names, lambda stored: self._tier.pin_many(stored, is_pinned))

    def list_identities(self) -> dict[bytes, Held]:
        """See `Tier.list_identities`; bytes with the trailers.

        What the first key did not write is there under an identity of nobody, which
        `delete_identity` forgets like any.
        """
        held = self._tier.list_identities()
        return {self._keys[0].plain_identity(stored): held[stored] for stored in held}

    def stats(self) -> TierStats:
        return self._tier.stats()

    def check(self, fix: bool = False) -> list[str]:
        return self._tier.check(fix)

    def sweep(self) -> Swept:
        return self._tier.sweep()

    def close(self) -> None:
        self._tier.close()

    def _any_key(
        self, names: Sequence[RecordName], call: Callable[[list[RecordName]], list[bool]]
    ) -> list[bool]:
        """For each name whether the answer is yes for its record under any of the keys."""
        answers = [call([key.stored_name(name) for name in names]) for key in self._keys]
        return [any(column) for column in zip(*answers, strict=True)]


class _Scratch(threading.local):
    """Buffers of each thread."""

    def __init__(self) -> None:
        self._slab = page_aligned(0)

    def rows(self, sizes: Sequence[int]) -> list[memoryview]:
        """A buffer of each size, on a page of its own, until the next call."""
        ends = np.cumsum([round_up(size, PAGE_BYTES) for size in sizes]).tolist()
        num_bytes = ends[-1] if ends else 0
        slab = self._slab
        if slab.nbytes < num_bytes:
            slab = page_aligned(num_bytes)
            if num_bytes <= _BATCH_BYTES:
                self._slab = slab
        starts = [0, *ends[:-1]]
        return [slab[start : start + size].data for start, size in zip(starts, sizes, strict=False)]


class _Reading:
    """One key's part of a call of `get_many`."""

    def __init__(
        self,
        tier: Tier,
        key: RecordKey,
        scratch: _Scratch,
        deadline: float | None,
    ) -> None:
        self._tier = tier
        self._key = key
        self._scratch = scratch
        self._deadline = deadline

    def records(self, names: Sequence[RecordName], outs: Sequence[memoryview]) -> list[ReadOutcome]:
        """Whole records, each opened where it lies."""
        outcomes = self._fetch(names, outs)
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
        for run in _runs(sizes):
            wanted, rows = [names[i] for i in run], self._scratch.rows([sizes[i] for i in run])
            outcomes = self._fetch(wanted, rows)
            for name, row, outcome in zip(wanted, rows, outcomes, strict=True):
                yield self._open(name, row, outcome), row

    def _fetch(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        offsets: Sequence[int] | None = None,
    ) -> list[ReadOutcome]:
        if not names:
            return []
        stored = [self._key.stored_name(name) for name in names]
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


def _protect(
    key: RecordKey, name: RecordName, record: memoryview, out: memoryview
) -> BlockCorrupted | None:
    """Fill `out` with the protected record; why not, where it is none to be kept."""
    try:
        key.protect(name, record, out)
    except BlockCorrupted as error:
        return error
    return None


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


def _runs(sizes: Sequence[int]) -> Iterator[range]:
    """Indices that follow each other, as many as fit a batch; at least one."""
    first, num_bytes = 0, 0
    for i, size in enumerate(sizes):
        padded = round_up(size, PAGE_BYTES)
        if i > first and num_bytes + padded > _BATCH_BYTES:
            yield range(first, i)
            first, num_bytes = i, 0
        num_bytes += padded
    if first < len(sizes):
        yield range(first, len(sizes))


def _copy(target: memoryview, source: memoryview) -> None:
    np.copyto(np.frombuffer(target, np.uint8)[: source.nbytes], np.frombuffer(source, np.uint8))
