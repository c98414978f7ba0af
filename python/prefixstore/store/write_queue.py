"""The bounded queue between those who save blocks and the thread that makes records of them."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefixstore.block_key import BlockKey, RecordName
from prefixstore.store.block_sources import BlockSource

Chooser = Callable[[RecordName], bool]  # whether a record is to be dropped or waited for


def noop() -> None:
    """Does nothing."""


@dataclass(frozen=True, eq=False)
class WriteJob:
    """One block on its way to the tiers.

    Attributes:
        key: The block.
        source: Where its record comes from.
        tiers: Where it is to go, by number, fastest first.
        priority: Of its record.
        done: Called once the block is no longer read.
        arrived: Called once it is in the fastest of these tiers, or never will be.
    """

    key: BlockKey
    source: BlockSource
    tiers: tuple[int, ...]
    priority: int = 0
    done: Callable[[], None] = noop
    arrived: Callable[[], None] = noop


class WriteQueue:
    """First in, first out; a job being written still counts.

    Args:
        max_bytes: Of all that waits.
        max_entries: Of all that waits.
        max_held_bytes: Of memory that is kept for what waits, see `BlockSource`.
    """

    def __init__(self, max_bytes: int, max_entries: int, max_held_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._max_held_bytes = max_held_bytes
        self._jobs: deque[WriteJob] = deque()
        self._running: list[WriteJob] = []
        self._num_bytes = self._held_bytes = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._pid = os.getpid()  # a forked process inherits the queue, but not the writer

    def has_room(self, num_entries: int, held_bytes: int) -> bool:
        """Whether jobs fit for which so many bytes are kept; none do if it is closed or the process
        forked.
        """
        if self._is_forked():
            return False
        with self._changed:
            return self._takes(num_entries, held_bytes, held_bytes)

    def offer(self, job: WriteJob) -> bool:
        """Queue a job; False if it does not fit, the queue is closed or the process forked."""
        if self._is_forked():
            return False
        with self._changed:
            if not self._takes(1, job.source.num_bytes, job.source.held_bytes):
                return False
            self._jobs.append(job)
            self._num_bytes += job.source.num_bytes
            self._held_bytes += job.source.held_bytes
            self._changed.notify_all()
            return True

    def take(self, max_jobs: int, max_bytes: int) -> list[WriteJob]:
        """The next jobs, waiting for one, however long; none once the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._jobs) or self._is_closed)
            taken: list[WriteJob] = []
            while self._jobs and len(taken) < max_jobs:
                max_bytes -= self._jobs[0].source.num_bytes
                if taken and max_bytes < 0:
                    break
                taken.append(self._jobs.popleft())
            self._running = taken
            return list(taken)

    def finish(self) -> None:
        """The jobs that were taken are done with."""
        with self._changed:
            self._let_go(self._running)
            self._running = []
            self._changed.notify_all()

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or running; False if that takes longer, or forever."""
        if self._is_forked():
            return False
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._num_entries() == 0, timeout_s))

    def close(self) -> None:
        """Take no more jobs; what is queued can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def remove(self, is_meant: Chooser) -> list[WriteJob]:
        """Remove and return what is queued of these but not running."""
        with self._changed:
            removed = [job for job in self._jobs if is_meant(job.key.name)]
            self._jobs = deque(job for job in self._jobs if not is_meant(job.key.name))
            self._let_go(removed)
            self._changed.notify_all()
            return removed

    def wait_finished(self, is_meant: Chooser, deadline: float) -> list[WriteJob]:
        """Wait until what is running of these is done with; what is not by the deadline."""
        if self._is_forked():
            return []  # a forked process writes nothing
        with self._changed:
            batch = self._running
            meant = [job for job in batch if is_meant(job.key.name)]
            is_over = not meant or self._changed.wait_for(
                lambda: self._running is not batch, max(0.0, deadline - time.monotonic())
            )
            return [] if is_over else meant

    def sizes(self) -> tuple[int, int]:
        """Entries and bytes, queued or running."""
        with self._changed:
            return self._num_entries(), self._num_bytes

    def check(self) -> list[str]:
        """Recount what is queued; one line for each thing that is wrong."""
        with self._changed:
            sources = [job.source for job in [*self._jobs, *self._running]]
            expected = sum(one.num_bytes for one in sources), sum(one.held_bytes for one in sources)
            found = self._num_bytes, self._held_bytes
            if found != expected:
                return [f"write queue: expected {expected} bytes, waiting and held, got {found}"]
            return []

    def _is_forked(self) -> bool:
        return os.getpid() != self._pid

    def _let_go(self, jobs: Sequence[WriteJob]) -> None:
        self._num_bytes -= sum(job.source.num_bytes for job in jobs)
        self._held_bytes -= sum(job.source.held_bytes for job in jobs)

    def _takes(self, num_entries: int, num_bytes: int, held_bytes: int) -> bool:
        return (
            not self._is_closed
            and self._num_bytes + num_bytes <= self._max_bytes
            and self._held_bytes + held_bytes <= self._max_held_bytes
            and self._num_entries() + num_entries <= self._max_entries
        )

    def _num_entries(self) -> int:
        return len(self._jobs) + len(self._running)
