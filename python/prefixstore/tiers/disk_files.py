"""Payload files of the disk tier: slots of equal, page-aligned size, one after the other.

    slab-v1-000007-1478656x45.kvb     slab 7, version 1: 45 slots of 1,478,656 bytes
    | slot 0: record, rest unused | slot 1 | slot 2 | ...

A slot holds a record from its first byte, so the files describe themselves: what a slot holds can
be read from the record's own header when the index is lost. The name carries all else; a file may
end before its last slot.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from prefixstore.block_key import BlockHash
from prefixstore.errors import BlockCorrupted, TierError, TierFull, TierUnavailable
from prefixstore.record_header import read_fixed
from prefixstore.tiers.base import PAGE_BYTES

VERSION = 1
_NAME = re.compile(r"slab-v(\d+)-(.*)")
_NAME_V1 = re.compile(r"(\d+)-(\d+)x(\d+)\.kvb")
_MAX_OPEN_FILES = 128
_HEADER_READ_BYTES = 64 << 10  # no header is longer
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Slab:
    """One payload file."""

    slab_id: int
    slot_bytes: int
    num_slots: int

    @property
    def num_bytes(self) -> int:
        return self.slot_bytes * self.num_slots

    @property
    def file_name(self) -> str:
        return f"slab-v{VERSION}-{self.slab_id:06d}-{self.slot_bytes}x{self.num_slots}.kvb"


@dataclass(frozen=True)
class FoundRecord:
    """A record whose header was read back from a slot."""

    slot: int
    block_hash: BlockHash
    record_bytes: int


class _OpenFile:
    """A descriptor closed when its last user lets go, never under a reader or writer."""

    def __init__(self, path: Path, flags: int) -> None:
        self.fd = -1
        self.fd = os.open(path, flags, 0o644)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class SlabFiles:
    """Reads and writes slots; knows nothing of which are in use. Thread-safe."""

    def __init__(self, directory: Path, tier_name: str) -> None:
        self._directory = directory
        self._tier_name = tier_name
        self._open_files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def list_slabs(self) -> list[Slab]:
        """All slabs there are.

        Raises:
            TierUnavailable: If the directory cannot be read, or holds a slab of another version:
                it belongs to a newer program and is left alone.
        """
        slabs = []
        for file_name in sorted(self._names()):
            match = _NAME.fullmatch(file_name)
            if match is None:
                continue
            if int(match[1]) != VERSION:
                raise TierUnavailable(
                    f"{self._tier_name}: {file_name}: expected format version {VERSION}, got"
                    f" {match[1]}; open it with the program that wrote it, or use another path"
                )
            if (fields := _NAME_V1.fullmatch(match[2])) is not None:
                slab = Slab(*(int(field) for field in fields.groups()))
                if slab.file_name == file_name and slab.slot_bytes and slab.num_slots:
                    slabs.append(slab)
        return slabs

    def read(self, slab: Slab, slot: int, out: memoryview) -> int:
        """Fill `out` from the slot's start; fewer bytes where the file is missing or ends."""
        try:
            file = self._open(slab, os.O_RDWR)
            num_read = 0
            while num_read < out.nbytes:
                n = os.preadv(file.fd, [out[num_read:]], slot * slab.slot_bytes + num_read)
                if n == 0:
                    break
                num_read += n
            return num_read
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self._translated(error, slab) from error

    def write(self, slab: Slab, slot: int, record: memoryview) -> None:
        """Write all of `record` to the slot's start, straight from the caller's buffer.

        Raises:
            TierFull: If the file system has no room.
            TierUnavailable: If the file cannot be written, or was removed while open.
        """
        try:
            file = self._open(slab, os.O_RDWR | os.O_CREAT)
            if os.fstat(file.fd).st_nlink == 0:
                raise TierUnavailable(
                    f"{self._tier_name}: {self._directory / slab.file_name}: expected the file to"
                    " stay while the tier is open, got one that was removed"
                )
            num_written = 0
            while num_written < record.nbytes:
                offset = slot * slab.slot_bytes + num_written
                num_written += os.pwritev(file.fd, [record[num_written:]], offset)
        except OSError as error:
            raise self._translated(error, slab) from error

    def wipe(self, slab: Slab, slot: int) -> None:
        """Overwrite a record's first page, so that a rebuilt index will not find it again."""
        if self.read(slab, slot, memoryview(bytearray(1))):
            self.write(slab, slot, memoryview(bytes(PAGE_BYTES)))

    def remove(self, slab: Slab) -> None:
        """Delete the file, if it is there."""
        with self._lock:
            self._open_files.pop(slab.slab_id, None)
        try:
            (self._directory / slab.file_name).unlink(missing_ok=True)
        except OSError as error:
            raise self._translated(error, slab) from error

    def find_record(self, slab: Slab, slot: int) -> FoundRecord | None:
        """The record that the slot's own header tells of, if it is whole."""
        buffer = memoryview(bytearray(min(slab.slot_bytes, _HEADER_READ_BYTES)))
        num_read = self.read(slab, slot, buffer)
        try:
            header = read_fixed(buffer[:num_read])
        except BlockCorrupted:
            return None
        record_bytes = header.record_bytes
        end = slot * slab.slot_bytes + record_bytes
        if record_bytes > slab.slot_bytes or end > self._file_bytes(slab):
            return None
        return FoundRecord(slot, BlockHash(header.block_hash), record_bytes)

    def modified_ns(self, slab: Slab) -> int:
        """When the file was last written; 0 where it is missing."""
        status = self._status(slab)
        return status.st_mtime_ns if status else 0

    def close(self) -> None:
        with self._lock:
            self._open_files.clear()

    def _file_bytes(self, slab: Slab) -> int:
        status = self._status(slab)
        return status.st_size if status else 0

    def _status(self, slab: Slab) -> os.stat_result | None:
        try:
            return (self._directory / slab.file_name).stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._translated(error, slab) from error

    def _names(self) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(self._directory)]
        except OSError as error:
            raise TierUnavailable(f"{self._tier_name}: {self._directory}: {error}") from error

    def _open(self, slab: Slab, flags: int) -> _OpenFile:
        with self._lock:
            file = self._open_files.get(slab.slab_id)
            if file is None:
                self._let_go_of_removed()
                file = _OpenFile(self._directory / slab.file_name, flags)
                self._open_files[slab.slab_id] = file
            self._open_files.move_to_end(slab.slab_id)
            if len(self._open_files) > _MAX_OPEN_FILES:
                self._open_files.popitem(last=False)
            return file

    def _let_go_of_removed(self) -> None:
        """Close files that another process removed: they hold disk space until then."""
        for slab_id, file in list(self._open_files.items()):
            if os.fstat(file.fd).st_nlink == 0:
                del self._open_files[slab_id]

    def _translated(self, error: OSError, slab: Slab) -> TierError:
        kind = TierFull if error.errno in _NO_ROOM else TierUnavailable
        return kind(f"{self._tier_name}: {self._directory / slab.file_name}: {error.strerror}")
