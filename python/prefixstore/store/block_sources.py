"""Where the records that a store writes come from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np

from prefixstore.block_key import BlockKey
from prefixstore.checksum import Buffer, as_bytes
from prefixstore.record import encode
from prefixstore.tiers.base import page_aligned

RECORDS_AT_ONCE = 8  # that may be read from sources of one kind at a time


class BlockSource(Protocol):
    """A block that can be written as a record."""

    @property
    def num_bytes(self) -> int:
        """What it counts for in a queue."""
        ...

    def record(self, key: BlockKey) -> AbstractContextManager[np.ndarray]:
        """The block's record, uint8, to be read inside the context; there the block is free."""
        ...


class HostBlock:
    """A block in host memory.

    Args:
        block: As it lies in the pool, `key.layout.block_bytes`.

    Raises:
        ValueError: If `block` is not contiguous.
    """

    def __init__(self, block: Buffer) -> None:
        self._block = as_bytes("block", block)

    @property
    def num_bytes(self) -> int:
        return self._block.nbytes

    @contextmanager
    def record(self, key: BlockKey) -> Iterator[np.ndarray]:
        record = page_aligned(key.layout.encode_bytes)
        yield record[: encode(key, self._block, record)]


class WrittenRecord:
    """A record that a tier gave: it goes to another tier as it is."""

    def __init__(self, record: np.ndarray) -> None:
        self._record = record

    @property
    def num_bytes(self) -> int:
        return self._record.nbytes

    @contextmanager
    def record(self, key: BlockKey) -> Iterator[np.ndarray]:
        yield self._record
