"""Memory in whole pages, which disks and devices read and write without a copy."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

PAGE_BYTES = 4096
LARGE_PAGE_BYTES = 2 << 20


def page_aligned(num_bytes: int) -> np.ndarray:
    """An array of zeros, uint8, that starts on a page, so that copies and devices may stream.

    A large one lies in large pages where the system has them: a disk that writes straight to it is
    then given few long pieces in place of many short ones, and reads up to twice as fast.
    """
    if num_bytes == 0:
        return np.empty(0, np.uint8)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if num_bytes < LARGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.frombuffer(mmap.mmap(-1, num_bytes, flags=private), np.uint8)
    memory = mmap.mmap(-1, num_bytes + LARGE_PAGE_BYTES, flags=private)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    start = -array.ctypes.data % LARGE_PAGE_BYTES
    return array[start : start + num_bytes]


def flat_bytes(buffer: memoryview) -> memoryview:
    """The same memory, a byte at a time; most lies like that already, and a cast takes longer."""
    view = memoryview(buffer)
    is_flat = view.ndim == 1 and view.format == "B" and view.contiguous
    return view if is_flat else view.cast("B")


def round_up(num_bytes: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `num_bytes`."""
    return -(-num_bytes // unit) * unit
