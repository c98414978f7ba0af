"""Blocks and identities deleted from the disk tier are never found again."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from disk_tiers import Clock, contains, count_right, open_tier, put
from hanging_calls import hang_writing
from sample_blocks import LAYOUT, make_keys, make_payload

from prefixstore.errors import TierTimeout
from prefixstore.record import BlockKey, chain_keys, encode
from prefixstore.tiers.base import Swept
from prefixstore.tiers.disk import DiskTier, writer
from prefixstore.tiers.pages import PAGE_BYTES

HOUR = 3600.0
YEAR_NS = 365 * 86400 * 10**9


def make_keys_of(identity: bytes, num_blocks: int) -> list[BlockKey]:
    return chain_keys(LAYOUT, identity, range(num_blocks * LAYOUT.block_size))


def put_all(tier: DiskTier, keys: list[BlockKey]) -> None:
    for key in keys:
        record = bytearray(LAYOUT.record_bytes)
        encode(key, make_payload(key), record)
        tier.put(key.name, memoryview(record))


def lose_index(path: Path) -> None:
    for file in path.glob("index.sqlite*"):
        file.unlink()


@pytest.fixture
def two_copies(tmp_path) -> BlockKey:
    """A block in two slots of a tier: it expired in one before it was put again."""
    clock = Clock()
    other, key = make_keys_of(b"m" * 16, 2)
    tier = open_tier(tmp_path, ttl_s=HOUR, clock=clock)
    put(tier, [other, key])
    tier.delete(other.name)
    clock.seconds += 2 * HOUR
    assert tier.sweep().num_expired == 1
    put(tier, [key])
    tier.close()
    (slab,) = tmp_path.glob("slab-*")
    assert slab.read_bytes().count(key.block_hash) == 2
    return key


@pytest.mark.parametrize("is_rebuilt", [False, True])
@pytest.mark.parametrize("delete", [DiskTier.delete, DiskTier.delete_identity])
def test_no_older_copy_of_a_deleted_record_is_found_again(tmp_path, two_copies, is_rebuilt, delete):
    if is_rebuilt:
        lose_index(tmp_path)
    tier = open_tier(tmp_path, clock=Clock())
    assert count_right(tier, [two_copies]) == 1
    delete(tier, two_copies.name if delete is DiskTier.delete else two_copies.identity)
    assert tier.stats().num_deletes == 1
    assert tier.check() == []
    tier.close()
    lose_index(tmp_path)
    tier = open_tier(tmp_path)
    assert contains(tier, [two_copies]) == [False]
    put(tier, [two_copies])
    assert count_right(tier, [two_copies]) == 1
    tier.close()


@pytest.mark.parametrize("delete", [DiskTier.delete, DiskTier.delete_identity])
def test_a_disk_that_hangs_is_waited_for_no_longer_than_a_lease(tmp_path, monkeypatch, delete):
    (key,) = make_keys(1)
    writer = open_tier(tmp_path)  # its lease is long enough on a busy machine
    put(writer, [key])
    writer.close()
    tier = open_tier(tmp_path, write_lease_s=0.2)
    hanging = hang_writing(monkeypatch, 0)
    with pytest.raises(TierTimeout):
        delete(tier, key.name if delete is DiskTier.delete else key.identity)
    assert contains(tier, [key]) == [False]
    hanging.may_go_on.set()
    tier.close()


def test_what_takes_longer_to_delete_than_a_lease_is_not_taken_over(tmp_path, monkeypatch):
    clock, begun, taken_over = Clock(), Clock().seconds, []
    keys, tokens = make_keys(8), np.arange(8 * LAYOUT.block_size, dtype=np.uint32)
    others = chain_keys(LAYOUT, bytes(16), tokens)
    tier, other = open_tier(tmp_path, clock=clock), open_tier(tmp_path, clock=clock)
    for pair in zip(keys, others, strict=True):  # in separate calls
        put(tier, [*pair])
    write = tier._files.write

    def slow_write(slab, offset, buffers):
        write(slab, offset, buffers)
        clock.seconds += 25  # of a lease of 60
        taken_over.append(other.sweep())

    monkeypatch.setattr(tier._files, "write", slow_write)
    passing = SimpleNamespace(monotonic=lambda: time.monotonic() + clock.seconds - begun)
    monkeypatch.setattr(writer, "time", passing)
    monkeypatch.setattr(writer, "_WIPED_AT_ONCE", 1)
    tier.delete_identity(keys[0].identity)
    assert taken_over == [Swept()] * 8
    assert tier.sweep() == Swept()
    put(tier, keys)
    assert count_right(tier, keys) == 8
    tier.close()
    other.close()


def test_a_record_deleted_past_its_time_is_not_found_again(tmp_path):
    clock = Clock()
    (key,) = make_keys(1)
    tier = open_tier(tmp_path, ttl_s=HOUR, clock=clock)
    put(tier, [key])
    clock.seconds += 2 * HOUR
    assert tier.delete_many([key.name] * 2) == [False] * 2
    tier.close()
    lose_index(tmp_path)
    tier = open_tier(tmp_path)
    assert contains(tier, [key]) == [False]
    tier.close()


def test_an_identity_is_forgotten_whole(tmp_path):
    mine, other = make_keys_of(b"m" * 16, 10), make_keys_of(b"o" * 16, 10)
    tier = open_tier(tmp_path)
    put_all(tier, mine + other)
    tier.pin_many([mine[0].name])
    tier.delete_identity(b"m" * 16)
    assert contains(tier, mine) == [False] * 10
    assert count_right(tier, other) == 10
    assert tier.stats().num_deletes == 10
    tier.delete_identity(b"m" * 16)
    tier.delete_identity(b"x" * 16)
    assert tier.check() == []
    tier.close()
    lose_index(tmp_path)
    tier = open_tier(tmp_path)
    assert count_right(tier, mine + other) == 10
    put_all(tier, mine)
    assert count_right(tier, mine) == 10
    tier.close()


def test_no_byte_of_a_forgotten_identity_is_found_again(tmp_path):
    """Not even bytes evicted earlier, from a slot or with a whole slab whose file stayed."""
    mine, other = make_keys_of(b"m" * 16, 8), make_keys_of(b"o" * 16, 4)
    sizes = {"capacity_bytes": 8 * PAGE_BYTES, "slab_bytes": 8 * PAGE_BYTES}
    clock = Clock()
    tier = open_tier(tmp_path, ttl_s=HOUR, clock=clock, **sizes)
    put_all(tier, mine)
    (slab,) = tmp_path.glob("slab-*")
    stayed = tmp_path / slab.name.replace("slab-v1-000001", "slab-v1-000099")
    stayed.write_bytes(slab.read_bytes())
    clock.seconds += 2 * HOUR
    put_all(tier, other)  # expires the eight, and overwrites four
    assert b"m" * 16 in slab.read_bytes()
    tier.delete_identity(b"m" * 16)
    assert b"m" * 16 not in slab.read_bytes()
    assert not stayed.exists()
    tier.close()
    lose_index(tmp_path)
    tier = open_tier(tmp_path, **sizes)
    assert count_right(tier, mine) == 0 and count_right(tier, other) == 4
    tier.close()
