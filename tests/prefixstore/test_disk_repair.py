"""Repairing an open disk tier: `check(fix=True)` and `sweep`."""

import errno
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_tiers import (
    Clock,
    break_page,
    count_right,
    damage_order_of_use,
    lose_hash,
    open_tier,
    put,
    put_with,
)
from sample_blocks import LARGE_LAYOUT, LAYOUT, make_keys

from prefixstore.errors import TierTimeout, TierUnavailable
from prefixstore.record import BlockKey
from prefixstore.tiers.base import Swept
from prefixstore.tiers.disk import DiskTier
from prefixstore.tiers.disk.schema import FREE, READY, WRITING
from prefixstore.tiers.pages import PAGE_BYTES

SLAB = 10 * PAGE_BYTES


def first_slab(path: Path) -> Path:
    return sorted(path.glob("slab-*"))[0]


def change_index(path: Path, statement: str) -> None:
    sql = sqlite3.connect(path / "index.sqlite", isolation_level=None)
    assert sql.execute(statement).rowcount > 0
    sql.close()


def truncate(path: Path) -> None:
    os.truncate(first_slab(path), 7 * PAGE_BYTES + 100)


def overwrite(path: Path) -> None:
    with first_slab(path).open("r+b") as file:
        file.write(os.urandom(3 * PAGE_BYTES))


def swap(path: Path) -> None:
    """Swap two records in the file."""
    data = first_slab(path).read_bytes()
    with first_slab(path).open("r+b") as file:
        file.write(data[PAGE_BYTES : 2 * PAGE_BYTES] + data[:PAGE_BYTES])


def remove(path: Path) -> None:
    first_slab(path).unlink()


def lose_rows(path: Path) -> None:
    change_index(path, "DELETE FROM slots WHERE slab_id = 1 AND slot IN (3, 9)")


def change_sizes(path: Path) -> None:
    change_index(path, "UPDATE slots SET record_bytes = 5000 WHERE slab_id = 1 AND slot < 4")


def lose_names(path: Path) -> None:
    change_index(path, "UPDATE slots SET block_hash = NULL WHERE slab_id = 1 AND slot IN (3, 9)")


@pytest.mark.parametrize(
    ("damage", "num_problems", "num_left"),
    [
        (truncate, 3, 27),
        (overwrite, 3, 27),
        (swap, 2, 28),
        (remove, 10, 20),
        (lose_rows, 1, 30),  # the records are there: the slab is scanned again
        (change_sizes, 8, 30),
        (lose_names, 2, 28),
    ],
)
def test_what_check_finds_it_mends(
    tmp_path, damage: Callable[[Path], None], num_problems, num_left
):
    keys = make_keys(40)
    tier = open_tier(tmp_path, capacity_bytes=3 * SLAB, slab_bytes=SLAB)
    put(tier, keys[:30])
    assert tier.check(fix=True) == []
    damage(tmp_path)
    problems = tier.check()
    assert len(problems) == num_problems
    assert tier.check() == problems  # a check alone changes nothing
    assert tier.check(fix=True) == problems
    assert tier.check() == []
    assert tier.stats().num_records == num_left
    assert count_right(tier, keys) == num_left
    put(tier, keys)
    assert count_right(tier, keys) == 30
    assert sum(path.stat().st_size for path in tmp_path.glob("slab-*")) <= 3 * SLAB
    tier.close()


def test_an_index_that_disagrees_with_its_table_is_made_anew(tmp_path):
    keys = make_keys(12)
    tier = open_tier(tmp_path)
    put(tier, keys)
    tier.pin_many([keys[0].name])
    tier.close()
    damage_order_of_use(tmp_path / "index.sqlite")
    tier, other = open_tier(tmp_path), open_tier(tmp_path)
    assert count_right(tier, keys) == 12  # their use is still to be entered, which would fail
    problems = tier.check()
    assert problems and all("index.sqlite" in problem for problem in problems)
    assert tier.check(fix=True) == problems
    assert tier.check() == other.check() == []
    other.delete_many([key.name for key in keys[2:]])
    assert count_right(tier, keys) == 2
    assert tier.pin_many([keys[0].name], False) == [True]
    put(tier, keys)
    tier.close()
    other.close()
    assert not list(tmp_path.glob("*damaged*"))  # nor does a mark tell the next to mend it


