"""The disk tier on failing disks: damaged files, full and read-only disks, locked indexes."""

import errno
import os
import resource
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from disk_tiers import count_right, open_tier, put, replace_preadv
from sample_blocks import LARGE_LAYOUT, LAYOUT, load_block, make_keys, make_payload, make_record

from prefixstore.errors import TierFull, TierTimeout, TierUnavailable
from prefixstore.record import BlockKey
from prefixstore.store import Store
from prefixstore.store.block_sources import HostBlock
from prefixstore.tiers.disk import DiskTier
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig
from prefixstore.tiers.pages import PAGE_BYTES, round_up


def put_batch(tier: DiskTier, keys: list[BlockKey]) -> tuple[list[BlockKey], list[BlockKey]]:
    """Put all in one call; returns those kept, and those without room."""
    outcomes = tier.put_many(
        [key.name for key in keys], [memoryview(make_record(key)) for key in keys]
    )
    assert all(outcome is None or isinstance(outcome, TierFull) for outcome in outcomes)
    kept = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome is None]
    return kept, [key for key in keys if key not in kept]


def test_a_truncated_slab_costs_only_its_own_records(tmp_path):
    keys = make_keys(40)
    tier = open_tier(tmp_path, slab_bytes=1 << 20)
    put(tier, keys)
    (slab,) = tmp_path.glob("slab-*")
    os.truncate(slab, 10 * 4096 + 100)
    assert count_right(tier, keys) == 10
    assert tier.get(keys[10].name, memoryview(bytearray(LAYOUT.record_bytes))) == 100
    assert tier.get(keys[11].name, memoryview(bytearray(LAYOUT.record_bytes))) == 0
    assert len(tier.check()) == 30  # it names each of them
    for key in keys[10:]:
        tier.delete(key.name)
    assert tier.check() == []
    tier.close()


def test_a_directory_removed_while_open_takes_no_more_records(tmp_path):
    first, second = make_keys(2)
    tier = open_tier(tmp_path / "tier")
    put(tier, [first])
    shutil.rmtree(tmp_path / "tier")
    with pytest.raises(TierUnavailable, match=r"slab-v1-.*No such file or directory"):
        put(tier, [second])
    assert not tier.contains(second.name)
    assert tier.stats().num_puts == 1
    tier.close()


def test_a_slab_removed_while_open_is_made_anew(tmp_path):
    lost, *keys = make_keys(4)
    with closing(open_tier(tmp_path)) as tier, closing(open_tier(tmp_path)) as other:
        put(tier, [lost])
        assert count_right(other, [lost]) == 1
        (slab,) = tmp_path.glob("slab-*")
        slab.unlink()
        put(tier, keys)
        # The other one has the removed file open, whose slots are those of the new records.
        assert count_right(other, keys) == 3
        assert count_right(other, [lost]) == count_right(tier, [lost]) == 0
        tier.delete(lost.name)
        assert tier.check() == []


def test_a_directory_replaced_while_open_belongs_to_who_opened_the_new_one(tmp_path):
    first, *keys = make_keys(11)
    old = open_tier(tmp_path / "tier")
    shutil.rmtree(tmp_path / "tier")
    new = open_tier(tmp_path / "tier")
    put(new, keys)
    with pytest.raises(TierUnavailable, match=r"slab-v1-.*No such file or directory"):
        put(old, [first])
    with pytest.raises(TierUnavailable, match="No such file or directory"):
        old.sweep()
    old.close()
    assert count_right(new, keys) == 10
    assert new.check() == []
    new.close()


def test_a_store_whose_directory_was_removed_counts_and_goes_on(tmp_path):
    keys = make_keys(12)
    out = np.empty(LAYOUT.payload_bytes, np.uint8)
    with Store([open_tier(tmp_path / "tier")]) as store:
        assert store.save(keys[0], HostBlock(make_payload(keys[0]))) and store.flush(60)
        shutil.rmtree(tmp_path / "tier")
        for key in keys[1:]:
            store.save(key, HostBlock(make_payload(key)))
        assert store.flush(60)
        assert [load_block(store, key, out) for key in keys[1:]] == [None] * 11
        (disk,) = store.stats().tiers
        assert disk.num_written == 1 and disk.num_errors > 0


def test_gives_up_on_a_locked_index_in_time(tmp_path):
    (key,) = make_keys(1)
    tier = open_tier(tmp_path, timeout_s=0.2)
    blocker = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    with pytest.raises(TierTimeout, match=r"locked for 0.2 s"):
        put(tier, [key])
    assert time.monotonic() - started < 20
    assert not tier.contains(key.name)  # reads still work
    blocker.execute("ROLLBACK")
    blocker.close()
    put(tier, [key])
    assert count_right(tier, [key]) == 1
    tier.close()


