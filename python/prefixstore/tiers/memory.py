"""Records in host memory: one arena, allocated once, cut into slabs of equal slots.

    arena  | slab 0: slots of 4 KiB x 16 | slab 1: slots of 20 KiB x 3 | slab 2: unused | ...

Invariants: a slab serves one slot size at a time; a slot is free, being written, or holds one
record; a record is in the table only once it is whole. The least recently used record of its own
size gives way to a new one, unless a slab of another size has been idle for longer: then that whole
slab changes sides. Copies run outside the lock, on slots that are pinned meanwhile.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from prefixstore.block_key import BlockHash
from prefixstore.errors import BlockCorrupted, ConfigError, TierFull, TierUnavailable
from prefixstore.tiers.base import (
    PAGE_BYTES,
    TierCounters,
    TierStats,
    check_bytes,
    page_aligned,
    round_up,
)

_MAX_SLAB_BYTES = 256 << 20


@dataclass(frozen=True)
class MemoryTierConfig:
    """Bounds of a memory tier.

    Attributes:
        capacity_bytes: All that the arena may take; rounded down to whole slabs.
        slab_bytes: Unit in which memory moves between record sizes, and the longest record.
            Default: a sixteenth of the capacity, at most 256 MiB.
        name: In messages and statistics.
    """

    capacity_bytes: int
    slab_bytes: int | None = None
    name: str = "memory"

    def __post_init__(self) -> None:
        check_bytes("capacity_bytes", self.capacity_bytes, PAGE_BYTES)
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


@dataclass(eq=False)
class _Slab:
    offset: int
    slot_bytes: int = 0  # 0: serves no size yet
    free_offsets: list[int] = field(default_factory=list)
    records: set[_Record] = field(default_factory=set)
    num_pinned: int = 0  # slots that a copy is using
    last_used: int = 0


@dataclass(eq=False)
class _Record:
    block_hash: BlockHash
    slab: _Slab
    offset: int
    data: np.ndarray  # its bytes in the arena
    num_pins: int = 0
    is_published: bool = False
    last_used: int = 0


class MemoryTier:
    """A bounded tier in this process's memory; least recently used records give way."""

    def __init__(self, config: MemoryTierConfig) -> None:
        self._config = config
        self._slab_bytes = config.resolved_slab_bytes
        num_slabs = config.capacity_bytes // self._slab_bytes
        self._arena = page_aligned(num_slabs * self._slab_bytes)
        self._slabs = [_Slab(i * self._slab_bytes) for i in range(num_slabs)]
        self._records: dict[BlockHash, _Record] = {}
        # by slot size; least recently used first
        self._lru: dict[int, OrderedDict[BlockHash, _Record]] = {}
        self._used_bytes = 0
        self._clock = 0
        self._counters = TierCounters()
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def name(self) -> str:
        return self._config.name

    def get(self, block_hash: BlockHash, out: memoryview) -> int | None:
        with self._locked():
            record = self._records.get(block_hash)
            if record is None:
                self._counters.num_misses += 1
                return None
            if record.data.size > out.nbytes:
                raise BlockCorrupted(
                    f"{self.name}: expected a record of at most {out.nbytes} bytes,"
                    f" got {record.data.size}"
                )
            self._touch(record)
            self._pin(record)
            self._counters.num_hits += 1
            self._counters.read_bytes += record.data.size
        try:
            np.copyto(_as_array(out)[: record.data.size], record.data)
        finally:
            with self._lock:
                self._unpin(record)
        return record.data.size

    def put(self, block_hash: BlockHash, record: memoryview) -> None:
        with self._locked():
            if block_hash in self._records:
                return
            entry = self._allocate(block_hash, record.nbytes)
        np.copyto(entry.data, _as_array(record))
        with self._lock:
            self._publish(entry)

    def contains(self, block_hash: BlockHash) -> bool:
        with self._locked():
            return block_hash in self._records

    def delete(self, block_hash: BlockHash) -> bool:
        with self._locked():
            record = self._records.get(block_hash)
            if record is None:
                return False
            self._remove(record)
            self._counters.num_deletes += 1
            return True

    def contains_many(self, block_hashes: Sequence[BlockHash]) -> list[bool]:
        with self._locked():
            return [block_hash in self._records for block_hash in block_hashes]

    def stats(self) -> TierStats:
        with self._lock:
            return self._counters.stats(
                self._config.capacity_bytes, self._used_bytes, len(self._records)
            )

    def check(self) -> list[str]:
        with self._locked():
            return [problem for slab in self._slabs for problem in self._check_slab(slab)] + [
                *self._check_tables()
            ]

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._records.clear()
            self._lru.clear()
            self._used_bytes = 0
            self._slabs = []
            self._arena = page_aligned(0)  # a copy under way keeps the old one until it ends

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            if self._is_closed:
                raise TierUnavailable(f"{self.name}: expected an open tier, got a closed one")
            yield

    # ---- all below runs under the lock -------------------------------------------------------

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _touch(self, record: _Record) -> None:
        record.last_used = record.slab.last_used = self._tick()
        self._lru[record.slab.slot_bytes].move_to_end(record.block_hash)

    def _pin(self, record: _Record) -> None:
        record.num_pins += 1
        record.slab.num_pinned += 1

    def _unpin(self, record: _Record) -> None:
        record.num_pins -= 1
        record.slab.num_pinned -= 1
        if record.num_pins == 0 and not record.is_published:
            self._free(record)

    def _allocate(self, block_hash: BlockHash, num_bytes: int) -> _Record:
        """A pinned slot, not yet in the table."""
        slot_bytes = round_up(max(num_bytes, 1), PAGE_BYTES)
        if slot_bytes > self._slab_bytes:
            raise TierFull(
                f"{self.name}: expected records of at most {self._slab_bytes} bytes (slab_bytes),"
                f" got {num_bytes}"
            )
        slab = self._find_slab(slot_bytes)
        offset = slab.free_offsets.pop()
        record = _Record(block_hash, slab, offset, self._arena[offset : offset + num_bytes])
        slab.records.add(record)
        self._pin(record)
        return record

    def _publish(self, record: _Record) -> None:
        if self._is_closed or record.block_hash in self._records:
            self._unpin(record)  # frees the slot: another thread put the same block first
            return
        record.is_published = True
        self._records[record.block_hash] = record
        self._lru[record.slab.slot_bytes][record.block_hash] = record
        self._used_bytes += record.data.size
        self._touch(record)
        self._unpin(record)
        self._counters.num_puts += 1
        self._counters.written_bytes += record.data.size

    def _remove(self, record: _Record) -> None:
        record.is_published = False
        del self._records[record.block_hash]
        del self._lru[record.slab.slot_bytes][record.block_hash]
        self._used_bytes -= record.data.size
        if record.num_pins == 0:
            self._free(record)

    def _free(self, record: _Record) -> None:
        record.slab.records.discard(record)
        record.slab.free_offsets.append(record.offset)

    def _find_slab(self, slot_bytes: int) -> _Slab:
        """A slab of this slot size with a free slot, evicting for it if need be."""
        lru = self._lru.setdefault(slot_bytes, OrderedDict())
        unused = None
        for slab in self._slabs:
            if slab.slot_bytes == slot_bytes and slab.free_offsets:
                return slab
            if not slab.records and (slab.slot_bytes == 0 or unused is None):
                unused = slab
        if unused is not None:
            return self._assign(unused, slot_bytes)
        victim = next((record for record in lru.values() if record.num_pins == 0), None)
        others = [s for s in self._slabs if s.slot_bytes != slot_bytes and not s.num_pinned]
        coldest = min(others, key=lambda slab: slab.last_used, default=None)
        if coldest is not None and (victim is None or coldest.last_used < victim.last_used):
            for record in list(coldest.records):
                self._remove(record)
                self._counters.num_evictions += 1
            return self._assign(coldest, slot_bytes)
        if victim is None:
            raise TierFull(f"{self.name}: expected a slot of {slot_bytes} bytes, all are in use")
        self._remove(victim)
        self._counters.num_evictions += 1
        return victim.slab

    def _assign(self, slab: _Slab, slot_bytes: int) -> _Slab:
        slab.slot_bytes = slot_bytes
        num_slots = self._slab_bytes // slot_bytes
        slab.free_offsets = [slab.offset + i * slot_bytes for i in range(num_slots)][::-1]
        return slab

    def _check_slab(self, slab: _Slab) -> Iterator[str]:
        where = f"{self.name}: slab at {slab.offset}"
        offsets = slab.free_offsets + [record.offset for record in slab.records]
        num_slots = self._slab_bytes // slab.slot_bytes if slab.slot_bytes else 0
        wanted = [slab.offset + i * slab.slot_bytes for i in range(num_slots)]
        if sorted(offsets) != wanted:
            yield f"{where}: expected each of {num_slots} slots once, got {sorted(offsets)}"
        num_pinned = sum(record.num_pins for record in slab.records)
        if num_pinned != slab.num_pinned:
            yield f"{where}: expected {num_pinned} pins, got {slab.num_pinned}"
        for record in slab.records:
            if record.data.size > slab.slot_bytes or record.slab is not slab:
                yield f"{where}: record {record.block_hash.hex()} does not fit its slot"
            if record.is_published != (self._records.get(record.block_hash) is record):
                yield f"{where}: record {record.block_hash.hex()} is not as published"

    def _check_tables(self) -> Iterator[str]:
        used_bytes = sum(record.data.size for record in self._records.values())
        if used_bytes != self._used_bytes:
            yield f"{self.name}: expected {used_bytes} used bytes, got {self._used_bytes}"
        by_size = {h: record for lru in self._lru.values() for h, record in lru.items()}
        if by_size != self._records:
            yield f"{self.name}: expected every record in one order of use"
        for slot_bytes, lru in self._lru.items():
            ticks = [record.last_used for record in lru.values()]
            if ticks != sorted(ticks):
                yield f"{self.name}: records of {slot_bytes} bytes are not in order of use"


def _as_array(view: memoryview) -> np.ndarray:
    return np.frombuffer(view, np.uint8)
