"""Makes records of saved blocks, in the background, and hands them to the tiers.

    queue of blocks -> record -> tier 0, at once
                              -> names, to the writers of tier 1, 2, ...   (tier_writer.py)

A block is read until its record is in tier 0, no longer: a slow tier holds none. Where tier 0 does
not keep a record, the writers of the others get a copy of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np

from prefixstore.at_exit import close_at_exit
from prefixstore.block_key import RecordName
from prefixstore.store.beside import Beside
from prefixstore.store.block_sources import MAX_RECORDS
from prefixstore.store.config import StoreConfig
from prefixstore.store.guarded_tier import GuardedTier
from prefixstore.store.tier_writer import TierJob, TierWriter
from prefixstore.store.write_queue import Chooser, WriteJob, WriteQueue

logger = logging.getLogger(__name__)

# Blocks taken from the queue at once. Writing evicts everything else from the processor's caches,
# so what is done once per batch runs slowly: with half the size each block takes 5 % longer.
_BATCH_BYTES = 64 << 20


class BlockWriter:
    """The queue of blocks, the thread that empties it, and the writers of the slower tiers.

    Args:
        tiers: Fastest first.
        config: Bounds.
    """

    def __init__(self, tiers: Sequence[GuardedTier], config: StoreConfig) -> None:
        self._tiers = tiers
        self._first = tiers[0] if tiers else None
        self._config = config
        self._queue = WriteQueue(
            config.max_queue_bytes, config.max_queue_entries, config.held_bytes
        )
        self._writers = {
            number: TierWriter(tiers[number], tiers[:number], config)
            for number in range(1, len(tiers))
        }
        # Jobs of the batch whose blocks are still to be read.
        self._unread: dict[WriteJob, None] = {}
        self._silent: set[RecordName] = set()  # names of the batch for which tier 0 gave no answer
        # Names put into tier 0 last that were not evicted since.
        self._not_evicted: set[RecordName] = set()
        self._thread = threading.Thread(target=self._run, name="prefixstore-writer", daemon=True)
        self._thread.start()
        close_at_exit(self.close)

    def offer(self, job: WriteJob) -> bool:
        """Queue a block; False if it does not fit, the queue is closed or the process forked."""
        return self._queue.offer(job)

    def has_room(self, num_records: int, held_bytes: int) -> bool:
        """Whether the queue would take records now that hold so much memory."""
        return self._queue.has_room(num_records, held_bytes)

    def hand_on(self, number: int, job: TierJob) -> bool:
        """Queue a record that a faster tier holds for a slower one."""
        return self._writers[number].offer(job)

    def rescue(self, number: int, name: RecordName, record: np.ndarray) -> None:
        """A tier gives a record up; those after this number may still wait for it."""
        if number == 0:
            self._not_evicted.discard(name)
        for slower, writer in self._writers.items():
            if slower > number:
                writer.rescue(name, record)

    def sizes(self) -> tuple[int, int]:
        """Blocks and their bytes, queued or being written."""
        return self._queue.sizes()

    def wait_blocks(self, timeout_s: float) -> bool:
        """Wait until no block is read any more; False if that takes longer."""
        return self._queue.wait_empty(timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Wait until every tier has what it gets; False if that takes longer."""
        deadline = time.monotonic() + timeout_s
        return self._queue.wait_empty(timeout_s) and all(
            writer.wait_empty(deadline) for writer in self._writers.values()
        )

    def drop_blocks(self, is_meant: Chooser) -> int:
        """Drop what is queued of these blocks; how many."""
        dropped = self._queue.remove(is_meant)
        for job in dropped:
            _call(job.done)
            _call(job.arrived)
        return len(dropped)

    def wait_written(self, is_meant: Chooser, deadline: float) -> set[int]:
        """Wait until none of the blocks being written is one of these.

        Returns:
            Numbers of the tiers that may get some of them after the deadline.
        """
        late = self._queue.wait_finished(is_meant, deadline)
        return {number for job in late for number in job.tiers}

    def drop_records(self, number: int, is_meant: Chooser, deadline: float) -> bool:
        """Drop what is queued for a tier of these records, and wait for what is being written.

        Returns:
            False if that takes longer.
        """
        writer = self._writers.get(number)  # the fastest tier has no queue of its own
        return writer is None or writer.drop(is_meant, deadline)

    def check(self) -> list[str]:
        """What does not add up, in words."""
        return self._queue.check() + [
            problem for writer in self._writers.values() for problem in writer.check()
        ]

    def close(self) -> int:
        """Write what is queued, for at most `close_timeout_s`; returns the blocks dropped."""
        deadline = time.monotonic() + self._config.close_timeout_s
        self._queue.close()
        self._queue.wait_empty(self._config.close_timeout_s)
        num_dropped = self.drop_blocks(lambda name: True)
        self._thread.join(timeout=1.0)  # only a tier that hangs keeps it; it is a daemon
        for writer in self._writers.values():
            writer.close(deadline)
        return num_dropped

    # ---- in its thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while jobs := self._queue.take(MAX_RECORDS, _BATCH_BYTES):
            self._unread = dict.fromkeys(jobs)
            try:
                self._write(jobs)
            except Exception:  # a bug of a tier or a source must not end the writing
                logger.exception("%d blocks not written", len(jobs))
            self._let_go(list(self._unread))
            for job in jobs:
                _call(job.arrived)
            self._queue.finish()

    def _write(self, jobs: Sequence[WriteJob]) -> None:
        jobs = self._skip_left_alone(jobs)
        is_over = self._ask_first(jobs)
        over = [job for job, needs_none in zip(jobs, is_over, strict=True) if needs_none]
        self._let_go(over)
        for job in over:
            self._hand_on(job, None)
        for alike in _alike([job for job in jobs if job in self._unread]):
            self._write_alike(alike)

    def _skip_left_alone(self, jobs: Sequence[WriteJob]) -> list[WriteJob]:
        """Drop blocks of which no tier would take a record now; returns the others."""
        takes = {number for number, tier in enumerate(self._tiers) if tier.takes_writes}
        skipped = [job for job in jobs if takes.isdisjoint(job.tiers)]
        self._let_go(skipped)
        for number, tier in enumerate(self._tiers):
            num_records = sum(number in job.tiers for job in skipped)
            if num_records:
                tier.skip_writes(num_records)
        return [job for job in jobs if job in self._unread]

    def _write_alike(self, jobs: Sequence[WriteJob]) -> None:
        """Make records of blocks that lie in one place, and put them where they belong."""
        left = self._write_in_place(jobs)
        if left:
            self._write_elsewhere(left)

    def _write_elsewhere(self, jobs: Sequence[WriteJob]) -> None:
        """Make records in memory of their maker, and put them where they belong: those of a part
        while the next part's are made.
        """
        maker = jobs[0].source.maker
        at_once = max(1, maker.max_records // 2)  # the other half holds records that are being put
        putting = Beside()
        try:
            for first in range(0, len(jobs), at_once):
                part = jobs[first : first + at_once]
                with ExitStack() as made:
                    keys, sources = [job.key for job in part], [job.source for job in part]
                    records = made.enter_context(maker.records(keys, sources))
                    self._let_go(part)
                    putting.wait()
                    put = partial(self._put, part, records, made.pop_all())
                if first + at_once < len(jobs):
                    putting.start(put)
                else:
                    put()
        finally:
            putting.wait()

    def _put(
        self, jobs: Sequence[WriteJob], records: Sequence[np.ndarray], made: ExitStack
    ) -> None:
        """Put records where they belong, and end what holds them."""
        with made:
            kept = self._put_first(jobs, records)
            for job, record, is_kept in zip(jobs, records, kept, strict=True):
                self._hand_on(job, None if is_kept else record)

    def _write_in_place(self, jobs: Sequence[WriteJob]) -> Sequence[WriteJob]:
        """Make records where tier 0 keeps them; returns the jobs that are to be done otherwise."""
        first, maker = self._first, jobs[0].source.maker
        chosen = [job for job in jobs if self._goes_first(job)]
        if not chosen or first is None or not first.reserves or not maker.writes_anywhere:
            return jobs
        names = [job.key.name for job in chosen]
        sizes = [job.key.layout.record_bytes for job in chosen]
        done: dict[WriteJob, None] = {}
        with ExitStack() as reserved:
            with _blaming(first):
                reservation = first.reserve_many(names, sizes, chosen[0].priority)
                places = reserved.enter_context(reservation)
            given = [(i, place) for i, place in enumerate(places) if place is not None]
            is_written = maker.write(
                [chosen[i].key for i, _ in given],
                [chosen[i].source for i, _ in given],
                [place for _, place in given],
            )
            for (i, _), is_there in zip(given, is_written, strict=True):
                if is_there:
                    done[chosen[i]] = None
                else:
                    places[i] = None
            self._let_go(list(done))
            with _blaming(first):
                reserved.close()
        for job in done:
            self._hand_on(job, None)
        return [job for job in jobs if job not in done]

    def _let_go(self, jobs: Sequence[WriteJob]) -> None:
        """These blocks are not read any more."""
        for job in jobs:
            del self._unread[job]
            _call(job.done)

    def _ask_first(self, jobs: Sequence[WriteJob]) -> list[bool]:
        """For each block whether no record is to be made of it.

        Tier 0 holds it, or is the only one to get it and gives no answer.
        """
        if self._first is None or not jobs:
            return [True] * len(jobs)  # no tier needs a record
        deadline = time.monotonic() + self._config.write_timeout_s
        with _blaming(self._first):
            answers = self._first.contains_many([job.key.name for job in jobs], deadline)
        asked = [answer for answer, job in zip(answers, jobs, strict=True) if 0 in job.tiers]
        self._first.count_present(asked.count(True))
        # A tier that cannot say what it holds would not take them either.
        self._first.count_dropped(asked.count(None))
        self._silent = {
            job.key.name for job, answer in zip(jobs, answers, strict=True) if answer is None
        }
        return [
            job.tiers == (0,) if answer is None else answer
            for job, answer in zip(jobs, answers, strict=True)
        ]

    def _goes_first(self, job: WriteJob) -> bool:
        """Whether a record is to be put into tier 0."""
        return 0 in job.tiers and job.key.name not in self._silent

    def _put_first(self, jobs: Sequence[WriteJob], records: Sequence[np.ndarray]) -> list[bool]:
        """Write into tier 0 what is to go there; for each whether it has the record now."""
        assert self._first is not None
        chosen = [i for i, job in enumerate(jobs) if self._goes_first(job)]
        kept = [False] * len(jobs)
        if not chosen:
            return kept
        names = [jobs[i].key.name for i in chosen]
        self._not_evicted = set(names)
        with _blaming(self._first):
            outcomes = self._first.put_many(
                names,
                [records[i] for i in chosen],
                [jobs[i].priority for i in chosen],
                time.monotonic() + self._config.write_timeout_s,
            )
        for i, name, is_kept in zip(chosen, names, outcomes, strict=True):
            # Only this thread's puts evict from tier 0; but the last of them may have evicted the
            # first, and no slower tier's writer was waiting for that one yet.
            kept[i] = is_kept and name in self._not_evicted
        return kept

    def _hand_on(self, job: WriteJob, record: np.ndarray | None) -> None:
        """Queue a record for the slower tiers of its job; a copy of it if no faster tier has it."""
        numbers = [number for number in job.tiers if number > 0]
        if not numbers:
            return
        copied = None if record is None else record.copy()
        max_bytes = job.key.layout.max_record_bytes
        for number in numbers:
            self.hand_on(number, TierJob(job.key.name, max_bytes, job.priority, copied))


@contextmanager
def _blaming(tier: GuardedTier) -> Iterator[None]:
    """What is raised here and is no answer of a tier's is a bug of this one."""
    try:
        yield
    except Exception as error:
        tier.mark_down(error)
        raise


def _alike(jobs: Sequence[WriteJob]) -> list[list[WriteJob]]:
    """Jobs of one maker and priority each."""
    by_kind: dict[tuple[int, int], list[WriteJob]] = {}
    for job in jobs:
        by_kind.setdefault((id(job.source.maker), job.priority), []).append(job)
    return [*by_kind.values()]


def _call(callback: Callable[[], None]) -> None:
    """Call back; what it raises is its own, and must not end the writing."""
    try:
        callback()
    except Exception:
        logger.exception("a callback of a saved block failed")
