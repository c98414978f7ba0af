"""Writes records into one of the slower tiers, in threads of its own.

Nobody waits for it, and it holds no block and, as a rule, no record: what is queued is a name, and
when its turn comes the record is read from a faster tier, which keeps it anyhow. If that tier gives
it up before it was read, it hands the bytes over (`rescue`), as far as there is room for them; one
that is gone all the same is dropped, and counted.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from prefixstore.block_key import RecordName
from prefixstore.record_header import TRAILER_BYTES
from prefixstore.store.config import LOOK_UP_SHARE, StoreConfig
from prefixstore.store.fetcher import Slab, Slabs
from prefixstore.store.guarded_tier import GuardedTier
from prefixstore.store.write_queue import Chooser
from prefixstore.tiers.pages import PAGE_BYTES, round_up

logger = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20  # of records that are written together
_MAX_BATCH = 256
_NUM_THREADS = 2  # one reads its batch from a faster tier while the other's is written


@dataclass(eq=False)
class TierJob:
    """A record on its way into a tier.

    Attributes:
        name: What it is called.
        max_bytes: It is no longer than that.
        priority: Of the record.
        record: Its bytes, until it is written; None where a faster tier keeps them.
    """

    name: RecordName
    max_bytes: int
    priority: int = 0
    record: np.ndarray | None = None

    @property
    def held_bytes(self) -> int:
        """What it costs to have it wait."""
        return 0 if self.record is None else self.record.nbytes


class TierWriter:
    """The bounded queue before a tier, and the threads that empty it.

    Args:
        tier: Where records go.
        faster: Where they are read from, fastest first.
        config: Bounds of the queue, and how long a write may take.
    """

    def __init__(
        self, tier: GuardedTier, faster: Sequence[GuardedTier], config: StoreConfig
    ) -> None:
        self.tier = tier
        self._faster = list(faster)
        self._config = config
        self._jobs: deque[TierJob] = deque()
        self._running: set[TierJob] = set()
        # jobs of both whose record is still to be read from a faster tier; the last one by name
        self._elsewhere: dict[RecordName, TierJob] = {}
        self._held_bytes = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._pid = os.getpid()  # a forked process inherits the queue, but not the threads
        self._slabs = Slabs()
        self._threads = [
            threading.Thread(target=self._run, name=f"prefixstore-writer-{tier.name}", daemon=True)
            for _ in range(_NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def offer(self, job: TierJob) -> bool:
        """Queue a record; False, and counted, where the queue is full or closed."""
        with self._changed:
            num_entries = len(self._jobs) + len(self._running)
            has_room = num_entries < self._config.max_queue_entries and self._fits(job.held_bytes)
            if has_room and not self._is_closed and os.getpid() == self._pid:
                self._jobs.append(job)
                self._held_bytes += job.held_bytes
                if job.record is None:
                    self._elsewhere[job.name] = job
                self._changed.notify_all()
                return True
        self.tier.count_dropped(1)
        return False

    def rescue(self, name: RecordName, record: np.ndarray) -> None:
        """A faster tier gives a record up: keep it if it is yet to be read.

        It is lent for this call, which comes under that tier's lock.
        """
        with self._changed:
            job = self._elsewhere.get(name)
            if job is not None and self._fits(record.nbytes):
                job.record = record.copy()
                self._held_bytes += record.nbytes
                del self._elsewhere[name]

    def _fits(self, num_bytes: int) -> bool:
        return self._held_bytes + num_bytes <= self._config.held_bytes

    def _forget(self, jobs: Iterable[TierJob]) -> None:
        """Rescue nothing for these any more."""
        for job in jobs:
            if self._elsewhere.get(job.name) is job:
                del self._elsewhere[job.name]

    def wait_empty(self, deadline: float) -> bool:
        """Wait until nothing is queued or being written; False once it is past the deadline."""
        if os.getpid() != self._pid:
            return False
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._jobs and not self._running,
                max(0.0, deadline - time.monotonic()),
            )

    def drop(self, is_meant: Chooser, deadline: float) -> bool:
        """Drop what is queued of these records, and wait until none of them is being written.

        Returns:
            False if that takes longer.
        """
        self._drop_queued(is_meant)
        if os.getpid() != self._pid:
            return True  # a forked process writes nothing
        with self._changed:
            meant = {job for job in self._running if is_meant(job.name)}
            return self._changed.wait_for(
                lambda: meant.isdisjoint(self._running), max(0.0, deadline - time.monotonic())
            )

    def _drop_queued(self, is_meant: Chooser) -> None:
        with self._changed:
            dropped = [job for job in self._jobs if is_meant(job.name)]
            self._jobs = deque(job for job in self._jobs if not is_meant(job.name))
            self._forget(dropped)
            self._held_bytes -= sum(job.held_bytes for job in dropped)
            self._changed.notify_all()
        self.tier.count_dropped(len(dropped))

    def close(self, deadline: float) -> None:
        """Write what is queued until the deadline, and drop the rest."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self.wait_empty(deadline)
        self._drop_queued(lambda name: True)
        end = time.monotonic() + 1.0
        for thread in self._threads:  # only a tier that hangs keeps one; they are daemons
            thread.join(max(0.0, end - time.monotonic()))

    def check(self) -> list[str]:
        """What does not add up, in words."""
        with self._changed:
            held_bytes = sum(job.held_bytes for job in [*self._jobs, *self._running])
            if held_bytes == self._held_bytes:
                return []
            return [
                f"{self.tier.name}: writer: expected {held_bytes} bytes, got {self._held_bytes}"
            ]

    # ---- in its threads ----------------------------------------------------------------------

    def _run(self) -> None:
        while jobs := self._take():
            self._write_or_log(jobs)
            with self._changed:
                self._forget(jobs)  # in case they failed before their records were read
                self._running.difference_update(jobs)
                self._held_bytes -= sum(job.held_bytes for job in jobs)
                self._changed.notify_all()

    def _write_or_log(self, jobs: Sequence[TierJob]) -> None:
        try:
            self._write(jobs)
        except Exception as error:  # a bug of a tier must not end the writing
            logger.exception("tier %s: %d records not written", self.tier.name, len(jobs))
            self.tier.mark_down(error)

    def _take(self) -> list[TierJob]:
        """The next batch, waiting for one; empty once the writer is closed and has no more."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._jobs) or self._is_closed)
            jobs: list[TierJob] = []
            num_bytes = 0
            while self._jobs and len(jobs) < _MAX_BATCH:
                num_bytes += round_up(self._jobs[0].max_bytes, PAGE_BYTES)
                if jobs and num_bytes > BATCH_BYTES:
                    break
                jobs.append(self._jobs.popleft())
            self._running.update(jobs)
            return jobs

    def _write(self, jobs: Sequence[TierJob]) -> None:
        if not self.tier.takes_writes:
            self.tier.skip_writes(len(jobs))
            return
        now, seconds = time.monotonic(), self._config.write_timeout_s
        deadline = now + seconds
        names = [job.name for job in jobs]
        answers = self.tier.contains_many(names, now + LOOK_UP_SHARE * seconds)
        lacking = [job for job, answer in zip(jobs, answers, strict=True) if answer is False]
        self.tier.count_present(answers.count(True))
        # A tier that cannot say what it holds would not take them either.
        self.tier.count_dropped(answers.count(None))
        if not lacking:
            return
        # room for the trailer too: protected records are then opened in place
        sizes = [round_up(job.max_bytes + TRAILER_BYTES, PAGE_BYTES) for job in lacking]
        slab = self._slabs.take(sum(sizes))
        rows = np.split(slab.memory, np.cumsum(sizes))[:-1]
        records = self._collect(lacking, rows, deadline, slab)
        with self._changed:
            self._forget(jobs)  # before the write, which may take long: the records were read
        found = [
            (job, record)
            for job, record in zip(lacking, records, strict=True)
            if record is not None
        ]
        self.tier.count_dropped(len(lacking) - len(found))
        if found:
            self.tier.put_many(
                [job.name for job, _ in found],
                [record for _, record in found],
                [job.priority for job, _ in found],
                deadline,
            )
        self._slabs.give_back(slab)

    def _collect(
        self,
        jobs: Sequence[TierJob],
        rows: Sequence[np.ndarray],
        deadline: float,
        slab: Slab,
    ) -> list[np.ndarray | None]:
        """The bytes of each record, from its job or the fastest tier that has it: in its row."""
        records = [job.record for job in jobs]
        for tier in self._faster:
            wanted = [i for i, record in enumerate(records) if record is None]
            # No other tier may read into rows that an abandoned call may still write to. (That call
            # used up all the time anyway.).
            if not wanted or slab.is_abandoned:
                break
            found = tier.read_many(
                [jobs[i].name for i in wanted], [rows[i] for i in wanted], deadline, slab.abandon
            )
            for i, record in zip(wanted, found, strict=True):
                records[i] = record
        # A tier hands over what it evicts before it forgets it: a record that was not found has
        # arrived in its job by now.
        return [
            job.record if record is None else record
            for job, record in zip(jobs, records, strict=True)
        ]
