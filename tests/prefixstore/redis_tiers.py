"""What the tests of the Redis tier share: tiers, names, records of any length, and deadlines."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable

import numpy as np
import pytest
import redis

from prefixstore.block_key import BlockHash, RecordName
from prefixstore.errors import TierError, TierTimeout
from prefixstore.tiers.redis import RedisTier
from prefixstore.tiers.redis.config import RedisTierConfig

PART = 1 << 16
TIGHT = 0.5  # timeout in seconds of a call that cannot succeed
SLACK = 0.4  # what a busy machine may add


def open_tier(url: str, **settings: object) -> RedisTier:
    """Open a tier, by default with small parts and its own key prefix."""
    settings = {"part_bytes": PART, "prefix": f"t{secrets.token_hex(8)}", **settings}
    return RedisTier(RedisTierConfig.from_url(url, **settings))


def make_names(count: int, identity: bytes = b"i" * 16) -> list[RecordName]:
    return [RecordName(identity, BlockHash(secrets.token_bytes(16))) for _ in range(count)]


def random_bytes(num_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(num_bytes)


def put(tier: RedisTier, names: list[RecordName], records: list[bytes], **options) -> list:
    return tier.put_many(names, [memoryview(record) for record in records], **options)


def get(tier: RedisTier, names: list[RecordName], num_bytes: int, **options) -> list:
    """For each name the record, None, or the error."""
    outs = [bytearray(b"\xee" * num_bytes) for _ in names]
    outcomes = tier.get_many(names, [memoryview(out) for out in outs], **options)
    return [
        outcome if outcome is None or isinstance(outcome, TierError) else bytes(out[:outcome])
        for outcome, out in zip(outcomes, outs, strict=True)
    ]


def part_keys(client: redis.Redis, name: RecordName) -> list[bytes]:
    return sorted(client.keys(f"*{{{name.block_hash.hex()}}}:*"))


def record_key(client: redis.Redis, name: RecordName) -> bytes:
    (key,) = client.keys(f"*{{{name.block_hash.hex()}}}")
    return key


def assert_in_time(begin: float, seconds: float = TIGHT) -> None:
    assert time.monotonic() - begin < seconds + SLACK


def assert_gives_up(call: Callable[[], object], seconds: float = TIGHT) -> None:
    """Check that the call times out within that time.

    Tried up to three times: a stalled machine makes a call late once, a tier that waits too long
    every time.
    """
    taken = []
    while len(taken) < 3 and min(taken, default=math.inf) >= seconds + SLACK:
        begin = time.monotonic()
        with pytest.raises(TierTimeout):
            call()
        taken.append(time.monotonic() - begin)
    assert min(taken) < seconds + SLACK, taken
