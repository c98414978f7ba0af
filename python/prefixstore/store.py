"""The tiers in order of speed: verified loads, promotion, background writes.

    save -> queue (bounded) -> writer thread -> encode -> memory, disk, ...     (write-through)
    load -> memory? -> disk? -> ... -> verify -> payload; the record goes up to faster tiers

What a tier gives is either verified or a counted miss. A failing tier costs its hits and nothing
else: see guarded_tier.py.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from prefixstore.breaker import BreakerConfig
from prefixstore.checksum import Buffer, as_bytes
from prefixstore.errors import ConfigError
from prefixstore.guarded_tier import GuardedTier
from prefixstore.record import BlockKey, encode
from prefixstore.store_stats import Counts, StoreStats
from prefixstore.tiers.base import Tier, page_aligned
from prefixstore.write_queue import WriteJob, WriteQueue, noop

logger = logging.getLogger(__name__)


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
        queue_bytes: Payload that may wait for the writer.
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

    def load(self, key: BlockKey, payload_out: Buffer) -> str | None:
        """Read a block from the fastest tier that has it right.

        Args:
            key: What the record must agree with.
            payload_out: `key.layout.payload_bytes`, written in place; garbage on a miss.

        Returns:
            The tier's name, or None: a miss.

        Raises:
            ValueError: If `payload_out` has another size, is not contiguous or is read-only.
        """
        target = _payload_bytes("payload_out", payload_out, key)
        if target.readonly:
            raise ValueError("payload_out: expected a writable buffer, got a read-only one")
        record = self._scratch_record(key)
        for index, tier in enumerate(self._tiers):
            if tier.load(key, record, target):
                self._counts.add(num_loads=1)
                self._promote(index, key, record)
                return tier.name
        self._counts.add(num_loads=1, num_misses=1)
        return None

    def load_many(
        self, keys: Sequence[BlockKey], payload_outs: Sequence[Buffer]
    ) -> list[str | None]:
        """`load` for each key; a miss does not stop the rest."""
        return [self.load(*pair) for pair in zip(keys, payload_outs, strict=True)]

    def save(self, key: BlockKey, payload: Buffer, done: Callable[[], None] = noop) -> bool:
        """Hand a block to the background writer; never waits.

        Args:
            key: What the block is.
            payload: `key.layout.payload_bytes`; must stay alive and unchanged until `done()`.
            done: Called once, from this or the writer's thread, when `payload` is no longer read.

        Returns:
            False if the queue was full or closed: the block is dropped, and counted.

        Raises:
            ValueError: If `payload` has another size or is not contiguous; `done` is not called.
        """
        data = _payload_bytes("payload", payload, key)
        is_taken = self._queue.offer(WriteJob(key, data, False, self._written_through, done))
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

    def _promote(self, found_index: int, key: BlockKey, record: np.ndarray) -> None:
        """Hand the record on to faster tiers without a copy: the queue owns it if it takes it."""
        tiers = tuple(self._tiers[i] for i in range(found_index) if self._policies[i].promote)
        if not tiers:
            return
        if self._queue.offer(WriteJob(key, record.data, True, tiers)):
            self._scratch.record = None
        else:
            self._counts.add(num_promotions_dropped=1)

    def _scratch_record(self, key: BlockKey) -> np.ndarray:
        """This thread's buffer for one record."""
        record = getattr(self._scratch, "record", None)
        if record is None or record.nbytes != key.layout.record_bytes:
            record = self._scratch.record = page_aligned(key.layout.record_bytes)
        return record

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
        try:
            lacking, num_holding = [], 0
            for tier in job.tiers:
                self._written_tier = tier
                answer = tier.contains_many([job.key.block_hash])  # None: not now, and no put
                if answer == [False]:
                    lacking.append(tier)
                num_holding += answer == [True]
            self._written_tier = None
            record = np.frombuffer(job.data, np.uint8)
            if lacking and not job.is_record:
                record = self._scratch_record(job.key)
                encode(job.key, job.data, record)
        finally:
            job.done()
        if num_holding == len(job.tiers) and not job.is_record:
            self._counts.add(num_present=1)
        for tier in lacking:
            self._written_tier = tier
            tier.put(job.key, record)


def _payload_bytes(name: str, payload: Buffer, key: BlockKey) -> memoryview:
    view, expected = as_bytes(name, payload), key.layout.payload_bytes
    if view.nbytes != expected:
        raise ValueError(f"{name}: expected {expected} bytes, got {view.nbytes}")
    return view
