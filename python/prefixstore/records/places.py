"""Where records lie that a command is asked about: a file with one, or the directory of a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from prefixstore.block_key import RecordName
from prefixstore.errors import BlockCorrupted, ConfigError
from prefixstore.tiers.disk import DiskTier, DiskTierConfig

_UNBOUNDED = 1 << 62  # who only looks must evict nothing


@contextmanager
def open_store(path: Path) -> Iterator[DiskTier]:
    """The disk tier in a directory, beside the processes that serve from it.

    Raises:
        ConfigError: If there is no disk tier.
        TierUnavailable: If it cannot be opened.
    """
    with closing(open_disk(DiskTierConfig(path, _UNBOUNDED))) as tier:
        yield tier


def open_disk(config: DiskTierConfig) -> DiskTier:
    """A disk tier that is there, to be looked at: whatever its bound, nothing is evicted.

    Raises:
        ConfigError: If there is no disk tier.
        TierUnavailable: If it cannot be opened.
    """
    # Opening makes what is not there; a mistyped path must not become a store.
    path = config.path
    if not (path / "index.sqlite").is_file() and not any(path.glob("slab-v*.kvb")):
        raise ConfigError(f"store: expected the directory of a disk tier, got {path}")
    return DiskTier(replace(config, capacity_bytes=_UNBOUNDED))


def read_record(tier: DiskTier, name: RecordName, num_bytes: int) -> bytes | None:
    """A record's bytes, or None where it is gone by now, or a longer one is there instead.

    Raises:
        TierError: If it cannot be read.
    """
    out = bytearray(num_bytes)
    try:
        num_read = tier.peek(name, memoryview(out))
    except BlockCorrupted:
        return None
    return None if num_read is None else bytes(out[:num_read])


def find_record(tier: DiskTier, prefix: str) -> bytes:
    """The record whose block hash begins with these hexadecimal digits.

    Raises:
        ConfigError: If there is none, or more than one.
    """
    records = tier.list_records()
    found = [r for r in records if r[0].block_hash.hex().startswith(prefix.lower())]
    if len(found) != 1:
        raise ConfigError(
            f"block: expected the first digits of one block's hash, got {prefix!r}, which"
            f" {len(found)} blocks have"
        )
    record = read_record(tier, *found[0])
    if record is None:
        raise ConfigError(f"block: expected a record that stays, got {prefix!r}, evicted meanwhile")
    return record
