"""Payload files of the disk tier: slots of equal, page-aligned size, one after the other.

    slab-v1-000007-1478656x45.kvb     slab 7, version 1: 45 slots of 1,478,656 bytes
    | slot 0: record, rest unused | slot 1 | slot 2 | ...

A slot holds a record from its first byte, so the files describe themselves: what a slot holds can
be read from the record's own header when the index is lost (headers.py). The name carries all else;
a file may end before its last slot.

Files are opened with O_DIRECT, past the page cache, where the file system takes that. The cache
would cost a copy and, while it writes back, most of the disk's speed; and the kernel keeps both
ways coherent, so that processes may mix them: a direct read first writes back what the cache has
of these pages, a direct write drops them from it.

They are looked up in the directory as it was opened, not by its path: who has the tier open while
somebody replaces the directory must not write into the files of those who open the new one.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prefixstore.errors import TierError, TierFull, TierUnavailable
from prefixstore.tiers.disk.space import needs_room, reserve, room_bytes
from prefixstore.tiers.pages import PAGE_BYTES

logger = logging.getLogger(__name__)

VERSION = 1
_NAME = re.compile(r"slab-v(\d+)-(.*)")
_NAME_V1 = re.compile(r"(\d+)-(\d+)x(\d+)\.kvb")
_MAX_OPEN_FILES = 128
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Slab:
    """One payload file."""

    slab_id: int
    slot_bytes: int
    num_slots: int

    @property
    def num_bytes(self) -> int:
        """Bytes of its file once all slots were written."""
        return self.slot_bytes * self.num_slots

    @property
    def file_name(self) -> str:
        """Without the folder; it tells number and shape, so that the index can be rebuilt."""
        return f"slab-v{VERSION}-{self.slab_id:06d}-{self.slot_bytes}x{self.num_slots}.kvb"


class OpenFile:
    """A descriptor closed when its last user lets go, never under a reader or writer."""

    def __init__(self, path: Path | str, flags: int, directory: OpenFile | None = None) -> None:
        self.fd = -1
        self.fd = os.open(path, flags, 0o644, dir_fd=directory.fd if directory else None)
        self.is_direct = bool(flags & os.O_DIRECT)

    @property
    def is_removed(self) -> bool:
        """Whether no directory names it any more."""
        return os.fstat(self.fd).st_nlink == 0

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class SlabFiles:
    """Reads and writes bytes of slabs; knows nothing of which are in use. Thread-safe.

    Args:
        directory: Where they lie.
        tier_name: For messages.
        io: "direct" for O_DIRECT, "buffered" for the page cache, "auto" for the former until the
            file system refuses it.

    Raises:
        TierUnavailable: If the directory cannot be opened; and by any call after `close`.
    """

    def __init__(self, directory: Path, tier_name: str, io: str) -> None:
        self._path = directory
        self._tier_name = tier_name
        try:
            self._directory: OpenFile | None = OpenFile(directory, _DIRECTORY)
        except OSError as error:
            raise TierUnavailable(f"{tier_name}: {directory}: {error.strerror}") from error
        self._is_direct = io != "buffered"
        self._may_fall_back = io == "auto"
        self._open_files: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        # Held while a file grows: two threads must not count on the same free space.
        self._growing = threading.Lock()

    @property
    def is_direct(self) -> bool:
        """Whether offsets, memory and lengths have to be whole pages."""
        return self._is_direct

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

    def read(self, slab: Slab, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers, one after the other; fewer bytes where the file is missing or ends."""

        def read_all(file: OpenFile) -> int:
            num_read, rest = 0, buffers
            while rest:
                n = os.preadv(file.fd, rest, offset + num_read)
                num_read += n
                # a direct read of an odd length has reached the end of the file
                if n == 0 or (file.is_direct and n % PAGE_BYTES):
                    break
                rest = _after(rest, n)
            return num_read

        try:
            return self._with_file(slab, os.O_RDWR, read_all)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self._translated(error, slab) from error

    def write(self, slab: Slab, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers, one after the other, making the file where there is none.

        Raises:
            TierFull: If the file system has no room, but for what the index may need.
            TierUnavailable: If the file cannot be written, or was removed while open.
        """

        def write_all(file: OpenFile) -> int:
            status = os.fstat(file.fd)
            if status.st_nlink == 0:
                self.let_go_of(slab)  # the next write makes it anew, if the directory is there
                raise TierUnavailable(
                    f"{self._tier_name}: {self._path / slab.file_name}: expected the file to"
                    " stay while the tier is open, got one that was removed"
                )
            end = offset + sum(buffer.nbytes for buffer in buffers)
            if file.is_direct and end > status.st_size:
                reserve(file.fd, status.st_size, end, slab.num_bytes)
            if not needs_room(file.fd, offset, end):
                return _write_all(file.fd, offset, buffers)
            with self._growing:
                if (room := room_bytes(file.fd)) < end - offset:
                    raise TierFull(
                        f"{self._tier_name}: {self._path / slab.file_name}: expected room for"
                        f" {end - offset} bytes on the file system, got {max(room, 0)} beside what"
                        " is kept for the index"
                    )
                return _write_all(file.fd, offset, buffers)

        try:
            self._with_file(slab, os.O_RDWR | os.O_CREAT, write_all)
        except OSError as error:
            raise self._translated(error, slab) from error

    def open_to_read(self, slab: Slab) -> OpenFile:
        """The slab's file, for whoever makes the calls himself.

        Raises:
            OSError: `read` tells what it means.
        """
        return self._open(slab, os.O_RDWR)

    def remove(self, slab: Slab) -> None:
        """Delete the file, if it is there."""
        self.let_go_of(slab)
        try:
            with suppress(FileNotFoundError):
                os.unlink(slab.file_name, dir_fd=self._opened().fd)
        except OSError as error:
            raise self._translated(error, slab) from error

    def let_go_of(self, slab: Slab) -> None:
        """Close the file as soon as nobody is reading or writing it."""
        with self._lock:
            self._open_files.pop(slab.slab_id, None)

    def num_bytes(self, slab: Slab) -> int | None:
        """Length of the file; None where there is none."""
        status = self._status(slab)
        return None if status is None else status.st_size

    def modified_ns(self, slab: Slab) -> int:
        """When the file was last written, by the wall clock; 0 where it is missing."""
        status = self._status(slab)
        return status.st_mtime_ns if status else 0

    def close(self) -> None:
        """Forget what is open; what is being used closes when that ends."""
        with self._lock:
            self._open_files.clear()
            self._directory = None

    def _status(self, slab: Slab) -> os.stat_result | None:
        try:
            return os.stat(slab.file_name, dir_fd=self._opened().fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._translated(error, slab) from error

    def _names(self) -> list[str]:
        try:
            # one of its own: a descriptor keeps the place that a listing has come to
            listed = OpenFile(".", _DIRECTORY, self._opened())
            if listed.is_removed:  # it was removed, and would seem to be empty
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return [entry.name for entry in os.scandir(listed.fd)]
        except OSError as error:
            raise TierUnavailable(f"{self._tier_name}: {self._path}: {error.strerror}") from error

    def _opened(self) -> OpenFile:
        directory = self._directory
        if directory is None:
            raise TierUnavailable(f"{self._tier_name}: expected an open tier, got a closed one")
        return directory

    def _with_file(self, slab: Slab, flags: int, transfer: Callable[[OpenFile], int]) -> int:
        """Transfer directly, or through the page cache where the file system refuses."""
        while True:
            is_direct = self._is_direct
            try:
                return transfer(self._open(slab, flags))
            except OSError as error:
                if error.errno != errno.EINVAL or not (is_direct and self._may_fall_back):
                    raise
                self._fall_back(error)

    def _fall_back(self, error: OSError) -> None:
        with self._lock:
            if self._is_direct:
                self._is_direct = False
                self._open_files.clear()
                logger.warning(
                    "%s: %s: no direct transfers here, going through the page cache: %s",
                    self._tier_name,
                    self._path,
                    error.strerror,
                )

    def _open(self, slab: Slab, flags: int) -> OpenFile:
        with self._lock:
            file = self._open_files.get(slab.slab_id)
            # Another process may have made a removed file anew: the old one tells nothing of it.
            if file is None or file.is_removed:
                self._let_go_of_removed()
                flags |= os.O_DIRECT if self._is_direct else 0
                file = OpenFile(slab.file_name, flags, self._opened())
                self._open_files[slab.slab_id] = file
            self._open_files.move_to_end(slab.slab_id)
            if len(self._open_files) > _MAX_OPEN_FILES:
                self._open_files.popitem(last=False)
            return file

    def _let_go_of_removed(self) -> None:
        """Close files that were removed: they hold disk space until then."""
        for slab_id, file in list(self._open_files.items()):
            if file.is_removed:
                del self._open_files[slab_id]

    def _translated(self, error: OSError, slab: Slab) -> TierError:
        kind = TierFull if error.errno in _NO_ROOM else TierUnavailable
        return kind(f"{self._tier_name}: {self._path / slab.file_name}: {error.strerror}")


def _after(buffers: Sequence[memoryview], num_bytes: int) -> Sequence[memoryview]:
    """What remains of the buffers behind so many bytes."""
    for number, buffer in enumerate(buffers):
        if num_bytes < buffer.nbytes:
            return [buffer[num_bytes:], *buffers[number + 1 :]]
        num_bytes -= buffer.nbytes
    return []


def _write_all(fd: int, offset: int, buffers: Sequence[memoryview]) -> int:
    num_written, rest = 0, buffers
    while rest:
        n = os.pwritev(fd, rest, offset + num_written)
        num_written += n
        rest = _after(rest, n)
    return num_written
