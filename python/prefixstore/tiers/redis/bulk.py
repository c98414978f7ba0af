"""What is done to many records with one command for each, while all goes well.

A record that this does not settle, because it has more parts, is not what it should be, or another
server has it, goes on as an operation of its own (see records.py).
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeAlias, TypeVar

from prefixstore.tiers.redis.batch import BatchReply, CommandBatch
from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.redis.records import (
    MAGIC,
    MANIFEST,
    MANIFEST_BYTES,
    MANIFEST_RANGE,
    WRITE_ID_BYTES,
    renewals,
)

T = TypeVar("T")


class Unsettled:
    """What is not known of a record after its one command."""


UNSETTLED: Final = Unsettled()
Settled: TypeAlias = "T | Unsettled"


class Bulk(ABC, Generic[T]):
    """One command for each of a call's records."""

    @abstractmethod
    def add(self, batch: CommandBatch, index: int, key: bytes) -> int:
        """Add the command for a record; where its reply will be."""

    @abstractmethod
    def settle(self, indices: Sequence[int], replies: Sequence[BatchReply]) -> list[Settled[T]]:
        """What each record's reply means. Those that are errors are the caller's."""


class _Manifests:
    """Where the manifests of many records are read to, and what they say."""

    def __init__(self, num_records: int) -> None:
        self._bytes = memoryview(bytearray(num_records * MANIFEST_BYTES))

    def head(self, index: int) -> memoryview:
        return self._bytes[index * MANIFEST_BYTES : (index + 1) * MANIFEST_BYTES]

    def single_bytes(self, index: int) -> int:
        """The length of a record that has one part; -1 for all others."""
        magic, num_parts, record_bytes, part_bytes, _ = MANIFEST.unpack_from(
            self._bytes, index * MANIFEST_BYTES
        )
        is_single = magic == MAGIC and num_parts == 1 and 0 < part_bytes >= record_bytes
        return record_bytes if is_single else -1

    def is_missing(self, index: int) -> bool:
        """Whether nothing was read."""
        return not any(self.head(index))


class BulkReads(Bulk["int | None"]):
    """Whole records, each into its buffer, if they have one part.

    Args:
        outs: A buffer for each record of the call.
        config: The tier's.
        is_due: Whether a hit begins the time of that key anew.
    """

    def __init__(
        self,
        outs: Sequence[memoryview],
        config: RedisTierConfig,
        is_due: Callable[[bytes], bool],
    ) -> None:
        self._outs = outs
        self._config = config
        self._is_due = is_due
        self._manifests = _Manifests(len(outs))

    def add(self, batch: CommandBatch, index: int, key: bytes) -> int:
        out = self._outs[index]
        where = batch.add((b"GET", key), (self._manifests.head(index), out), len(out))
        self._renew(batch, key)
        return where

    def settle(
        self, indices: Sequence[int], replies: Sequence[BatchReply]
    ) -> list[Settled[int | None]]:
        settled: list[Settled[int | None]] = []
        for index, reply in zip(indices, replies, strict=True):
            if reply is None:
                settled.append(None)
                continue
            length = self._manifests.single_bytes(index)
            is_whole = reply == MANIFEST_BYTES + length and 0 <= length <= len(self._outs[index])
            settled.append(length if is_whole else UNSETTLED)
        return settled

    def _renew(self, batch: CommandBatch, key: bytes) -> None:
        if self._is_due(key):
            for command in renewals([key], self._config, renews=True):
                batch.add(command.args)


class BulkRanges(BulkReads):
    """Bytes of records from an offset on, if they have one part: the manifest and the bytes in one
    round trip.

    Args:
        outs: A buffer for each record of the call.
        offsets: Where in its record each begins.
        config: The tier's.
        is_due: As in `BulkReads`.
    """

    def __init__(
        self,
        outs: Sequence[memoryview],
        offsets: Sequence[int],
        config: RedisTierConfig,
        is_due: Callable[[bytes], bool],
    ) -> None:
        super().__init__(outs, config, is_due)
        self._offsets = offsets

    def add(self, batch: CommandBatch, index: int, key: bytes) -> int:
        out, begin = self._outs[index], MANIFEST_BYTES + self._offsets[index]
        batch.add((b"GETRANGE", key, *MANIFEST_RANGE), (self._manifests.head(index),))
        words = (b"GETRANGE", key, b"%d" % begin, b"%d" % (begin + len(out) - 1))
        where = batch.add(words, (out,), len(out))
        self._renew(batch, key)
        return where

    def settle(
        self, indices: Sequence[int], replies: Sequence[BatchReply]
    ) -> list[Settled[int | None]]:
        settled: list[Settled[int | None]] = []
        for index, reply in zip(indices, replies, strict=True):
            length = self._manifests.single_bytes(index)
            wanted = min(length - self._offsets[index], len(self._outs[index]))
            if length >= 0 and reply == wanted:
                settled.append(wanted)
            elif reply == 0 and self._manifests.is_missing(index):
                settled.append(None)
            else:
                settled.append(UNSETTLED)
        return settled


class BulkLooks(Bulk[bool]):
    """Whether records are there, for those that have one part.

    Args:
        num_records: Of the call.
    """

    def __init__(self, num_records: int) -> None:
        self._manifests = _Manifests(num_records)

    def add(self, batch: CommandBatch, index: int, key: bytes) -> int:
        return batch.add((b"GETRANGE", key, *MANIFEST_RANGE), (self._manifests.head(index),))

    def settle(self, indices: Sequence[int], replies: Sequence[BatchReply]) -> list[Settled[bool]]:
        settled: list[Settled[bool]] = []
        for index, reply in zip(indices, replies, strict=True):
            is_there = reply == MANIFEST_BYTES and self._manifests.single_bytes(index) >= 0
            settled.append(True if is_there else False if reply == 0 else UNSETTLED)
        return settled


class BulkWrites(Bulk[bool]):
    """Records of one part that are not there yet.

    Args:
        records: Of the call, none longer than a part.
        config: The tier's.
        keys: To be filled in with each record's key.
    """

    def __init__(
        self, records: Sequence[memoryview], config: RedisTierConfig, keys: dict[int, bytes]
    ) -> None:
        self.known: set[int] = set()  # of which something was there
        self._keys = keys
        self._records = records
        self._options = (b"EX", b"%d" % config.ttl_s, b"NX")
        self._write_ids = secrets.token_bytes(WRITE_ID_BYTES * len(records))

    def add(self, batch: CommandBatch, index: int, key: bytes) -> int:
        self._keys[index] = key
        record = self._records[index]
        begin = index * WRITE_ID_BYTES
        write_id = self._write_ids[begin : begin + WRITE_ID_BYTES]
        head = MANIFEST.pack(MAGIC, 1, len(record), max(1, len(record)), write_id)
        return batch.add((b"SET", key, (head, record), *self._options), None, len(record))

    def settle(self, indices: Sequence[int], replies: Sequence[BatchReply]) -> list[Settled[bool]]:
        self.known.update(i for i, reply in zip(indices, replies, strict=True) if reply is None)
        return [True if reply == b"OK" else UNSETTLED for reply in replies]