def test_a_record_put_twice_because_an_index_lost_it_is_there_once(tmp_path):
    keys = make_keys(12)
    tier = open_tier(tmp_path)
    put(tier, keys)
    tier.pin_many([keys[5].name])
    tier.close()
    lose_hash(tmp_path / "index.sqlite", keys[5].block_hash)
    tier = open_tier(tmp_path)
    assert not tier.contains(keys[5].name)
    put(tier, [keys[5]])
    assert tier.stats().num_records == 13
    problems = tier.check(fix=True)
    assert problems and all("index.sqlite" in problem for problem in problems)
    assert tier.check() == []
    assert tier.stats().num_records == count_right(tier, keys) == 12
    assert tier.delete_many([key.name for key in keys]) == [True] * 12
    assert tier.stats().num_records == 0 and not tier.contains(keys[5].name)
    tier.close()


def test_damage_that_is_left_is_told_and_mended_by_the_next_to_open(tmp_path):
    keys = make_keys(12)
    tier = open_tier(tmp_path)
    put(tier, keys)
    change_index(tmp_path, "UPDATE slots SET expires_at = x'00' WHERE slot = 3")
    found, left = tier.check(fix=True)
    assert found.endswith("expected expires_at of slots to be integer")
    assert left == f"{found}; whoever opens the tier alone mends it"
    tier.close()
    tier = open_tier(tmp_path)
    assert tier.check() == []
    assert count_right(tier, keys) == 12
    tier.close()


def test_an_index_removed_while_open_is_told(tmp_path):
    keys = make_keys(3)
    tier = open_tier(tmp_path)
    put(tier, keys)
    (tmp_path / "index.sqlite").unlink()
    (problem,) = tier.check()
    assert problem.endswith("index.sqlite: expected the index, got none")
    assert count_right(tier, keys) == 3
    assert not (tmp_path / "index.sqlite").exists()
    tier.close()


def test_a_slab_with_a_slot_that_cannot_be_read_is_mended(tmp_path, monkeypatch):
    keys = make_keys(10)
    tier = open_tier(tmp_path, capacity_bytes=SLAB, slab_bytes=SLAB)
    put(tier, keys)
    lose_rows(tmp_path)
    break_page(monkeypatch, 2)
    problems = tier.check(fix=True)
    assert [problem.split(": ")[-1] for problem in problems] == [
        "slot 2 cannot be read",
        "expected 10 slots, got 8",
    ]
    assert tier.check() == []
    assert [tier.contains(key.name) for key in keys] == [True] * 2 + [False] + [True] * 7
    assert count_right(tier, keys) == 9
    tier.close()


def test_a_bound_that_was_passed_is_mended(tmp_path):
    keys = make_keys(30)
    tier = open_tier(tmp_path, capacity_bytes=3 * SLAB, slab_bytes=SLAB)
    put(tier, keys)
    small = open_tier(tmp_path / "other", capacity_bytes=SLAB, slab_bytes=SLAB)
    small._index = tier._index
    small._files = tier._files
    (problem,) = small.check()
    assert f"expected at most {SLAB} bytes, got {3 * SLAB}" in problem
    assert small.check(fix=True) == [problem]
    assert tier.check() == []
    assert count_right(tier, keys) == 10
    assert len(list(tmp_path.glob("slab-*"))) == 1
    tier.close()
    small._directory.close()