def test_gives_up_on_a_locked_index_at_the_deadline(tmp_path):
    held, new = make_keys(2)
    tier = open_tier(tmp_path, timeout_s=60)
    put(tier, [held])
    blocker = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    record = memoryview(make_record(new))
    for call in (
        lambda deadline: tier.put_many([new.name], [record], deadline=deadline),
        lambda deadline: tier.delete_many([held.name], deadline=deadline),
    ):
        started = time.monotonic()
        try:
            (outcome,) = call(started + 0.4)
        except TierTimeout as error:
            outcome = error
        assert isinstance(outcome, TierTimeout)
        assert 0.3 < time.monotonic() - started < 20
    assert tier.contains_many([held.name], deadline=time.monotonic() + 30) == [True]
    blocker.execute("ROLLBACK")
    blocker.close()
    put(tier, [new])
    assert count_right(tier, [held, new]) == 2
    tier.close()


def test_reading_goes_on_while_a_thread_waits_for_the_index(tmp_path):
    (key,) = make_keys(1)
    tier = open_tier(tmp_path, timeout_s=10)
    put(tier, [key])
    blocker = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    waiting = threading.Thread(target=tier.sweep)
    waiting.start()
    time.sleep(0.05)
    started = time.monotonic()
    assert count_right(tier, [key]) == 1
    assert time.monotonic() - started < 5
    assert waiting.is_alive()
    blocker.execute("ROLLBACK")
    blocker.close()
    waiting.join(60)
    tier.close()


def test_an_index_damaged_while_open_fails_calls_and_is_rebuilt(tmp_path):
    keys = make_keys(300)
    tier = open_tier(tmp_path)
    put(tier, keys)
    with sqlite3.connect(tmp_path / "index.sqlite") as sql:
        sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    sql.close()
    size = (tmp_path / "index.sqlite").stat().st_size
    with (tmp_path / "index.sqlite").open("r+b") as file:
        file.seek(4096)
        file.write(np.random.default_rng(0).bytes(size - 4096))
    with pytest.raises(TierUnavailable, match=r"index\.sqlite"):
        tier.contains_many([key.name for key in keys])
    with pytest.raises(TierUnavailable, match=r"index\.sqlite"):
        put(tier, make_keys(301)[300:])
    tier.close()
    tier = open_tier(tmp_path)
    assert count_right(tier, keys) == 300
    assert tier.check() == []
    tier.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_in_the_file_system_loses_nothing(tmp_path, monkeypatch, code):
    keys = make_keys(6)
    tier = open_tier(tmp_path)
    put(tier, keys[:5])

    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(TierFull, match=os.strerror(code)):
        put(tier, keys[5:])
    assert count_right(tier, keys) == 5
    monkeypatch.undo()
    assert tier.check() == []
    put(tier, keys[5:])
    assert count_right(tier, keys) == 6
    tier.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_disk_that_fails_while_open_is_unavailable(tmp_path, monkeypatch, call, code):
    first, second = make_keys(2)
    tier = open_tier(tmp_path)
    put(tier, [first])

    def broken(*_):
        raise OSError(code, os.strerror(code))

    if call == "preadv":  # the extension's, too: memory may happen to begin on a page
        replace_preadv(monkeypatch, True, broken)
    else:
        monkeypatch.setattr(os, call, broken)
    with pytest.raises(TierUnavailable, match=rf"slab-v1-.*{os.strerror(code)}"):
        if call == "preadv":
            count_right(tier, [first])
        else:
            put(tier, [second])
    monkeypatch.undo()
    assert tier.check() == []
    assert count_right(tier, [first, second]) == 1
    put(tier, [second])
    assert count_right(tier, [first, second]) == 2
    tier.close()


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_a_file_size_limit_refuses_writes_and_loses_nothing(tmp_path, io):
    """The kernel writes up to the limit, then refuses the rest."""
    keys = make_keys(20, LARGE_LAYOUT)
    slot_bytes = round_up(LARGE_LAYOUT.record_bytes, PAGE_BYTES)
    tier = open_tier(tmp_path, slab_bytes=20 * slot_bytes, io=io)
    put(tier, keys[:12])
    old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (13 * slot_bytes + 5000, old_limits[1]))
    try:
        put(tier, keys[12:13])
        with pytest.raises(TierFull, match="File too large"):
            put(tier, keys[13:14])
        slots = next(tmp_path.glob("slab-*")).read_bytes()
        assert slots[13 * slot_bytes :][:5000] == make_record(keys[13])[:5000]
        assert not any(slots[13 * slot_bytes + 5000 :])
        assert count_right(tier, keys) == 13
        assert tier.check() == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
    put(tier, keys)
    assert count_right(tier, keys) == 20
    assert tier.check() == []
    tier.close()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of one megabyte."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if result.returncode:
        pytest.skip(f"mounting a small file system is not permitted: {result.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_disk_refuses_writes_and_keeps_what_it_has(small_disk):
    keys = make_keys(400)
    tier = open_tier(small_disk, slab_bytes=32 * 4096)
    num_put = 0
    with pytest.raises(TierFull):
        for key in keys:
            put(tier, [key])
            num_put += 1
    assert num_put > 20
    assert count_right(tier, keys[:num_put]) == num_put
    with pytest.raises(TierFull):
        put(tier, [keys[-1]])
    assert count_right(tier, keys[:num_put]) == num_put
    tier.close()


@pytest.mark.parametrize("num_records", [400, 2000])  # of 4 KiB each
def test_a_batch_larger_than_the_disk_is_kept_in_part(small_disk, num_records):
    keys = make_keys(num_records)
    settings = {"slab_bytes": 32 * PAGE_BYTES, "capacity_bytes": 2 * num_records * PAGE_BYTES}
    tier = open_tier(small_disk, **settings)
    for _ in range(5):  # refusals repeat, and use nothing up
        kept, refused = put_batch(tier, keys)
        assert len(kept) > 100 and refused
        assert count_right(tier, kept) == len(kept) == tier.stats().num_records
        assert count_right(tier, refused) == 0
        assert tier.check() == []
    tier.close()
    tier = open_tier(small_disk, **settings)
    assert count_right(tier, kept) == len(kept)
    assert tier.check() == []
    tier.close()


def test_a_disk_that_was_full_takes_records_again(small_disk):
    keys = make_keys(100)
    tier = open_tier(small_disk, slab_bytes=32 * PAGE_BYTES)
    (small_disk / "filler").write_bytes(bytes(600 << 10))
    kept, refused = put_batch(tier, keys)
    assert kept and refused
    (small_disk / "filler").unlink()
    assert put_batch(tier, keys) == (keys, [])
    assert count_right(tier, keys) == 100
    assert tier.check() == []
    tier.close()


def test_a_tier_at_its_bound_replaces_records_on_a_full_disk(small_disk):
    old, new = make_keys(32), make_keys(32, seed=1)
    tier = open_tier(small_disk, slab_bytes=32 * PAGE_BYTES, capacity_bytes=32 * PAGE_BYTES)
    assert put_batch(tier, old) == (old, [])
    status = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize - (64 << 10)))
    assert put_batch(tier, new) == (new, [])
    assert count_right(tier, new) == 32
    assert tier.check() == []
    tier.close()


