"""Opening a disk tier: what survives, what is rebuilt, what is refused and left unchanged."""

import fcntl
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_tiers import Clock, break_page, count_right, open_tier, put
from sample_blocks import LAYOUT, make_keys, make_record

from prefixstore.errors import TierUnavailable
from prefixstore.record import BlockKey
from prefixstore.tiers.base import Swept
from prefixstore.tiers.pages import PAGE_BYTES


def test_records_survive_reopening(tmp_path):
    keys = make_keys(10)
    tier = open_tier(tmp_path)
    put(tier, keys)
    tier.close()
    tier = open_tier(tmp_path)
    assert count_right(tier, keys) == 10
    assert tier.check() == []
    tier.close()


def test_order_of_use_survives_reopening(tmp_path):
    keys = make_keys(5)
    tier = open_tier(tmp_path, capacity_bytes=4 * 4096)
    put(tier, keys[:4])
    assert count_right(tier, keys[:1]) == 1
    tier.close()
    tier = open_tier(tmp_path, capacity_bytes=4 * 4096)
    put(tier, keys[4:])
    assert [tier.contains(key.name) for key in keys] == [True, False, True, True, True]
    tier.close()


def test_a_slot_that_cannot_be_read_costs_its_own_record(tmp_path, monkeypatch, caplog):
    clock, keys = Clock(), make_keys(15)
    settings = {"capacity_bytes": 10 * 4096, "slab_bytes": 10 * 4096, "write_lease_s": 10}
    tier = open_tier(tmp_path, clock=clock, **settings)
    put(tier, keys[:6])
    tier.close()
    (tmp_path / "index.sqlite").unlink()
    with monkeypatch.context() as broken:
        break_page(broken, 2)
        tier = open_tier(tmp_path, clock=clock, **settings)
        assert "cannot read 1 slots, the first of them 2" in caplog.text
        assert [tier.contains(key.name) for key in keys[:6]] == [True] * 2 + [False] + [True] * 3
        assert count_right(tier, keys) == 5
        put(tier, keys[6:])  # none of them gets that slot
        assert count_right(tier, keys) == 9
        assert tier.check() == []
        clock.seconds += 11
        with pytest.raises(TierUnavailable, match="Input/output error"):
            tier.sweep()
    clock.seconds += 11
    assert tier.sweep() == Swept(num_orphans=1, num_bytes=PAGE_BYTES)
    put(tier, keys[2:3])
    assert count_right(tier, keys) == 10
    tier.close()


def test_a_slab_that_cannot_be_opened_is_left_alone(tmp_path):
    keys = make_keys(3)
    tier = open_tier(tmp_path / "tier")
    put(tier, keys)
    tier.close()
    (tmp_path / "tier" / "index.sqlite").unlink()
    (slab,) = (tmp_path / "tier").glob("slab-*")
    aside = slab.rename(tmp_path / "aside")
    slab.mkdir()
    with pytest.raises(TierUnavailable, match="Is a directory"):
        open_tier(tmp_path / "tier")
    slab.rmdir()
    aside.rename(slab)
    tier = open_tier(tmp_path / "tier")
    assert count_right(tier, keys) == 3
    tier.close()


def test_a_slab_of_another_shape_than_the_index_says_is_read_anew(tmp_path):
    keys = make_keys(4)
    tier = open_tier(tmp_path, slab_bytes=20 * 4096)
    put(tier, keys)
    tier.close()
    (slab,) = tmp_path.glob("slab-*")
    other = slab.rename(slab.with_name(slab.name.replace("4096x20", "8192x10")))
    tier = open_tier(tmp_path, slab_bytes=20 * 4096)
    assert tier.check() == []
    assert count_right(tier, keys) == 2  # those that begin where a larger slot begins
    assert list(tmp_path.glob("slab-*")) == [other]
    tier.close()


def test_a_missing_slab_costs_only_its_own_records(tmp_path):
    keys = make_keys(40)
    tier = open_tier(tmp_path, slab_bytes=20 * 4096)
    put(tier, keys)
    tier.close()
    sorted(tmp_path.glob("slab-*"))[0].unlink()
    tier = open_tier(tmp_path, slab_bytes=20 * 4096)
    assert tier.check() == []
    assert count_right(tier, keys) == 20
    tier.close()


def test_files_of_a_newer_version_are_refused_and_kept(tmp_path):
    newer = tmp_path / "slab-v2-whatever-comes"
    newer.write_bytes(b"precious")
    with pytest.raises(TierUnavailable, match="expected format version 1, got 2"):
        open_tier(tmp_path)
    assert newer.read_bytes() == b"precious"
    assert not (tmp_path / "index.sqlite").exists()


def test_an_index_of_a_newer_version_is_refused_and_kept(tmp_path):
    tier = open_tier(tmp_path)
    put(tier, make_keys(3))
    tier.close()
    with sqlite3.connect(tmp_path / "index.sqlite") as sql:
        sql.execute("PRAGMA user_version = 3")
    sql.close()
    before = sorted((path.name, path.stat().st_size) for path in tmp_path.iterdir())
    with pytest.raises(TierUnavailable, match="expected format version 2, got 3"):
        open_tier(tmp_path)
    assert sorted((path.name, path.stat().st_size) for path in tmp_path.iterdir()) == before


