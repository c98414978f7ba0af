"""The threads that do the disk tier's jobs.

Lighter than the futures of `concurrent.futures`: with those, reading 16 MiB out of the page cache
took a tenth of a millisecond more, of two.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Protocol

from prefixstore.errors import TierUnavailable
from prefixstore.tiers.base import is_past
from prefixstore.tiers.disk.jobs import Job


class JobBatch:
    """Jobs of one call, done by whoever calls `work`.

    Args:
        jobs: What is to be done, in that order.
        do: Does one.
        deadline: Of `time.monotonic()`; what was not begun by then never is.
        latest: Likewise, but what was begun is waited for until the deadline.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        do: Callable[[Job], None],
        deadline: float | None,
        latest: float | None = None,
    ) -> None:
        self.jobs = jobs
        self._do = do
        self._deadline = deadline
        self._latest = latest
        self._waiting = deque(jobs)
        self._num_left = len(jobs)
        self._bug: BaseException | None = None
        self._lock = threading.Lock()
        self._is_done = threading.Lock()  # held until all jobs are done
        if jobs:
            self._is_done.acquire()

    def work(self) -> None:
        """Do one job after the other, until none is left."""
        while not is_past(self._deadline):
            try:
                job = self._waiting.popleft()
            except IndexError:
                return
            try:
                if not is_past(self._latest):
                    self._do(job)
            except BaseException as bug:  # whoever waits for the jobs raises it
                self._bug = bug
            with self._lock:
                self._num_left -= 1
                if not self._num_left:
                    self._is_done.release()

    def wait(self) -> None:
        """Wait until all are done, or the deadline; only a bug of ours is raised here."""
        timeout = -1.0
        if self._deadline is not None:
            timeout = max(self._deadline - time.monotonic(), 0.0)
        self.is_over(timeout)
        if self._bug is not None:
            raise self._bug

    def is_over(self, within_s: float) -> bool:
        """Whether all are done within that time; -1 for however long it takes."""
        is_over = self._is_done.acquire(timeout=within_s)
        if is_over:
            self._is_done.release()
        return is_over


class Batch(Protocol):
    """What threads can help with."""

    def work(self) -> None:
        """Do some of what is left, until nothing is."""


class JobThreads:
    """A few threads that work on batches, in the order in which those come. Thread-safe.

    They are started when first needed, and end with the process: one that hangs in the kernel must
    not keep it. Those that the system refuses to start are tried again when help is needed next.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._batches: SimpleQueue[Batch | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def __del__(self) -> None:
        self.close()

    def help(self, batch: Batch, num_helpers: int) -> None:
        """Let so many threads work on it, as far as there are.

        Raises:
            TierUnavailable: After `close`, or if help is needed and there is no thread.
        """
        with self._lock:
            if self._is_closed:
                raise TierUnavailable(f"{self._name}: expected open threads, got closed ones")
            if num_helpers > 0:
                self._start_missing()
            for _ in range(min(num_helpers, len(self._threads))):
                self._batches.put(batch)

    def close(self, wait: bool = False) -> None:
        """End the threads, each after what was given to it.

        Args:
            wait: Until they have ended.
        """
        with self._lock:
            if not self._is_closed:
                for _ in self._threads:
                    self._batches.put(None)
            self._is_closed = True
        if wait:
            for thread in self._threads:
                thread.join()

    def _start_missing(self) -> None:
        """Start threads until there are all, or as many as can be had."""
        while len(self._threads) < self._num_threads:
            name = f"{self._name}_{len(self._threads)}"
            thread = threading.Thread(target=_work, args=(self._batches,), name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if not self._threads:
                    raise TierUnavailable(
                        f"{self._name}: expected a thread, got none: {error}"
                    ) from error
                return
            self._threads.append(thread)


def _work(batches: SimpleQueue[Batch | None]) -> None:
    while (batch := batches.get()) is not None:
        batch.work()
        del batch  # lets go of its jobs' memory while this waits for the next batch
