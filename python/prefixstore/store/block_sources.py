"""Where the records that a store writes come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np

from prefixstore.block_key import BlockKey
from prefixstore.checksum import Buffer, as_bytes
from prefixstore.record import encode
from prefixstore.tiers.pages import page_aligned

MAX_RECORDS = 256  # records that are made and written together
MAX_RECORDS_BYTES = 32 << 20  # of such records, in memory of the maker


class RecordMaker(Protocol):
    """Makes the records of blocks of one kind, many at a time: one by one costs too much."""

    @property
    def max_records(self) -> int:
        """It holds as many at a time: a half is made while the other half is put into a tier."""
        ...

    def records(
        self, keys: Sequence[BlockKey], sources: Sequence[Any]
    ) -> AbstractContextManager[list[np.ndarray]]:
        """The records of sources that name this maker, each uint8, to be read inside the context.

        There the blocks are free.
        """
        ...

    @property
    def writes_anywhere(self) -> bool:
        """Whether `write` is there."""
        ...

    def write(
        self, keys: Sequence[BlockKey], sources: Sequence[Any], places: Sequence[np.ndarray]
    ) -> list[bool]:
        """Make records in places of `key.layout.record_bytes` each; then the blocks are free.

        Returns:
            For each whether it is there. What a codec does not hold makes a longer record.
        """
        ...


class BlockSource(Protocol):
    """A block that can be written as a record."""

    @property
    def num_bytes(self) -> int:
        """What it counts for in a queue."""
        ...

    @property
    def held_bytes(self) -> int:
        """Of those, memory that is kept for it alone; none of a block that waits where it lies."""
        ...

    @property
    def maker(self) -> RecordMaker:
        """What makes a record of it."""
        ...


class HostBlock:
    """A block in host memory.

    Args:
        block: As it lies in the pool, `key.layout.block_bytes`.

    Raises:
        ValueError: If `block` is not contiguous.
    """

    held_bytes = 0

    def __init__(self, block: Buffer) -> None:
        self.block = as_bytes("block", block)

    @property
    def num_bytes(self) -> int:
        return self.block.nbytes

    @property
    def maker(self) -> RecordMaker:
        return _HOST_BLOCKS


class WrittenRecord:
    """A record that a tier gave: it goes to another tier as it is.

    Args:
        record: Its bytes.
        held_bytes: Its share of the memory that is kept for them.
    """

    def __init__(self, record: np.ndarray, held_bytes: int) -> None:
        self.record = record
        self.held_bytes = held_bytes

    @property
    def num_bytes(self) -> int:
        return self.held_bytes

    @property
    def maker(self) -> RecordMaker:
        return _WRITTEN_RECORDS


class _Elsewhere:
    """What makes records only in memory of its own."""

    max_records = MAX_RECORDS
    writes_anywhere = False

    def write(
        self, keys: Sequence[BlockKey], sources: Sequence[Any], places: Sequence[np.ndarray]
    ) -> list[bool]:
        raise NotImplementedError(f"{type(self).__name__}: writes nowhere else")


class _HostBlocks(_Elsewhere):
    @contextmanager
    def records(
        self, keys: Sequence[BlockKey], sources: Sequence[HostBlock]
    ) -> Iterator[list[np.ndarray]]:
        records = []
        for key, source in zip(keys, sources, strict=True):
            record = page_aligned(key.layout.encode_bytes)
            records.append(record[: encode(key, source.block, record)])
        yield records


class _WrittenRecords(_Elsewhere):
    @contextmanager
    def records(
        self, keys: Sequence[BlockKey], sources: Sequence[WrittenRecord]
    ) -> Iterator[list[np.ndarray]]:
        yield [source.record for source in sources]


_HOST_BLOCKS, _WRITTEN_RECORDS = _HostBlocks(), _WrittenRecords()
