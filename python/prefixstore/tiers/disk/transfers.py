"""Moves bytes between memory and slabs through a few threads, many records a system call.

    spans      where each record's bytes lie in a slab, and in memory
    jobs       neighbours in a slab, together at most JOB_BYTES; a long record is cut into several
    threads    take one job after the other: one preadv or pwritev each

A direct transfer needs whole pages in file and memory. What is page-aligned goes straight from or
into the caller's memory, but for the last, partial page of each record, which goes through a page
of its own. All else is copied through the thread's buffer. Where all of a call's reads go straight,
the extension makes them: see straight_reads.py.

A read that hangs in the kernel cannot be called off. So where there is a deadline all is read into
the threads' own buffers and copied while the caller still waits: after the deadline nothing writes
to the caller's memory, and a thread that hangs costs its place only. That copy takes a sixth to a
third of the time; it is spared with a caller that lets go of memory not read in time. A write that
hangs may read the caller's memory later, but only into a slot that no reader will be shown.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from prefixstore.errors import TierError, TierTimeout
from prefixstore.tiers.base import too_late
from prefixstore.tiers.disk.files import Slab, SlabFiles
from prefixstore.tiers.disk.job_threads import JobBatch, JobThreads
from prefixstore.tiers.disk.jobs import (
    JOB_BYTES,
    Job,
    Part,
    Span,
    cut,
    pages_of,
    share_bytes,
    share_of,
    shares_of,
    straight_buffers,
)
from prefixstore.tiers.disk.straight_reads import all_on_pages, plan_reads
from prefixstore.tiers.pages import PAGE_BYTES, page_aligned, round_up

_WIPED_AT_ONCE = 1024
_ZEROS = memoryview(bytes(PAGE_BYTES))

_Transfer = Callable[[Job, list[Part]], list[int]]


class Writing(NamedTuple):
    """Spans that are being written, see `Transfers.begin_writing`."""

    num_spans: int
    batch: JobBatch


class StillWriting(TierTimeout):
    """The deadline came while the kernel was writing: the slot must not be used yet."""


class Transfers:
    """Reads and writes many spans at once. Thread-safe.

    Args:
        files: The slabs.
        tier_name: For messages.
        num_threads: How many transfers run at once.
    """

    def __init__(self, files: SlabFiles, tier_name: str, num_threads: int) -> None:
        self._files = files
        self._tier_name = tier_name
        self._num_threads = num_threads
        self._threads = JobThreads(num_threads, f"{tier_name}-io")
        self._own = threading.local()

    def read_many(
        self, spans: Sequence[Span], deadline: float | None = None
    ) -> list[int | TierError]:
        """Bytes read of each, fewer where its file is missing or ends; or why it was not read."""
        if deadline is None:
            return self._read_many(spans, None)
        return _sum(len(spans), self._run(spans, self._read_through, deadline))

    def read_or_abandon_many(
        self, spans: Sequence[Span], deadline: float | None = None
    ) -> list[int | TierError]:
        """`read_many`, but what is still being read at the deadline goes on being read.

        Memory that was not yet being read into is let go of; a thread that hangs keeps its own.
        """
        return self._read_many(spans, deadline)

    def _read_many(self, spans: Sequence[Span], deadline: float | None) -> list[int | TierError]:
        """Read into the callers' memory, by the extension's calls where that can be done."""
        reads = plan_reads(self._files, spans, self._num_threads)
        if reads is None:
            return _sum(len(spans), self._run(spans, self._read_straight, deadline))
        is_one = deadline is None  # without a deadline the calling thread is one of the threads
        self._threads.help(reads.batch, min(self._num_threads, len(reads)) - is_one)
        outcomes: list[int | TierError] = [0] * len(spans)
        again: list[tuple[Slab, Part]] = []
        for call, num_read in reads.finish(deadline):
            if num_read is None:
                for part in call.parts:
                    outcomes[part.number] = too_late(self._tier_name)
            elif num_read < 0:
                again += ((call.slab, part) for part in call.parts)
            else:
                for part, count in zip(call.parts, call.shares(num_read), strict=True):
                    _add(outcomes, part.number, count)
        if again:  # once more, one by one, which also tells what is wrong with each
            parts = [Span(slab, part.offset, part.data) for slab, part in again]
            for part, result in self._run(parts, self._read_straight, deadline):
                _add(outcomes, again[part.number][1].number, result)
        return outcomes

    def write_many(
        self, spans: Sequence[Span], deadline: float | None = None
    ) -> list[TierError | None]:
        """For each None, or why it was not written: `StillWriting` before anything else.

        Spans begin on pages; what follows one up to the end of its page is overwritten, too.
        """
        return self.end_writing(self.begin_writing(spans, deadline))

    def begin_writing(
        self, spans: Sequence[Span], deadline: float | None = None, latest: float | None = None
    ) -> Writing:
        """`write_many`, but its outcomes are fetched by `end_writing`, and only once.

        After `latest` nothing is begun; what was is waited for until the deadline.
        """
        batch = self._batch(spans, self._write, deadline, latest)
        self._threads.help(batch, len(batch.jobs))
        return Writing(len(spans), batch)

    def is_over(self, writing: Writing, within_s: float) -> bool:
        """Whether that is done within so long."""
        return writing.batch.is_over(within_s)

    def end_writing(self, writing: Writing) -> list[TierError | None]:
        """Wait until that is done, or its deadline; for each span what `write_many` says of it."""
        outcomes: list[TierError | None] = [None] * writing.num_spans
        for part, result in self._wait(writing.batch):
            is_news = outcomes[part.number] is None or isinstance(result, StillWriting)
            if isinstance(result, TierError) and is_news:
                outcomes[part.number] = result
        return outcomes

    def wipe_many(
        self, slots: Sequence[tuple[Slab, int]], deadline: float | None = None
    ) -> list[TierError | None]:
        """Overwrite the first page of slots, so that no record will be found there again.

        Args:
            slots: Slab, and where in its file the slot begins. Where nothing lies, none is made.
            deadline: Of `time.monotonic()`.

        Returns:
            For each None, or why it was not wiped, as `write_many` says it.
        """
        outcomes: list[TierError | None] = []
        for start in range(0, len(slots), _WIPED_AT_ONCE):
            outcomes += self._wipe(slots[start : start + _WIPED_AT_ONCE], deadline)
        return outcomes

    def _wipe(
        self, slots: Sequence[tuple[Slab, int]], deadline: float | None
    ) -> list[TierError | None]:
        pages = page_aligned(len(slots) * PAGE_BYTES).reshape(-1, PAGE_BYTES)
        pages[:] = 0
        spans = [Span(*slot, page.data) for slot, page in zip(slots, pages, strict=True)]
        outcomes: list[TierError | None] = [None] * len(slots)
        found = self.read_many(spans, deadline)
        marked = [
            n for n, page in enumerate(pages) if page.any() or isinstance(found[n], TierError)
        ]
        pages[:] = 0
        errors = self.write_many([spans[number] for number in marked], deadline)
        for number, error in zip(marked, errors, strict=True):
            outcomes[number] = error
        return outcomes

    def close(self) -> None:
        """End the threads, each after what it is doing."""
        self._threads.close()

    # ---- jobs and threads --------------------------------------------------------------------

    def _run(
        self, spans: Sequence[Span], transfer: _Transfer, deadline: float | None
    ) -> Iterator[tuple[Part, int | TierError]]:
        """Do all, but for what is not begun by the deadline; wait no longer than that.

        Without one the caller is one of the threads: one less has to be woken, and waited for.
        """
        batch = self._batch(spans, transfer, deadline)
        if deadline is not None:
            self._threads.help(batch, len(batch.jobs))
        else:
            self._threads.help(batch, min(self._num_threads, len(batch.jobs)) - 1)
            batch.work()
        return self._wait(batch)

    def _batch(
        self,
        spans: Sequence[Span],
        transfer: _Transfer,
        deadline: float | None,
        latest: float | None = None,
    ) -> JobBatch:
        jobs = list(cut(spans, share_bytes(spans, self._num_threads)))
        return JobBatch(jobs, lambda job: self._do(job, transfer), deadline, latest)

    def _wait(self, batch: JobBatch) -> Iterator[tuple[Part, int | TierError]]:
        """Wait for the jobs, no longer than until the deadline; what came of each part."""
        batch.wait()
        for job in batch.jobs:
            parts = job.parts
            yield from zip(parts, self._results(job), strict=True)

    def _do(self, job: Job, transfer: _Transfer) -> None:
        with job.lock:
            if job.is_abandoned:
                return
            job.is_begun = True
        results = _attempt(job, job.parts, transfer)
        with job.lock:
            job.results = results

    def _results(self, job: Job) -> list[int | TierError]:
        """What the job did; nobody waits for it from now on."""
        with job.lock:  # waits for a copy into the caller's memory that is under way
            if job.results is not None:
                return job.results
            job.is_abandoned = True
            error, num_parts = too_late(self._tier_name), len(job.parts)
            if not job.is_begun:
                # Frees the memory now: hanging threads may leave the job queued for long.
                job.parts = []
            else:
                where = f"{self._tier_name}: {job.slab.file_name}"
                error = StillWriting(f"{where}: expected an answer before the deadline, got none")
            return [error] * num_parts

    # ---- transfers ---------------------------------------------------------------------------

    def _read_straight(self, job: Job, parts: list[Part]) -> list[int]:
        """Read into the callers' memory."""
        if not self._can_go_straight(parts):
            return self._read_through(job, parts)
        buffers, pages = straight_buffers(parts, self._buffer().data)
        num_read = self._files.read(job.slab, parts[0].offset, buffers)
        return shares_of(parts, pages, num_read)

    def _read_through(self, job: Job, parts: list[Part]) -> list[int]:
        """Read whole pages into this thread's buffer, and copy while somebody waits for it."""
        start, end = pages_of(parts)
        buffer = self._buffer()
        num_read = self._files.read(job.slab, start, [buffer[: end - start].data])
        counts = [share_of(part, start, num_read) for part in parts]
        with job.lock:
            if not job.is_abandoned:
                for part, count in zip(parts, counts, strict=True):
                    begin = part.offset - start
                    np.copyto(_as_array(part.data)[:count], buffer[begin : begin + count])
        return counts

    def _write(self, job: Job, parts: list[Part]) -> list[int]:
        if self._can_go_straight(parts):
            buffers, pages = straight_buffers(parts, self._buffer().data)
            for part, page in zip(parts, pages, strict=True):
                rest = part.data.nbytes % PAGE_BYTES
                page[:rest] = part.data[part.data.nbytes - rest :]
                page[rest:] = _ZEROS[rest:]
        else:
            start, end = pages_of(parts)
            buffer = self._buffer()[: end - start]
            for part in parts:
                begin, length = part.offset - start, part.data.nbytes
                np.copyto(buffer[begin : begin + length], _as_array(part.data))
                buffer[begin + length : begin + round_up(length, PAGE_BYTES)] = 0
            buffers = [buffer.data]
        self._files.write(job.slab, parts[0].offset, buffers)
        return [part.data.nbytes for part in parts]

    def _can_go_straight(self, parts: list[Part]) -> bool:
        return all_on_pages(parts, in_memory=self._files.is_direct)

    def _buffer(self) -> np.ndarray:
        """This thread's own, of `JOB_BYTES`."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = page_aligned(JOB_BYTES)
        return self._own.buffer


def _attempt(job: Job, parts: list[Part], transfer: _Transfer) -> list[int | TierError]:
    """One system call for all; where that fails one for each, so that each has its own outcome."""
    try:
        return [*transfer(job, parts)]
    except TierError as error:
        if len(parts) == 1:
            return [error]
        return [_attempt(job, [part], transfer)[0] for part in parts]


def _as_array(data: memoryview) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _sum(num_spans: int, results: Iterable[tuple[Part, int | TierError]]) -> list[int | TierError]:
    """Bytes of each span, or why one of its parts was not read."""
    outcomes: list[int | TierError] = [0] * num_spans
    for part, result in results:
        _add(outcomes, part.number, result)
    return outcomes


def _add(outcomes: list[int | TierError], number: int, result: int | TierError) -> None:
    before = outcomes[number]
    if isinstance(before, int):
        outcomes[number] = before + result if isinstance(result, int) else result
    # A timeout outweighs other errors: the memory may still be written to.
    elif isinstance(result, TierTimeout):
        outcomes[number] = result
