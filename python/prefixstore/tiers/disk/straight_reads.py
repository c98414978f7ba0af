"""Reads straight into the callers' memory whose system calls are the extension's.

The tier's threads need the interpreter to begin and to end only, and nobody runs Python between one
call and the next. Copying leaves nothing of that code in the processor's caches: of 3.5 ms that 16
MiB took out of the page cache, 0.4 passed between calls that were made from Python.

Only what goes well is done here. Whatever cannot go this way, or fails, is left to be read in the
general way, which tells what is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from prefixstore.tiers.disk.files import OpenFile, Slab, SlabFiles
from prefixstore.tiers.disk.job_threads import Batch
from prefixstore.tiers.disk.jobs import (
    Job,
    Part,
    Span,
    cut,
    share_bytes,
    shares_of,
    straight_buffers,
)
from prefixstore.tiers.pages import PAGE_BYTES, page_aligned

try:
    import _kvkernels
except ImportError:
    _kvkernels = None

# Reads from the page cache are copies: in pieces of this size threads share them evenly.
_COPIED_AT_ONCE = 1 << 20
_preadv_address = 0  # tests put the address of another function here; 0 for the system's preadv


class Call(NamedTuple):
    """A system call that reads."""

    slab: Slab
    parts: Sequence[Part]
    file: OpenFile
    buffers: Sequence[memoryview]
    last_pages: Sequence[memoryview] = ()  # for direct reads: the page that holds each part's end

    def shares(self, num_read: int) -> Sequence[int]:
        """Bytes of each part, which is whole in memory now as far as those go."""
        if self.last_pages:
            return shares_of(self.parts, self.last_pages, num_read)
        return (num_read,)


def plan_reads(files: SlabFiles, spans: Sequence[Span], num_threads: int) -> StraightReads | None:
    """Reads of the spans; None where they cannot all be made.

    Args:
        files: The slabs.
        spans: What is to be read.
        num_threads: That share the work.
    """
    if _kvkernels is None or not spans:
        return None
    try:
        if not files.is_direct:
            return StraightReads(_buffered_calls(files, spans), _COPIED_AT_ONCE)
        job_bytes = share_bytes(spans, num_threads)
        jobs = list(cut(spans, job_bytes))
        if all_on_pages([part for job in jobs for part in job.parts], in_memory=True):
            return StraightReads(_direct_calls(files, jobs), job_bytes)
    except OSError:  # the general way of reading meets the same error and reports it
        pass
    return None


def _direct_calls(files: SlabFiles, jobs: Sequence[Job]) -> Iterator[Call]:
    own = page_aligned(sum(len(job.parts) for job in jobs) * PAGE_BYTES).data
    for job in jobs:
        slab, parts = job.slab, job.parts
        buffers, pages = straight_buffers(parts, own)
        own = own[len(pages) * PAGE_BYTES :]
        yield Call(slab, parts, files.open_to_read(slab), buffers, pages)


def _buffered_calls(files: SlabFiles, spans: Sequence[Span]) -> Iterator[Call]:
    open_file = cache(files.open_to_read)  # many spans, few files
    for number, (slab, offset, data) in enumerate(spans):
        yield Call(slab, (Part(number, offset, data),), open_file(slab), (data,))


class StraightReads:
    """Reads that several threads can make.

    Args:
        calls: That make them.
        piece_bytes: A call that fills one buffer is made as several of so many bytes.
    """

    def __init__(self, calls: Iterable[Call], piece_bytes: int) -> None:
        self._calls = list(calls)
        reads = [
            (file.fd, parts[0].offset, buffers, PAGE_BYTES if file.is_direct else 1)
            for _, parts, file, buffers, _ in self._calls
        ]
        files = [call.file for call in self._calls]
        self._reads = _kvkernels.FileReads(reads, piece_bytes, files, _preadv_address)

    @property
    def batch(self) -> Batch:
        """What threads can help with; it keeps no memory once `finish` has ended but what is still
        being read into."""
        return self._reads

    def __len__(self) -> int:
        """How many can be made at once."""
        return len(self._reads)

    def finish(self, deadline: float | None) -> Iterable[tuple[Call, int | None]]:
        """Wait for all; without a deadline, make them meanwhile.

        After a deadline nothing more is begun. What is being read then may come later, into memory
        that is held until then; all other memory is let go of.

        Returns:
            The bytes that each call read; a negative number where it failed, None if it did not
            end in time.
        """
        if deadline is None:
            self._reads.run()
        else:
            self._reads.run_elsewhere(deadline - time.monotonic())
        return zip(self._calls, self._reads.outcomes(), strict=True)


def all_on_pages(parts: Sequence[Part], in_memory: bool) -> bool:
    """Whether all begin on pages of their files, and of memory if that is asked."""
    if any(part.offset % PAGE_BYTES for part in parts):
        return False
    return not in_memory or _begin_on_pages([part.data for part in parts])


def _begin_on_pages(buffers: list[memoryview]) -> bool:
    if _kvkernels is not None:
        return _kvkernels.all_begin_at_multiples(buffers, PAGE_BYTES)
    return not any(np.frombuffer(buffer, np.uint8).ctypes.data % PAGE_BYTES for buffer in buffers)
