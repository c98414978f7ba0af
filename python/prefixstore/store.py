"""The tiers in order of speed: verified loads, promotion, background writes.

    save -> queue (bounded) -> writer thread -> record -> memory, disk, ...     (write-through)
    load -> memory? -> disk? -> ... -> verify -> block; the record goes up to faster tiers

What a tier gives is either verified or a counted miss. A failing tier costs its hits and nothing
else: see guarded_tier.py.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from prefixstore.block_key import BlockKey
from prefixstore.block_sources import BlockSource, WrittenRecord
from prefixstore.block_targets import BlockTarget, FetchedRecord, RecordBatch
from prefixstore.breaker import BreakerConfig
from prefixstore.errors import ConfigError
from prefixstore.guarded_tier import GuardedTier
from prefixstore.store_stats import Counts, StoreStats
from prefixstore.tiers.base import PAGE_BYTES, Tier, page_aligned, round_up
from prefixstore.write_queue import WriteJob, WriteQueue, noop

logger = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20  # of records that are fetched and then restored together


@dataclass(frozen=True)
class TierPolicy:
    """What goes into a tier.

    Attributes:
        write_through: Blocks that are saved.
        promote: Blocks that were found in a slower tier.
    """

    write_through: bool = True
    promote: bool = True


@dataclass(frozen=True)
class StoreConfig:
    """Bounds of a store.

    Attributes:
        queue_bytes: Blocks that may wait for the writer, in bytes.
        queue_entries: Blocks that may wait for the writer.
        close_timeout_s: How long `close` waits for the writer before it drops what is left.
        policies: By tier name; a tier not named has the default policy.
        breaker: When a failing tier is left alone.
    """

    queue_bytes: int = 256 << 20
    queue_entries: int = 1024
    close_timeout_s: float = 30.0
    policies: Mapping[str, TierPolicy] = field(default_factory=dict)
    breaker: BreakerConfig = field(default_factory=BreakerConfig)

    def __post_init__(self) -> None:
        for name in ("queue_bytes", "queue_entries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.close_timeout_s < 0:
            raise ConfigError(f"close_timeout_s: expected 0 or more, got {self.close_timeout_s}")


class Store:
    """Records in tiers, fastest first. Thread-safe. Owns its tiers: `close` closes them.

    Args:
        tiers: In order of speed, with distinct names.
        config: Bounds and policies.

    Raises:
        ConfigError: If two tiers share a name or a policy names a tier that is not there.
    """

    def __init__(self, tiers: Sequence[Tier], config: StoreConfig | None = None) -> None:
        self._config = config if config is not None else StoreConfig()
        names = [tier.name for tier in tiers]
        if len(set(names)) != len(names):
            raise ConfigError(f"tiers: expected distinct names, got {names}")
        for name in self._config.policies:
            if name not in names:
                raise ConfigError(f"policies: expected one of {names}, got {name!r}")
        self._policies = [self._config.policies.get(name, TierPolicy()) for name in names]
        self._tiers = [GuardedTier(tier, self._config.breaker) for tier in tiers]
        self._written_through = tuple(
            tier
            for tier, policy in zip(self._tiers, self._policies, strict=True)
            if policy.write_through
        )
        self._counts = Counts()
        self._scratch = threading.local()
        self._queue = WriteQueue(self._config.queue_bytes, self._config.queue_entries)
        self._written_tier: GuardedTier | None = None  # the one to blame if the writer fails now
        self._is_closed = False
        self._writer = threading.Thread(
            target=self._write_jobs, name="prefixstore-writer", daemon=True
        )
        self._writer.start()

    def contains_many(self, keys: Sequence[BlockKey]) -> list[str | None]:
        """For each key the name of the fastest tier that says it holds it, or None."""
        names: list[str | None] = [None] * len(keys)
        for tier in self._tiers:
            missing = [i for i, name in enumerate(names) if name is None]
            if not missing:
                break
            answers = tier.contains_many([keys[i].block_hash for i in missing])
            for i, is_there in zip(missing, answers or (), strict=False):
                if is_there:
                    names[i] = tier.name
        return names

    def load_many(self, keys: Sequence[BlockKey], target: BlockTarget) -> list[str | None]:
        """Restore blocks, each from the fastest tier that has it right.

        Args:
            keys: What the records must agree with.
            target: Gets the blocks, by their index among `keys`; of a miss, garbage.

        Returns:
            For each the tier's name, or None: a miss, which does not stop the rest.
        """
        names: list[str | None] = [None] * len(keys)
        row_bytes = max((key.layout.max_record_bytes for key in keys), default=1)
        num_rows = max(1, BATCH_BYTES // row_bytes)
        # Writing to faster tiers waits until all is loaded, as far as the queue could take it: it
        # would take the processor and the memory from whoever waits for these blocks.
        promotions: list[WriteJob] = []
        num_held = 0
        for first in range(0, len(keys), num_rows):
            indices = range(first, min(first + num_rows, len(keys)))
            found = self._load_batch(keys, indices, target, names)
            num_held += sum(job.source.num_bytes for job in found)
            promotions += found
            if num_held > self._config.queue_bytes:
                self._promote(promotions)
                promotions, num_held = [], 0
        self._promote(promotions)
        self._counts.add(num_loads=len(keys), num_misses=names.count(None))
        return names

    def save(self, key: BlockKey, source: BlockSource, done: Callable[[], None] = noop) -> bool:
        """Hand a block to the background writer; never waits.

        Args:
            key: What the block is.
            source: The block, which must stay alive and unchanged until `done()`.
            done: Called once, from this or the writer's thread, when the block is no longer read.

        Returns:
            False if the queue was full or closed: the block is dropped, and counted.

        Raises:
            ValueError: If the block has another size than the key's; `done` is not called.
        """
        if source.num_bytes != key.layout.block_bytes:
            raise ValueError(
                f"source: expected {key.layout.block_bytes} bytes, got {source.num_bytes}"
            )
        is_taken = self._queue.offer(WriteJob(key, source, False, self._written_through, done))
        if is_taken:
            self._counts.add(num_saved=1)
        else:
            self._counts.add(num_dropped=1)
            done()
        return is_taken

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was saved is written or given up; False if that takes longer."""
        return self._queue.wait_empty(timeout_s)

    def stats(self) -> StoreStats:
        entries, num_bytes = self._queue.sizes()
        return StoreStats(
            tiers=tuple(tier.use() for tier in self._tiers),
            queue_entries=entries,
            queue_bytes=num_bytes,
            **self._counts.as_dict(),
        )

    def check(self) -> list[str]:
        """Recount the queue and every tier; what does not add up, in words."""
        return self._queue.check() + [problem for tier in self._tiers for problem in tier.check()]

    def close(self) -> None:
        """Write what is queued, for at most `close_timeout_s`, and close the tiers."""
        if self._is_closed:
            return
        self._is_closed = True
        self._queue.close()
        self._queue.wait_empty(self._config.close_timeout_s)
        for job in self._queue.clear():
            self._counts.add(num_dropped=1)
            job.done()
        self._writer.join(timeout=1.0)  # only a tier that hangs keeps it; it is a daemon
        for tier in self._tiers:
            tier.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load_batch(
        self,
        keys: Sequence[BlockKey],
        indices: range,
        target: BlockTarget,
        names: list[str | None],
    ) -> list[WriteJob]:
        """Ask tier after tier for those of `keys` at `indices`; returns what is to go up."""
        promotions: list[WriteJob] = []
        row_bytes = max(keys[index].layout.max_record_bytes for index in indices)
        for number, tier in enumerate(self._tiers):
            missing = [index for index in indices if names[index] is None]
            if not missing:
                break
            batch = RecordBatch(self._take_slab(len(missing), row_bytes), [])
            for index in missing:
                row = batch.slab[len(batch.records)]
                header = tier.fetch(keys[index], row)
                if header is not None:
                    record = row[: header.key.layout.record_bytes]
                    batch.records.append(FetchedRecord(index, keys[index], header, record))
            problems = target.restore(batch) if batch.records else []
            for record, problem in zip(batch.records, problems, strict=True):
                if problem is not None:
                    tier.reject(record.key, problem)
                    continue
                tier.accept(record.data.nbytes)
                names[record.index] = tier.name
                tiers = tuple(self._tiers[i] for i in range(number) if self._policies[i].promote)
                if tiers:
                    source = WrittenRecord(record.data)  # no copy: the slab is theirs from now on
                    promotions.append(WriteJob(record.key, source, True, tiers))
                    self._scratch.slab = None
        return promotions

    def _promote(self, jobs: Sequence[WriteJob]) -> None:
        """Hand records on to faster tiers."""
        for job in jobs:
            if not self._queue.offer(job):
                self._counts.add(num_promotions_dropped=1)

    def _take_slab(self, num_rows: int, row_bytes: int) -> np.ndarray:
        """This thread's buffer, as rows for one record each that start on pages."""
        row_bytes = round_up(row_bytes, PAGE_BYTES)
        num_bytes = num_rows * row_bytes
        slab = getattr(self._scratch, "slab", None)
        if slab is None or slab.nbytes < num_bytes:
            slab = self._scratch.slab = page_aligned(num_bytes)
        return slab[:num_bytes].reshape(num_rows, row_bytes)

    # ---- in the writer's thread --------------------------------------------------------------

    def _write_jobs(self) -> None:
        while (job := self._queue.take()) is not None:
            self._written_tier = None
            try:
                self._write(job)
            except Exception as error:  # a bug of a tier or callback must not end the writing
                logger.exception("block %s: not written", job.key.block_hash.hex())
                if self._written_tier is not None:
                    self._written_tier.mark_down(error)
            finally:
                self._queue.finish(job)

    def _write(self, job: WriteJob) -> None:
        held = ExitStack()
        held.callback(job.done)
        with held:
            lacking, num_holding = [], 0
            for tier in job.tiers:
                self._written_tier = tier
                answer = tier.contains_many([job.key.block_hash])  # None: not now, and no put
                if answer == [False]:
                    lacking.append(tier)
                num_holding += answer == [True]
            self._written_tier = None
            if not lacking:
                if num_holding == len(job.tiers) and not job.is_promotion:
                    self._counts.add(num_present=1)
                return
            with job.source.record(job.key) as record:
                held.close()  # the block is read
                for tier in lacking:
                    self._written_tier = tier
                    tier.put(job.key, record)
                self._written_tier = None
