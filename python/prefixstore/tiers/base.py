"""What every tier does: keeps records by block hash, in bytes, within a bound."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from prefixstore.block_key import BlockHash
from prefixstore.errors import ConfigError

PAGE_BYTES = 4096


@dataclass(frozen=True)
class TierStats:
    """What a tier holds now and has done since it was opened, by this process."""

    capacity_bytes: int
    used_bytes: int
    num_records: int
    num_hits: int
    num_misses: int
    num_puts: int
    num_deletes: int
    num_evictions: int
    read_bytes: int
    written_bytes: int


@dataclass
class TierCounters:
    """The counters behind `TierStats`; changed only under the tier's lock."""

    num_hits: int = 0
    num_misses: int = 0
    num_puts: int = 0
    num_deletes: int = 0
    num_evictions: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    def stats(self, capacity_bytes: int, used_bytes: int, num_records: int) -> TierStats:
        return TierStats(
            capacity_bytes=capacity_bytes,
            used_bytes=used_bytes,
            num_records=num_records,
            **vars(self),
        )


class Tier(Protocol):
    """A place for records: bytes in, bytes out. Safe to call from several threads.

    A tier never looks into a record to answer: whoever gets one verifies it. Records are immutable
    under their hash, so a tier keeps what it has when the same hash is put again. Every call may
    raise `TierUnavailable` or `TierTimeout`; after either, nothing that was held is lost.
    """

    @property
    def name(self) -> str:
        """Unique among the tiers of one store; stands in messages and statistics."""
        ...

    def get(self, block_hash: BlockHash, out: memoryview) -> int | None:
        """Read a record into `out`, from its start, and mark it used.

        Returns:
            Bytes read, or None where there is no such record. Fewer bytes than were put mean
            that the tier's medium was truncated.

        Raises:
            BlockCorrupted: If the record is longer than `out`: not the one that was asked for.
        """
        ...

    def put(self, block_hash: BlockHash, record: memoryview) -> None:
        """Keep a record, evicting others for it. When this returns, `get` finds it.

        Raises:
            TierFull: If there is no room, even after evicting what may be evicted.
        """
        ...

    def contains(self, block_hash: BlockHash) -> bool:
        """Whether `get` would find it now; does not mark it used."""
        ...

    def delete(self, block_hash: BlockHash) -> bool:
        """Forget a record; False where there was none."""
        ...

    def contains_many(self, block_hashes: Sequence[BlockHash]) -> list[bool]:
        """`contains` for each."""
        ...

    def stats(self) -> TierStats: ...

    def check(self) -> list[str]:
        """Recount everything; what does not add up, in words. Empty when all is well."""
        ...

    def close(self) -> None:
        """Give back what the tier holds open; any later call raises `TierUnavailable`."""
        ...


def check_bytes(name: str, value: int, least: int) -> None:
    """Raise `ConfigError` unless a setting is a whole number of bytes that is large enough."""
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected an integer of at least {least}, got {value!r}")


def page_aligned(num_bytes: int) -> np.ndarray:
    """An uninitialised uint8 array that starts on a page, so that copies and devices may stream."""
    if num_bytes == 0:
        return np.empty(0, np.uint8)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, num_bytes, flags=private), np.uint8)


def round_up(num_bytes: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `num_bytes`."""
    return -(-num_bytes // unit) * unit
