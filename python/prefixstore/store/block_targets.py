"""Where the blocks go that a store loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from prefixstore.checksum import Buffer, as_bytes
from prefixstore.errors import BlockCorrupted
from prefixstore.record import BlockKey, RecordHeader, decode


@dataclass(frozen=True, eq=False)
class FetchedRecord:
    """A record whose header is right; its payload is still to be verified.

    Attributes:
        index: Which of the blocks that were asked for.
        key: What it is.
        header: What it says of itself.
        data: All of it, uint8. Records that lie at equal distances are restored together.
    """

    index: int
    key: BlockKey
    header: RecordHeader
    data: np.ndarray


class BlockTarget(Protocol):
    """Takes the blocks of records, by the index with which they were asked for."""

    def start(self, records: Sequence[FetchedRecord]) -> Callable[[], list[str | None]]:
        """Begin to verify and keep each.

        What is returned waits until that is done, and says of each None, or what is wrong with it.
        What is wrong may have been written in part. The records are read, and the blocks written,
        until then and no longer; where this or what is returned raises, no longer than that.
        """
        ...


class LayerTarget(Protocol):
    """Takes the blocks of records some layers at a time, of all records together."""

    def begin(self, records: Sequence[FetchedRecord]) -> None:
        """These are to come; nothing is read of them but their headers."""
        ...

    def add_layers(self, layers: range) -> None:
        """The next layers of all records are there: verify and keep them."""
        ...

    def end(self) -> list[str | None]:
        """For each record None, or what is wrong with it; called whatever happened in between.

        After this the records are not read any more, nor the blocks written.
        """
        ...


class LayerProgress(Protocol):
    """Is told by the thread that loads how far it is."""

    def add_layers(self, num_layers: int) -> None:
        """The first so many layers of all blocks were given to the target."""
        ...

    def fail(self) -> None:
        """Not all blocks will come."""
        ...


class HostBlocks:
    """Blocks in host memory.

    Args:
        blocks: For each, where it goes: as many bytes as it has in a pool.

    Raises:
        ValueError: If one is read-only or not contiguous.
    """

    def __init__(self, blocks: Sequence[Buffer]) -> None:
        self._blocks = [as_bytes("blocks", block) for block in blocks]
        if any(block.readonly for block in self._blocks):
            raise ValueError("blocks: expected writable buffers, got a read-only one")

    def start(self, records: Sequence[FetchedRecord]) -> Callable[[], list[str | None]]:
        problems = [self._restore(record) for record in records]
        return lambda: problems

    def _restore(self, record: FetchedRecord) -> str | None:
        try:
            decode(record.data, record.key, self._blocks[record.index])
        except BlockCorrupted as error:
            return str(error)
        return None
