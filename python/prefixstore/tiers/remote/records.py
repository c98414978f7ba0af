"""What is done with a record in an object store: one request of each kind.

{root}/{identity}/{first two digits of the hash}/{hash}.kvb      in hex
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefixstore.block_key import RecordName
from prefixstore.errors import BlockCorrupted
from prefixstore.record_header import FIXED_BYTES
from prefixstore.tiers.base import Held, ReadOutcome
from prefixstore.tiers.remote.objects import DELETE_BATCH, ObjectInfo, Objects
from prefixstore.tiers.remote.requests import HandOver, Request

NAME = re.compile(r"[0-9a-f]{32}/([0-9a-f]{2})/\1[0-9a-f]{30}\.kvb")
_MAX_PROBLEMS = 100  # reported one by one; more are only counted


@dataclass(frozen=True)
class Records:
    """The records of a tier among the objects of a store."""

    tier_name: str
    objects: Objects
    root: str
    ttl_s: float | None

    def path(self, name: RecordName) -> str:
        """Where a record lies in the store."""
        digits = name.block_hash.hex()
        return f"{self.folder(name.identity)}/{digits[:2]}/{digits}.kvb"

    def folder(self, identity: bytes) -> str:
        """Where all records of an identity lie."""
        return f"{self.root}/{identity.hex()}"

    def is_expired(self, info: ObjectInfo) -> bool:
        """Whether its time to live is over."""
        return self.ttl_s is not None and time.time() - info.modified.timestamp() >= self.ttl_s

    async def find(self, path: str) -> ObjectInfo | None:
        """What there is under a name and has not expired."""
        info = await self.objects.head(path)
        return None if info is None or self.is_expired(info) else info


class ReadRecord(Request[ReadOutcome]):
    """A record, or from `start` on as much of it as `out` holds."""

    def __init__(
        self, records: Records, name: RecordName, out: memoryview, start: int | None
    ) -> None:
        self.num_bytes = out.nbytes
        self._records = records
        self._path = records.path(name)
        self._out = out
        self._start = start
        self._num_handed_over = self._num_taken = 0
        self.is_expired = False

    async def run(self, hand_over: HandOver) -> ReadOutcome:
        start, room = self._start, self._out.nbytes
        if start is not None and room == 0:  # HTTP has no range of zero bytes
            return None if await self._records.find(self._path) is None else 0

        def hand_on(piece: Any) -> None:
            self._num_handed_over += len(piece)
            if self._num_handed_over <= room:
                hand_over(piece)

        part = None if start is None else (start, start + room)
        info = await self._records.objects.get(self._path, part, self._wants, hand_on)
        if info is None or self.is_expired:
            return None
        found = max(info.num_bytes, self._num_handed_over) if part is None else 0
        if found > room:
            return BlockCorrupted(
                f"{self._records.tier_name}: expected a record of at most {room} bytes, got {found}"
            )
        return self._num_handed_over

    def take(self, piece: Any) -> None:
        end = self._num_taken + len(piece)
        self._out[self._num_taken : end] = piece
        self._num_taken = end

    def _wants(self, info: ObjectInfo) -> bool:
        self.is_expired = self._records.is_expired(info)
        is_too_long = self._start is None and info.num_bytes > self._out.nbytes
        return not self.is_expired and not is_too_long


class WriteRecord(Request[bool]):
    """Keeps a record; its outcome is False where the store had it."""

    def __init__(self, records: Records, name: RecordName, record: memoryview) -> None:
        self.num_bytes = record.nbytes
        self._records = records
        self._path = records.path(name)
        self._record = record
        self._copy = b""

    def begin(self) -> None:
        # A copy: the client goes on reading what it sends for a while even after it was stopped,
        # when the caller may already use its memory for something else.
        self._copy = bytes(self._record)

    async def run(self, hand_over: HandOver) -> bool:
        objects, data, self._copy = self._records.objects, self._copy, b""
        if objects.takes_in_parts(len(data)):  # multipart uploads cannot be conditional on absence
            if await self._records.find(self._path) is not None:
                return False
        elif await objects.create(self._path, data):
            return True
        elif self._records.ttl_s is None or await self._records.find(self._path) is not None:
            return False
        await objects.overwrite(self._path, data)
        return True


class FindRecord(Request[bool]):
    """Whether there is such a record."""

    def __init__(self, records: Records, name: RecordName) -> None:
        self._records = records
        self._path = records.path(name)

    async def run(self, hand_over: HandOver) -> bool:
        return await self._records.find(self._path) is not None


class DeleteRecord(FindRecord):
    """Deletes a record; its outcome is False where there was none."""

    async def run(self, hand_over: HandOver) -> bool:
        was_there = await super().run(hand_over)
        if was_there:
            await self._records.objects.delete([self._path])
        return was_there


class Survey(Request[int]):
    """Lists all below a folder and deletes what it is told to; its outcome is how many.

    Attributes:
        problems: Of names and lengths, in words.
        deleted_bytes: Of the objects that were deleted.
        held: Records that are still there, by identity.
    """

    def __init__(
        self, records: Records, folder: str, deletes: Callable[[ObjectInfo], bool]
    ) -> None:
        self._records = records
        self._folder = folder
        self._deletes = deletes
        self.problems: list[str] = []
        self.held: dict[bytes, Held] = {}
        self.deleted_bytes = 0
        self._num_problems = self._num_deleted = 0

    async def run(self, hand_over: HandOver) -> int:
        doomed: list[str] = []
        async for batch in self._records.objects.list(self._folder):
            doomed += [info.path for info in batch if self._look_at(info)]
            if len(doomed) >= DELETE_BATCH:
                await self._delete(doomed)
        await self._delete(doomed)
        if self._num_problems > _MAX_PROBLEMS:
            self.problems.append(f"{self._records.tier_name}: {self._num_problems} such in all")
        return self._num_deleted

    def _look_at(self, info: ObjectInfo) -> bool:
        """Whether to delete this one."""
        name = info.path.removeprefix(f"{self._records.root}/")
        if not NAME.fullmatch(name):
            self._tell(f"{info.path}: expected the name of a record")
            return False  # not ours to delete
        if is_too_short(info):
            least = f"at least {FIXED_BYTES} bytes"
            self._tell(f"{info.path}: expected {least}, got {info.num_bytes}")
        if self._deletes(info):
            self.deleted_bytes += info.num_bytes
            return True
        identity = bytes.fromhex(name[:32])
        held = self.held.get(identity, Held(0, 0))
        self.held[identity] = Held(held.num_records + 1, held.num_bytes + info.num_bytes)
        return False

    def _tell(self, problem: str) -> None:
        self._num_problems += 1
        if self._num_problems <= _MAX_PROBLEMS:
            self.problems.append(f"{self._records.tier_name}: {problem}")

    async def _delete(self, doomed: list[str]) -> None:
        while doomed:
            batch = doomed[:DELETE_BATCH]
            await self._records.objects.delete(batch)
            self._num_deleted += len(batch)
            del doomed[:DELETE_BATCH]


def is_too_short(info: ObjectInfo) -> bool:
    """Whether an object is no whole record for sure: it would not hold a header."""
    return info.num_bytes < FIXED_BYTES
