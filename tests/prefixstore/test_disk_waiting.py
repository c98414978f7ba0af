"""The disk tier does not wait for locks or hanging calls where it need not."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from disk_tiers import MIB, Clock, count_right, get_all, make_bytes, make_names, open_tier, put
from hanging_calls import Hanging, hang_reading
from sample_blocks import make_keys

from prefixstore.errors import TierTimeout
from prefixstore.tiers.disk import DiskTier
from prefixstore.tiers.pages import PAGE_BYTES


@contextmanager
def locked_by_another(tier: DiskTier) -> Iterator[None]:
    sql = sqlite3.connect(tier._config.path / "index.sqlite", isolation_level=None)
    sql.execute("BEGIN IMMEDIATE")
    yield
    sql.close()


@pytest.mark.parametrize("locked", [locked_by_another, lambda tier: tier._index.frozen()])
def test_marks_of_use_wait_for_nobody(tmp_path, locked):
    """They are written with the next transaction."""
    clock = Clock()
    tier = open_tier(tmp_path, clock=clock, ttl_s=160, timeout_s=20)
    key, other = make_keys(2)
    put(tier, [key])
    clock.seconds += 100
    with locked(tier):
        started = time.monotonic()
        assert count_right(tier, [key]) == 1
        assert time.monotonic() - started < 10
    put(tier, [other])
    clock.seconds += 100
    assert tier.contains(key.name)
    tier.close()


def wipe_of_a_dead_writer(tier: DiskTier, clock: Clock, monkeypatch) -> Hanging:
    """Let a writer die beside a record, and make reading its slot hang."""
    names = make_names(2, seed=1)
    assert tier.put(names[0], make_bytes(2 * PAGE_BYTES, 0).data) is None
    (slot,) = tier._index.allocate_many({names[1]: 2 * PAGE_BYTES}, 0).refs.values()
    assert slot.offset == 2 * PAGE_BYTES
    clock.seconds += 61
    return hang_reading(monkeypatch, False, slot.offset)


def test_a_put_does_not_wait_past_its_deadline_for_what_the_dead_left(tmp_path, monkeypatch):
    clock = Clock()
    tier = open_tier(tmp_path, clock=clock, slab_bytes=4 * MIB, capacity_bytes=16 * MIB)
    hanging = wipe_of_a_dead_writer(tier, clock, monkeypatch)
    (name,), record = make_names(1), make_bytes(MIB, 0)
    release = threading.Timer(20, hanging.may_go_on.set)
    release.start()
    started = time.monotonic()
    assert tier.put_many([name], [record.data], deadline=started + 2) == [None]
    assert time.monotonic() - started < 10
    release.cancel()
    hanging.may_go_on.set()
    assert hanging.is_over.wait(60)
    assert get_all(tier, [name], MIB) == [record.tobytes()]
    assert tier.sweep().num_orphans == 0  # tried again once its lease is over
    clock.seconds += 61
    assert tier.sweep().num_orphans == 1
    tier.close()


def test_a_deletion_does_not_wait_past_its_deadline(tmp_path, monkeypatch):
    clock = Clock()
    tier = open_tier(tmp_path, clock=clock)
    (key,) = make_keys(1)
    put(tier, [key])
    hanging = hang_reading(monkeypatch, False, 0)
    release = threading.Timer(20, hanging.may_go_on.set)
    release.start()
    started = time.monotonic()
    with pytest.raises(TierTimeout):
        tier.delete_many([key.name], deadline=started + 1)
    assert time.monotonic() - started < 10
    release.cancel()
    assert not tier.contains(key.name)
    hanging.may_go_on.set()
    clock.seconds += 61
    assert tier.sweep().num_orphans == 1
    (slab,) = tmp_path.glob("slab-*")
    assert key.block_hash not in slab.read_bytes()
    tier.close()