def fail_to_remove(tier: DiskTier, keys: list[BlockKey], monkeypatch) -> None:
    """Leave a file behind: a put drops a slab but cannot delete its file."""

    def failing(path, *, dir_fd=None):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "unlink", failing)
    with pytest.raises(TierUnavailable, match="Input/output error"):
        put(tier, keys)
    monkeypatch.undo()


@pytest.mark.parametrize("mend", ["sweep", "fix", "reopen"])
def test_files_that_nobody_knows_are_given_back(tmp_path, monkeypatch, mend):
    slot = -(-LARGE_LAYOUT.record_bytes // PAGE_BYTES) * PAGE_BYTES
    settings = {"capacity_bytes": slot, "slab_bytes": slot}
    tier = open_tier(tmp_path, **settings)
    put(tier, make_keys(5))
    fail_to_remove(tier, make_keys(1, LARGE_LAYOUT), monkeypatch)
    assert tier.stats().num_records == 0
    orphan = first_slab(tmp_path)
    if mend == "sweep":
        swept = tier.sweep()
        assert swept == Swept(num_orphans=2, num_bytes=2 * slot)  # and its allocated slot
    elif mend == "fix":
        assert tier.check(fix=True) == []
    else:
        tier.close()
        tier = open_tier(tmp_path, **settings)
        assert count_right(tier, make_keys(5)) == 5  # the orphan is indexed again
        tier.delete_many([key.name for key in make_keys(5)])
    assert orphan.exists() == (mend == "reopen")
    put(tier, make_keys(1, LARGE_LAYOUT))
    assert tier.check() == []
    tier.close()


def test_a_sweep_gives_unfinished_writes_back(tmp_path, monkeypatch):
    """They are wiped, so that a rebuilt index does not find half a record."""
    clock = Clock()
    tier = open_tier(tmp_path, clock=clock, capacity_bytes=SLAB, slab_bytes=SLAB)
    keys = make_keys(10)
    put(tier, keys[:6])

    def forget(*_):
        raise TierTimeout("killed between write and publication")

    monkeypatch.setattr(tier._index, "publish_many", forget)
    monkeypatch.setattr(tier._index, "abandon", lambda refs: None)
    for key in keys[6:]:
        with pytest.raises(TierTimeout):
            put(tier, [key])
    monkeypatch.undo()
    clock.seconds += 100
    assert tier.sweep() == Swept(num_orphans=4, num_bytes=4 * PAGE_BYTES)
    assert tier.sweep() == Swept()
    put(tier, keys)
    assert tier.stats().num_records == 10
    tier.close()


def test_a_slot_whose_write_failed_is_used_again(tmp_path, monkeypatch):
    tier = open_tier(tmp_path, capacity_bytes=SLAB, slab_bytes=SLAB)
    first, second = make_keys(2)

    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    put(tier, [first])
    monkeypatch.setattr(os, "pwritev", failing)
    with pytest.raises(TierUnavailable):
        put(tier, [second])
    with pytest.raises(TierUnavailable):
        tier.delete(first.name)
    assert not tier.contains(first.name)  # hidden, though not wiped
    monkeypatch.undo()
    put(tier, [second])
    with tier._index.frozen() as sql:
        states = sql.execute("SELECT state, count(*) FROM slots GROUP BY state").fetchall()
    # the record whose deletion failed stays hidden until its lease ends
    assert dict(states) == {FREE: 8, WRITING: 1, READY: 1}
    assert count_right(tier, [first, second]) == 1
    assert LAYOUT.record_bytes == tier.stats().used_bytes
    tier.close()


def test_slots_that_no_thread_could_write_to_are_used_again(tmp_path, monkeypatch):
    tier = open_tier(tmp_path, capacity_bytes=SLAB, slab_bytes=SLAB)
    keys = make_keys(20)

    def failing(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(TierUnavailable, match="expected a thread"):
        put_with(tier, keys[:10], 0)
    monkeypatch.undo()
    assert put_with(tier, keys[10:], 0) == [None] * 10
    assert count_right(tier, keys) == 10
    tier.close()
