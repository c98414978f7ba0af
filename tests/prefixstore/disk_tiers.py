"""Opens, fills and reads disk tiers, for their tests."""

from pathlib import Path

import numpy as np
from sample_blocks import make_payload, make_record

from prefixstore.block_key import BlockHash, RecordName
from prefixstore.errors import BlockCorrupted, TierError
from prefixstore.record import BlockKey, decode
from prefixstore.tiers.base import PAGE_BYTES, page_aligned, round_up
from prefixstore.tiers.disk import DiskTier, DiskTierConfig

CAPACITY = 2 << 20
MIB = 1 << 20


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.seconds = 1e6

    def __call__(self) -> float:
        return self.seconds


def open_tier(path: Path, *, clock: Clock | None = None, **settings) -> DiskTier:
    return DiskTier(DiskTierConfig(path, **{"capacity_bytes": CAPACITY, **settings}), clock)


def put(tier: DiskTier, keys: list[BlockKey]) -> None:
    for key in keys:
        tier.put(key.name, memoryview(make_record(key)))


def count_right(tier: DiskTier, keys: list[BlockKey]) -> int:
    """How many come back and verify; one that comes back right but is not fails the test."""
    num_right = 0
    for key in keys:
        record, payload = bytearray(key.layout.record_bytes), bytearray(key.layout.payload_bytes)
        num_read = tier.get(key.name, memoryview(record))
        if num_read is not None:
            try:
                decode(record[:num_read], key, payload)
            except BlockCorrupted:
                continue
            assert payload == make_payload(key).tobytes()
            num_right += 1
    return num_right


def make_names(num: int, seed: int = 0) -> list[RecordName]:
    random = np.random.default_rng(seed)
    return [RecordName(bytes(16), BlockHash(random.bytes(16))) for _ in range(num)]


def make_bytes(num_bytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def get_all(
    tier: DiskTier, names: list[RecordName], num_bytes: int, deadline: float | None = None
) -> list[bytes | TierError | None]:
    outs = [page_aligned(round_up(num_bytes, PAGE_BYTES)) for _ in names]
    outcomes = tier.get_many(names, [out.data for out in outs], deadline=deadline)
    return [
        out[:outcome].tobytes() if isinstance(outcome, int) else outcome
        for out, outcome in zip(outs, outcomes, strict=True)
    ]
