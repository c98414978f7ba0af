"""Every kind of tier, for tests of the common contract."""

import secrets
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from redis_servers import FLAVOURS
from sample_blocks import make_record

from prefixstore.block_key import BlockKey
from prefixstore.keys import ProtectionConfig
from prefixstore.record_header import TRAILER_BYTES
from prefixstore.record_layout import RecordLayout
from prefixstore.tiers.base import Tier
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig
from prefixstore.tiers.protected import ProtectedTier
from prefixstore.tiers.redis import RedisTier
from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.remote import RemoteTier
from prefixstore.tiers.remote.config import RemoteTierConfig

REMOTE = ("directory", "s3")
OWN_BOUND = ("memory", "disk", "authenticated memory", "sealed memory", "sealed disk")
PAGE = 4096
SLOT = 4096  # bytes of the slot of a LAYOUT record, which has 3,328
LARGE_SLOT = 86016  # of a LARGE_LAYOUT record, which has 82,240

KEY_NAMES = {"authenticated": "auth_key", "sealed": "seal_key"}

MakeTier = Callable[..., Tier]


@pytest.fixture
def open_tiers() -> Iterator[list[Tier]]:
    """A list of tiers; each is checked and closed after the test."""
    tiers: list[Tier] = []
    yield tiers
    for tier in tiers:
        assert tier.check() == []
        tier.close()


@pytest.fixture
def make_kind(request, tmp_path, open_tiers) -> Callable[..., Tier]:
    """Make a tier of a kind. Kinds whose server sets the bound ignore capacities; for kinds with
    their own bound, the option `clock` gives the time by which records age."""

    def make(kind: str, capacity_bytes: int, slab_bytes: int | None = None, **options) -> Tier:
        clocks = [options.pop("clock")] if "clock" in options else []
        *protection, medium = kind.split()
        path = tmp_path / str(len(open_tiers))
        tier: Tier
        if medium == "memory":
            tier = MemoryTier(MemoryTierConfig(capacity_bytes, slab_bytes, **options), *clocks)
        elif medium == "disk":
            tier = DiskTier(DiskTierConfig(path, capacity_bytes, slab_bytes, **options), *clocks)
        elif medium == "directory":
            tier = RemoteTier(RemoteTierConfig("file", str(path), **options))
        elif medium == "s3":
            url = request.getfixturevalue("s3_server").url(f"contract-{secrets.token_hex(8)}")
            tier = RemoteTier(RemoteTierConfig.from_url(url, **options))
        else:
            server = request.getfixturevalue("shared_servers")(medium)
            # Long enough for a busy machine.
            prefix = f"contract-{secrets.token_hex(8)}"
            options = {"prefix": prefix, "timeout_s": 30.0, **options}
            tier = RedisTier(RedisTierConfig.from_url(server.url, **options))
        if protection:
            tier = ProtectedTier(tier, ProtectionConfig(**{KEY_NAMES[protection[0]]: bytes(32)}))
        open_tiers.append(tier)
        return tier

    return make


def stored_bytes(tier: Tier, layout: RecordLayout) -> int:
    """Bytes that a record takes in a tier."""
    return layout.record_bytes + (TRAILER_BYTES if isinstance(tier, ProtectedTier) else 0)


@pytest.fixture(params=OWN_BOUND)
def make_tier(request, make_kind) -> MakeTier:
    """Makes tiers of a kind with its own bound, which count all they hold."""
    return partial(make_kind, request.param)


@pytest.fixture(
    params=[
        *OWN_BOUND,
        *FLAVOURS,
        *(f"sealed {name}" for name in FLAVOURS),
        *REMOTE,
        "sealed directory",
    ]
)
def make_any_tier(request, make_kind) -> MakeTier:
    """Makes tiers of any kind, for the contract of all kinds."""
    return partial(make_kind, request.param)


def get(tier: Tier, key: BlockKey) -> bytes | None:
    out = bytearray(b"\xee" * (key.layout.record_bytes + TRAILER_BYTES))  # a buffer like a store's
    num_read = tier.get(key.name, memoryview(out))
    return None if num_read is None else bytes(out[:num_read])


def put(tier: Tier, key: BlockKey) -> None:
    tier.put(key.name, memoryview(make_record(key)))


def put_many(tier: Tier, keys: list[BlockKey], priority: int = 0) -> None:
    records = [memoryview(make_record(key)) for key in keys]
    outcomes = tier.put_many([key.name for key in keys], records, priority=priority)
    assert outcomes == [None] * len(keys)


def put_in_place(tier: Tier, key: BlockKey) -> None:
    """`put` for a tier that reserves, as a store does it."""
    with tier.reserve_many([key.name], [key.layout.record_bytes]) as places:
        if places[0] is not None:
            places[0][:] = make_record(key)
    if places[0] is None:
        put(tier, key)


def held(tier: Tier, keys: list[BlockKey]) -> list[bool]:
    return tier.contains_many([key.name for key in keys])
