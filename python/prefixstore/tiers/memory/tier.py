"""Records in host memory: one arena, allocated once, which never grows.

Copies run outside the lock, on slots that are pinned meanwhile. See arena.py for where
records lie and which give way.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from prefixstore.block_key import BlockHash, RecordName
from prefixstore.errors import BlockCorrupted, ConfigError, TierError, TierFull, TierUnavailable
from prefixstore.settings import check_seconds
from prefixstore.tiers.base import (
    EvictionListener,
    Held,
    LookOutcome,
    ReadOutcome,
    Swept,
    Tier,
    TierCounters,
    TierStats,
    check_bytes,
    check_priority,
    is_past,
    too_late,
)
from prefixstore.tiers.memory.arena import Arena
from prefixstore.tiers.memory.slots import Record, Tenant
from prefixstore.tiers.pages import PAGE_BYTES

_MAX_SLAB_BYTES = 256 << 20


@dataclass(frozen=True)
class MemoryTierConfig:
    """Bounds of a memory tier.

    Attributes:
        capacity_bytes: All that the arena may take; rounded down to whole slabs.
        slab_bytes: Unit in which memory moves between record sizes, and the longest record.
            Default: a sixteenth of the capacity, at most 256 MiB.
        ttl_s: Seconds after which a record that was not used expires; None for never.
        quota_bytes: Records of one identity, a model and salt, take no more; then its own least
            recently used ones give way. None for no bound but the capacity.
        name: In messages and statistics.
    """

    capacity_bytes: int
    slab_bytes: int | None = None
    ttl_s: float | None = None
    quota_bytes: int | None = None
    name: str = "memory"

    def __post_init__(self) -> None:
        check_bytes("capacity_bytes", self.capacity_bytes, PAGE_BYTES)
        if self.ttl_s is not None:
            check_seconds("ttl_s", self.ttl_s)
        if self.quota_bytes is not None:
            check_bytes("quota_bytes", self.quota_bytes, 1)
        if self.slab_bytes is None:
            return
        check_bytes("slab_bytes", self.slab_bytes, PAGE_BYTES)
        if self.slab_bytes > self.capacity_bytes:
            raise ConfigError(
                f"slab_bytes: expected at most {self.capacity_bytes} (capacity_bytes),"
                f" got {self.slab_bytes}"
            )

    @property
    def resolved_slab_bytes(self) -> int:
        """`slab_bytes` or its default, in whole pages."""
        wanted = self.slab_bytes or min(self.capacity_bytes // 16, _MAX_SLAB_BYTES)
        return max(wanted // PAGE_BYTES, 1) * PAGE_BYTES


class MemoryTier(Tier):
    """A bounded tier in this process's memory; least recently used records give way.

    Args:
        config: Its bounds.
        clock: Seconds, for expiry.
    """

    def __init__(
        self, config: MemoryTierConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._clock = clock
        self._arena = self._make_arena(config.capacity_bytes)
        self._counters = TierCounters()
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def name(self) -> str:
        return self._config.name

    def get_many(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        *,
        offsets: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        starts: Sequence[int | None] = [None] * len(names) if offsets is None else offsets
        return [
            too_late(self.name) if is_past(deadline) else self._read(name.block_hash, out, start)
            for name, out, start in zip(names, outs, starts, strict=True)
        ]

    @property
    def lends(self) -> bool:
        return True

    @contextmanager
    def lend_many(self, names: Sequence[RecordName]) -> Iterator[list[np.ndarray | None]]:
        with self._locked():
            arena = self._arena  # that of the records, also where the tier is closed meanwhile
            lent = [self._take(name.block_hash) for name in names]
        try:
            yield [None if record is None else record.data for record in lent]
        finally:
            with self._lock:
                for record in lent:
                    if record is not None:
                        arena.unpin(record)

    @property
    def lent_memory(self) -> np.ndarray | None:
        return self._arena.memory

    def put_many(
        self,
        names: Sequence[RecordName],
        records: Sequence[memoryview],
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> list[TierError | None]:
        check_priority(priority)
        return [
            too_late(self.name) if is_past(deadline) else self._write(name, record, priority)
            for name, record in zip(names, records, strict=True)
        ]

    @property
    def reserves(self) -> bool:
        return True

    @contextmanager
    def reserve_many(
        self, names: Sequence[RecordName], sizes: Sequence[int], *, priority: int = 0
    ) -> Iterator[list[np.ndarray | None]]:
        check_priority(priority)
        with self._locked():
            arena = self._arena  # that of the records, also where the tier is closed meanwhile
            reserved = [
                self._try_allocate(name, size, priority)
                for name, size in zip(names, sizes, strict=True)
            ]
        places = [None if record is None else record.data for record in reserved]
        is_whole = False
        try:
            yield places
            is_whole = True
        finally:
            with self._lock:
                for record, place in zip(reserved, places, strict=True):
                    if record is None:
                        continue
                    if is_whole and place is not None:
                        self._publish(arena, record)
                    else:
                        arena.unpin(record)

    def contains_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[LookOutcome]:
        with self._locked():
            return [self._find(name.block_hash) is not None for name in names]

    def delete_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[LookOutcome]:
        with self._locked():
            return [self._delete(self._find(name.block_hash)) for name in names]

    def delete_identity(self, identity: bytes) -> None:
        with self._locked():
            for record in list(self._arena.tenants.get(identity, Tenant()).records.values()):
                self._delete(record)

    def pin_many(self, names: Sequence[RecordName], is_pinned: bool = True) -> list[bool]:
        with self._locked():
            found = [self._find(name.block_hash) for name in names]
            for record in found:
                if record is not None:
                    self._arena.keep(record, is_pinned)
            return [record is not None for record in found]

    def on_evict(self, listener: EvictionListener) -> bool:
        self._arena.listener = listener
        return True

    def list_identities(self) -> dict[bytes, Held]:
        with self._locked():
            return {
                identity: Held(len(records), sum(record.data.size for record in records.values()))
                for identity, tenant in self._arena.tenants.items()
                if (records := tenant.records)
            }

    def stats(self) -> TierStats:
        with self._lock:
            self._counters.num_evictions = self._arena.num_evictions
            used_bytes, num_records = self._arena.used_bytes, len(self._arena.records)
            return self._counters.stats(self._config.capacity_bytes, used_bytes, num_records)

    def check(self, fix: bool = False) -> list[str]:
        """Recount everything; with `fix` empty the tier where it does not add up."""
        with self._locked():
            problems = self._arena.check()
            if problems and fix:
                self._arena.clear()
            return problems

    def sweep(self) -> Swept:
        with self._locked():
            expired = [r for r in self._arena.records.values() if self._is_expired(r)]
            for record in expired:
                self._expire(record)
            return Swept(len(expired), num_bytes=sum(record.data.size for record in expired))

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._arena.clear()
            # A copy under way keeps the old arena alive until it ends.
            self._arena = self._make_arena(0)

    def _read(self, block_hash: BlockHash, out: memoryview, start: int | None) -> ReadOutcome:
        """One record, or from `start` on as much of it as `out` holds."""
        with self._locked():
            arena = self._arena
            record = self._take(block_hash)
        if record is None:
            return None
        try:
            data = record.data if start is None else record.data[start : start + out.nbytes]
            if data.size > out.nbytes:
                return BlockCorrupted(
                    f"{self.name}: expected a record of at most {out.nbytes} bytes, got {data.size}"
                )
            np.copyto(_as_array(out)[: data.size], data)
            return data.size
        finally:
            with self._lock:
                arena.unpin(record)

    def _write(self, name: RecordName, record: memoryview, priority: int) -> TierError | None:
        try:
            with self._locked():
                if self._find(name.block_hash) is not None:
                    return None
                arena = self._arena
                entry = arena.allocate(name, record.nbytes, priority)
        except TierFull as error:
            return error
        np.copyto(entry.data, _as_array(record))
        with self._lock:
            self._publish(arena, entry)
        return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            if self._is_closed:
                raise TierUnavailable(f"{self.name}: expected an open tier, got a closed one")
            yield

    def _make_arena(self, num_bytes: int) -> Arena:
        slab_bytes = self._config.resolved_slab_bytes
        return Arena(self.name, num_bytes // slab_bytes, slab_bytes, self._config.quota_bytes)

    @property
    def _ttl_s(self) -> float:
        return math.inf if self._config.ttl_s is None else self._config.ttl_s

    # ---- all below runs under the lock -------------------------------------------------------

    def _find(self, block_hash: BlockHash) -> Record | None:
        record = self._arena.records.get(block_hash)
        if record is None or not self._is_expired(record):
            return record
        self._expire(record)
        return None

    def _try_allocate(self, name: RecordName, size: int, priority: int) -> Record | None:
        """A slot for a record; None if it is there already, or for want of room."""
        if self._find(name.block_hash) is not None:
            return None
        try:
            return self._arena.allocate(name, size, priority)
        except TierFull:
            return None

    def _publish(self, arena: Arena, record: Record) -> None:
        """Enter a record that is whole."""
        if arena.publish(record, self._clock() + self._ttl_s):
            self._counters.num_puts += 1
            self._counters.written_bytes += record.data.size

    def _take(self, block_hash: BlockHash) -> Record | None:
        """The record, pinned and marked used; a hit or a miss."""
        record = self._find(block_hash)
        if record is None:
            self._counters.num_misses += 1
            return None
        self._arena.touch(record, self._clock() + self._ttl_s)
        self._arena.pin(record)
        self._counters.num_hits += 1
        self._counters.read_bytes += record.data.size
        return record

    def _delete(self, record: Record | None) -> bool:
        if record is None:
            return False
        self._arena.remove(record)
        self._counters.num_deletes += 1
        return True

    def _is_expired(self, record: Record) -> bool:
        return not record.is_kept and record.expires_s <= self._clock()

    def _expire(self, record: Record) -> None:
        self._arena.remove(record)
        self._counters.num_expired += 1


def _as_array(view: memoryview) -> np.ndarray:
    return np.frombuffer(view, np.uint8)