VERSION_1 = """
CREATE TABLE slabs (
    slab_id INTEGER PRIMARY KEY AUTOINCREMENT,
    slot_bytes INTEGER NOT NULL,
    num_slots INTEGER NOT NULL,
    last_used INTEGER NOT NULL
);
CREATE TABLE slots (
    slab_id INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    slot_bytes INTEGER NOT NULL,
    state INTEGER NOT NULL,
    ticket INTEGER NOT NULL,
    block_hash BLOB,
    record_bytes INTEGER NOT NULL,
    last_used INTEGER NOT NULL,
    PRIMARY KEY (slab_id, slot)
) WITHOUT ROWID;
CREATE UNIQUE INDEX slots_by_hash ON slots (block_hash) WHERE state = 2;
CREATE INDEX slots_by_use ON slots (slot_bytes, state, last_used);
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
"""


def write_version_1(path: Path, keys: list[BlockKey]) -> sqlite3.Connection:
    """Write a slab of ten slots as version 1 did: seven records, the most recently used first;
    an evicted one whose bytes are still there; a truncated one; a slot never used."""
    with (path / "slab-v1-000001-4096x10.kvb").open("wb") as file:
        for slot, key in enumerate(keys[:9]):
            file.seek(slot * 4096)
            file.write(make_record(key))
    sql = sqlite3.connect(path / "index.sqlite", isolation_level=None)
    sql.executescript(VERSION_1)
    now = time.time_ns()
    sql.execute("INSERT INTO slabs VALUES (1, 4096, 10, ?)", (now,))
    states = [2] * 7 + [0, 1, 0]
    for slot, state in enumerate(states):
        row = (1, slot, 4096, state, 1, keys[slot].block_hash if state == 2 else None)
        used = (LAYOUT.record_bytes, now - slot * 10**9)
        sql.execute("INSERT INTO slots VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, *used))
    return sql


def test_an_index_of_version_1_is_taken_over_with_its_order_of_use(tmp_path):
    keys = make_keys(20)
    write_version_1(tmp_path, keys).close()
    settings = {"capacity_bytes": 10 * 4096, "slab_bytes": 10 * 4096}
    tier = open_tier(tmp_path, **settings)
    assert tier.check() == []
    assert [tier.contains(key.name) for key in keys[:10]] == [True] * 7 + [False] * 3
    put(tier, keys[10:15])  # three in free slots, two replace those unused longest
    assert [tier.contains(key.name) for key in keys[:7]] == [True] * 5 + [False] * 2
    assert tier.pin_many([keys[0].name]) == [True]
    tier.delete_identity(keys[0].identity)  # version 1 stored no identities
    assert tier.stats().num_records == 0
    tier.close()
    open_tier(tmp_path, **settings).close()
    assert not (tmp_path / "damaged-index.sqlite").exists()


def test_an_index_of_version_1_in_use_is_left_alone(tmp_path):
    keys = make_keys(20)
    write_version_1(tmp_path, keys).close()
    with (tmp_path / "tier.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as a program does that has the tier open
        with pytest.raises(TierUnavailable, match="got 1 and a program that has it open"):
            open_tier(tmp_path)
    tier = open_tier(tmp_path)
    assert count_right(tier, keys) == 7
    tier.close()


def test_an_index_removed_while_it_is_open_is_not_made_anew(tmp_path):
    """Two indexes would give the same slots away."""
    keys = make_keys(10)
    tier = open_tier(tmp_path)
    put(tier, keys[:5])
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    with pytest.raises(TierUnavailable, match=r"expected the index that other .*, got none"):
        open_tier(tmp_path)
    put(tier, keys[5:])
    tier.close()
    tier = open_tier(tmp_path)
    assert count_right(tier, keys) == 10
    tier.close()


def test_strange_files_are_none_of_its_business(tmp_path):
    for name in ("notes.txt", "slab-of-marble", "slab-v1-hello.kvb", "slab-v1-000001-0x0.kvb"):
        (tmp_path / name).write_text("mine")
    tier = open_tier(tmp_path)
    put(tier, make_keys(3))
    assert tier.check() == []
    tier.close()
    assert (tmp_path / "slab-v1-hello.kvb").read_text() == "mine"


def test_shrinks_to_a_smaller_bound(tmp_path):
    keys = make_keys(40)
    tier = open_tier(tmp_path, slab_bytes=8 * 4096)
    put(tier, keys)
    tier.close()
    tier = open_tier(tmp_path, capacity_bytes=16 * 4096, slab_bytes=8 * 4096)
    assert tier.check() == []
    assert [tier.contains(key.name) for key in keys] == [False] * 24 + [True] * 16
    assert sum(path.stat().st_size for path in tmp_path.glob("slab-*")) <= 16 * 4096
    tier.close()


@pytest.fixture
def closed_directory() -> Iterator[Path]:
    """A directory with five records that this process may read but not write, even as root."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to other users
        path = Path(name) / "tier"
        tier = open_tier(path)
        put(tier, make_keys(5))
        tier.close()
        path.parent.chmod(0o755)
        path.chmod(0o555)
        for file in path.iterdir():
            file.chmod(0o444)
        if user == 0:
            os.seteuid(65534)  # root ignores file modes
        try:
            yield path
        finally:
            os.seteuid(user)
            path.chmod(0o755)


def test_a_directory_without_permission_is_unavailable_and_unchanged(closed_directory):
    before = {file.name: file.read_bytes() for file in closed_directory.iterdir()}
    with pytest.raises(TierUnavailable, match="Permission denied"):
        open_tier(closed_directory)
    with pytest.raises(TierUnavailable, match="Permission denied"):
        open_tier(closed_directory / "new")
    assert {file.name: file.read_bytes() for file in closed_directory.iterdir()} == before


def test_a_path_that_is_a_file_is_unavailable(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(TierUnavailable, match="File exists"):
        open_tier(path)
