"""Room in the file system that payload files lie in: taking it ahead, and leaving some.

    | records | records | ...            | kept for the index |
                                         payload takes no more

A record that was written is shown by a transaction of the index, and that takes room as well. On a
disk that payload has filled to its last byte no transaction is possible: nothing that was just
written could be shown, nothing deleted, and the tier not even be opened.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from prefixstore.tiers.pages import PAGE_BYTES, round_up

logger = logging.getLogger(__name__)

# Room that must stay for the index. SQLite's log takes 4 MB, or more in a long transaction; the
# index may grow by as much when the log starts over; and other processes may have seen the same
# free space and write a job each.
_INDEX_BYTES = 16 << 20
_SMALLEST_INDEX_PART = 8  # on a small file system an eighth of it
_LOG_PAGES = 1000  # SQLite's own choice
_RESERVED_AT_ONCE = 16 << 20


def reserve(fd: int, start: int, end: int, file_end: int) -> None:
    """Give a file its next blocks at once, where there is ample room.

    Direct writes that grow a file, or fill its holes, wait for each other: measured on ext4, four
    threads that write a megabyte at a time get half as far. Where it cannot be done the file grows
    as it is written, as far as there is room.

    Args:
        fd: The file.
        start: Its length.
        end: Where the next write ends.
        file_end: How long it will ever be.
    """
    end = min(round_up(end, _RESERVED_AT_ONCE), file_end)
    if room_bytes(fd) < end - start:
        return
    try:
        os.posix_fallocate(fd, start, end - start)
    except OSError as error:
        logger.info("%d bytes of a slab: not reserved: %s", end - start, error.strerror)


def needs_room(fd: int, start: int, end: int) -> bool:
    """Whether writing there takes blocks that the file does not have."""
    status = os.fstat(fd)
    if end <= status.st_size <= status.st_blocks * 512:
        return False
    return start >= status.st_size or os.lseek(fd, start, os.SEEK_HOLE) < end


def room_bytes(fd: int) -> int:
    """What payload may take of the file system's room; negative where the index has too little."""
    file_system = os.fstatvfs(fd)
    return file_system.f_bavail * file_system.f_frsize - _kept_bytes(file_system)


def log_pages(directory: Path) -> int:
    """After how many pages the log of an index in this directory should start over."""
    return min(_LOG_PAGES, _kept_bytes(os.statvfs(directory)) // (4 * PAGE_BYTES))


def is_small(directory: Path) -> bool:
    """Whether less is kept for the index than it is meant to have."""
    return _kept_bytes(os.statvfs(directory)) < _INDEX_BYTES


def _kept_bytes(file_system: os.statvfs_result) -> int:
    size = file_system.f_blocks * file_system.f_frsize
    return min(_INDEX_BYTES, size // _SMALLEST_INDEX_PART)