def test_a_batch_larger_than_the_tier_is_kept_in_part(tmp_path):
    tier = open_tier(tmp_path, capacity_bytes=60 * PAGE_BYTES, slab_bytes=32 * PAGE_BYTES)
    for seed in range(2):
        kept, refused = put_batch(tier, make_keys(100, seed=seed))
        assert (len(kept), len(refused)) == (60, 40)
        assert count_right(tier, kept) == 60
        assert tier.check() == []
    tier.close()


def test_a_store_on_a_full_disk_counts_and_serves(small_disk):
    keys = make_keys(400)
    memory = MemoryTier(MemoryTierConfig(400 * PAGE_BYTES))
    with Store([memory, open_tier(small_disk, slab_bytes=32 * PAGE_BYTES)]) as store:
        for key in keys:
            assert store.save(key, HostBlock(make_payload(key)))
        assert store.flush(60)
        out = np.empty(LAYOUT.payload_bytes, np.uint8)
        for key in keys:
            assert load_block(store, key, out) == "memory"
            assert np.array_equal(out, make_payload(key))
        disk = store.stats().tiers[1]
        assert disk.num_full > 0 and disk.num_written > 20
        assert disk.num_full + disk.num_written == 400


def test_reopens_on_a_full_disk(small_disk):
    keys = make_keys(20)
    tier = open_tier(small_disk)
    put(tier, keys)
    tier.close()
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises((TierFull, TierUnavailable)):
        open_tier(small_disk)
    filler.unlink()
    tier = open_tier(small_disk)
    assert count_right(tier, keys) == 20
    assert tier.check() == []
    tier.close()


def test_a_read_only_disk_is_unavailable_and_unchanged(small_disk):
    keys = make_keys(5)
    tier = open_tier(small_disk)
    put(tier, keys)
    tier.close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(TierUnavailable, match="Read-only file system"):
        open_tier(small_disk)
    with pytest.raises(TierUnavailable, match="Read-only file system"):
        open_tier(small_disk / "new")
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    tier = open_tier(small_disk)
    assert count_right(tier, keys) == 5
    tier.close()
