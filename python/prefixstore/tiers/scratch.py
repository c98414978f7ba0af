"""Buffers in which a tier holds records on their way, each thread's own and used again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from prefixstore.tiers.pages import PAGE_BYTES, page_aligned, round_up

BATCH_BYTES = 16 << 20  # that are held at a time, in each thread


class Scratch(threading.local):
    """Buffers of each thread."""

    def __init__(self) -> None:
        self._slab = page_aligned(0)

    def rows(self, sizes: Sequence[int]) -> list[memoryview]:
        """A buffer of each size, on a page of its own, until the next call."""
        ends = np.cumsum([round_up(size, PAGE_BYTES) for size in sizes]).tolist()
        num_bytes = ends[-1] if ends else 0
        slab = self._slab
        if slab.nbytes < num_bytes:
            slab = page_aligned(num_bytes)
            if num_bytes <= BATCH_BYTES:
                self._slab = slab
        starts = [0, *ends[:-1]]
        return [slab[start : start + size].data for start, size in zip(starts, sizes, strict=False)]


def batches_of(sizes: Sequence[int]) -> Iterator[range]:
    """Indices that follow each other, as many as fit a batch; at least one."""
    first, num_bytes = 0, 0
    for i, size in enumerate(sizes):
        padded = round_up(size, PAGE_BYTES)
        if i > first and num_bytes + padded > BATCH_BYTES:
            yield range(first, i)
            first, num_bytes = i, 0
        num_bytes += padded
    if first < len(sizes):
        yield range(first, len(sizes))
