"""What is done to many records with one command for each, while all goes well.

A record that this does not settle, because it has more parts, is not what it should be, or another
server has it, goes on as an operation of its own (see records.py).
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Generic, TypeAlias, TypeVar

from prefixstore.tiers.pages import flat_bytes
from prefixstore.tiers.redis.batch import BatchCommand, BatchReply
from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.redis.records import (
    MAGIC,
    MANIFEST,
    MANIFEST_BYTES,
    MANIFEST_RANGE,
    MAX_STORED_BYTES,
    WRITE_ID_BYTES,
    renewals,
)

T = TypeVar("T")


class Unsettled:
    """What is not known of a record after its one command."""


UNSETTLED: Final = Unsettled()
Settled: TypeAlias = "T | Unsettled"


class Bulk(ABC, Generic[T]):
    """One command for each of a call's records.

    Attributes:
        num_bytes: That they move, about.
    """

    num_bytes = 0

    @abstractmethod
    def commands(self, keys: Mapping[int, bytes]) -> list[BatchCommand]:
        """A command for each of some records, given its key by its index in the call; then others,
        whose replies nobody waits for.
        """

    @abstractmethod
    def settle(self, indices: Iterable[int], replies: Sequence[BatchReply]) -> list[Settled[T]]:
        """What each record's reply means. Those that are errors are the caller's."""


class _Manifests:
    """Where the manifests of many records are read to, and what they say."""

    def __init__(self, num_records: int) -> None:
        self._bytes = memoryview(bytearray(num_records * MANIFEST_BYTES))

    def head(self, index: int) -> memoryview:
        return self._bytes[index * MANIFEST_BYTES : (index + 1) * MANIFEST_BYTES]

    def commands(self, keys: Mapping[int, bytes]) -> list[BatchCommand]:
        """What reads them."""
        return [
            ((b"GETRANGE", key, *MANIFEST_RANGE), (self.head(i),), 0) for i, key in keys.items()
        ]

    def single_bytes(self, index: int) -> int:
        """The length of a record that has one part; -1 for all others."""
        magic, num_parts, record_bytes, part_bytes, _ = MANIFEST.unpack_from(
            self._bytes, index * MANIFEST_BYTES
        )
        is_single = magic == MAGIC and num_parts == 1 and 0 < part_bytes >= record_bytes
        is_single = is_single and record_bytes <= MAX_STORED_BYTES
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
        self.num_bytes = sum(map(len, outs))
        self._outs = outs
        self._config = config
        self._is_due = is_due
        self._manifests = _Manifests(len(outs))

    def commands(self, keys: Mapping[int, bytes]) -> list[BatchCommand]:
        outs, head = self._outs, self._manifests.head
        reads: list[BatchCommand] = [
            ((b"GET", key), (head(i), outs[i]), len(outs[i])) for i, key in keys.items()
        ]
        return reads + self._renewals(keys.values())

    def settle(
        self, indices: Iterable[int], replies: Sequence[BatchReply]
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

    def _renewals(self, keys: Iterable[bytes]) -> list[BatchCommand]:
        due = [key for key in keys if self._is_due(key)]
        return [(command.args, None, 0) for command in renewals(due, self._config, renews=True)]


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

    def commands(self, keys: Mapping[int, bytes]) -> list[BatchCommand]:
        reads: list[BatchCommand] = []
        for i, key in keys.items():
            out, begin = self._outs[i], MANIFEST_BYTES + self._offsets[i]
            words = (b"GETRANGE", key, b"%d" % begin, b"%d" % (begin + len(out) - 1))
            reads.append((words, (out,), len(out)))
        return reads + self._manifests.commands(keys) + self._renewals(keys.values())

    def settle(
        self, indices: Iterable[int], replies: Sequence[BatchReply]
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

    def commands(self, keys: Mapping[int, bytes]) -> list[BatchCommand]:
        return self._manifests.commands(keys)

    def settle(self, indices: Iterable[int], replies: Sequence[BatchReply]) -> list[Settled[bool]]:
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
        self.num_bytes = sum([record.nbytes for record in records])
        self.known: set[int] = set()  # of which something was there
        self._keys = keys
        self._records = records
        self._options = (b"EX", b"%d" % config.ttl_s, b"NX")

    def commands(self, keys: Mapping[int, bytes]) -> list[BatchCommand]:
        self._keys.update(keys)
        records, options = self._records, self._options
        write_ids = secrets.token_bytes(WRITE_ID_BYTES * len(keys))
        starts: dict[int, bytes] = {}  # of manifests, by the record's length
        writes: list[BatchCommand] = []
        begins = range(0, len(write_ids), WRITE_ID_BYTES)
        for (i, key), begin in zip(keys.items(), begins, strict=True):
            record = flat_bytes(records[i])
            num_bytes = len(record)
            start = starts.get(num_bytes)
            if start is None:
                start = starts[num_bytes] = MANIFEST.pack(
                    MAGIC, 1, num_bytes, num_bytes or 1, bytes(WRITE_ID_BYTES)
                )[:-WRITE_ID_BYTES]
            head = start + write_ids[begin : begin + WRITE_ID_BYTES]
            writes.append(((b"SET", key, (head, record), *options), None, num_bytes))
        return writes

    def settle(self, indices: Iterable[int], replies: Sequence[BatchReply]) -> list[Settled[bool]]:
        self.known.update(i for i, reply in zip(indices, replies, strict=True) if reply is None)
        return [True if reply == b"OK" else UNSETTLED for reply in replies]
