"""Cuts what is moved between memory and slabs into jobs of a system call each: see transfers.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from prefixstore.errors import TierError
from prefixstore.tiers.disk.files import Slab
from prefixstore.tiers.pages import PAGE_BYTES, round_up

# Few large requests: writing in 1 MiB requests was a tenth slower than in 4 MiB ones. But they are
# cut smaller where some thread would get none. In pages, 4 MiB is as many buffers as one system
# call takes.
JOB_BYTES = 4 << 20
_LEAST_JOB_BYTES = 512 << 10


class Span(NamedTuple):
    """Bytes of one slab, and the memory that they come from or go to."""

    slab: Slab
    offset: int  # in the slab's file
    data: memoryview  # flat bytes


class Part(NamedTuple):
    """A span, or a piece of a long one."""

    number: int  # of the span
    offset: int
    data: memoryview


@dataclass
class Job:
    """Parts of one slab, each on the pages after those of the one before."""

    slab: Slab
    parts: list[Part]
    lock: threading.Lock = field(default_factory=threading.Lock)
    results: list[int | TierError] | None = None  # bytes of each part; None until it is over
    is_begun: bool = False
    is_abandoned: bool = False  # nobody waits for it any more


def share_bytes(spans: Sequence[Span], num_threads: int) -> int:
    """What a job of these should have, at most."""
    total_bytes = sum(round_up(span.data.nbytes, PAGE_BYTES) for span in spans)
    share = round_up(total_bytes // num_threads, PAGE_BYTES)
    return min(max(share, _LEAST_JOB_BYTES), JOB_BYTES)


def cut(spans: Sequence[Span], job_bytes: int) -> Iterator[Job]:
    """Jobs of that size at most that cover the spans, in the order of the files."""
    job: Job | None = None
    job_start = job_end = 0  # of the job, in the slab's file; whole pages
    places = [(slab.slab_id, offset) for slab, offset, _ in spans]
    for number in sorted(range(len(spans)), key=places.__getitem__):
        slab = spans[number].slab
        for part in _pieces(number, spans[number], job_bytes):
            start = part.offset // PAGE_BYTES * PAGE_BYTES
            end = round_up(part.offset + part.data.nbytes, PAGE_BYTES)
            is_next = start == job_end and end - job_start <= job_bytes
            if job is not None and is_next and job.slab == slab:
                job.parts.append(part)
            else:
                if job is not None:
                    yield job
                job, job_start = Job(slab, [part]), start
            job_end = end
    if job is not None:
        yield job


def _pieces(number: int, span: Span, job_bytes: int) -> list[Part]:
    _, offset, data = span
    first_page = offset // PAGE_BYTES * PAGE_BYTES
    num_bytes = data.nbytes
    if offset + num_bytes - first_page <= job_bytes:
        return [Part(number, offset, data)]
    pieces, begin = [], 0
    while begin < max(num_bytes, 1):
        end = min(first_page + job_bytes - offset, num_bytes)
        pieces.append(Part(number, offset + begin, data[begin:end]))
        begin, first_page = max(end, 1), first_page + job_bytes
    return pieces


def pages_of(parts: list[Part]) -> tuple[int, int]:
    """Where in the file their first page begins and the last one ends."""
    last = parts[-1]
    start = parts[0].offset // PAGE_BYTES * PAGE_BYTES
    return start, round_up(last.offset + last.data.nbytes, PAGE_BYTES)


def share_of(part: Part, start: int, num_bytes: int) -> int:
    """How much of a part lies in so many bytes from `start` on."""
    return min(max(num_bytes - (part.offset - start), 0), part.data.nbytes)


def whole_pages(num_bytes: int) -> int:
    """Bytes of the pages that so many bytes take."""
    return num_bytes // PAGE_BYTES * PAGE_BYTES


def straight_buffers(
    parts: Sequence[Part], own: memoryview
) -> tuple[list[memoryview], list[memoryview]]:
    """What one system call moves, and of those a page of `own` for the last bytes of each part."""
    pages = [own[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] for i in range(len(parts))]
    buffers = []
    for part, page in zip(parts, pages, strict=True):
        whole = whole_pages(part.data.nbytes)
        if whole:
            buffers.append(part.data[:whole])
        if whole < part.data.nbytes:
            buffers.append(page)
    return buffers, pages


def shares_of(parts: Sequence[Part], pages: Sequence[memoryview], num_read: int) -> list[int]:
    """Bytes of each part among so many that were read, the last ones copied from their pages."""
    counts = [share_of(part, parts[0].offset, num_read) for part in parts]
    for part, page, count in zip(parts, pages, counts, strict=True):
        whole = whole_pages(part.data.nbytes)
        if count > whole:
            part.data[whole:count] = page[: count - whole]
    return counts
