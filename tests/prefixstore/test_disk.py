"""The disk tier where things go wrong: killed writers, damaged files, full and read-only disks."""

import errno
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from disk_process import KEYS, count_found, count_served, count_writing
from sample_blocks import LARGE_LAYOUT, LAYOUT, load_block, make_keys, make_payload, make_record

from prefixstore.block_sources import HostBlock
from prefixstore.errors import BlockCorrupted, TierFull, TierTimeout, TierUnavailable
from prefixstore.record import BlockKey, decode
from prefixstore.store import Store
from prefixstore.tiers.base import PAGE_BYTES, round_up
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig

HERE = Path(__file__).resolve().parent
CAPACITY = 2 << 20
PROCESS_CAPACITY = 6 << 20  # less than the processes write


def open_tier(path: Path, **settings) -> DiskTier:
    return DiskTier(DiskTierConfig(path, **{"capacity_bytes": CAPACITY, **settings}))


def put(tier: DiskTier, keys: list[BlockKey]) -> None:
    for key in keys:
        tier.put(key.block_hash, memoryview(make_record(key)))


def count_right(tier: DiskTier, keys: list[BlockKey]) -> int:
    """How many come back and verify; one that comes back right but is not fails the test."""
    num_right = 0
    for key in keys:
        record, payload = bytearray(key.layout.record_bytes), bytearray(key.layout.payload_bytes)
        num_read = tier.get(key.block_hash, memoryview(record))
        if num_read is not None:
            try:
                decode(record[:num_read], key, payload)
            except BlockCorrupted:
                continue
            assert payload == make_payload(key).tobytes()
            num_right += 1
    return num_right


class DiskProcess:
    """Starts processes on one directory, one at a time; see disk_process.py."""

    def __init__(self, path: Path) -> None:
        python_path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
        self._forker = subprocess.Popen(
            [sys.executable, HERE / "disk_process.py", path, str(PROCESS_CAPACITY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        )
        self._pid = 0

    def start(self, seed: int, seconds: float = 60) -> None:
        """Returns when it is about to open the tier."""
        self._forker.stdin.write(f"{seed} {seconds}\n")
        self._forker.stdin.flush()
        self._pid = self.read()["pid"]

    def read(self) -> dict[str, int]:
        return json.loads(self._forker.stdout.readline())

    def kill(self) -> dict[str, int]:
        os.kill(self._pid, signal.SIGKILL)
        return self.wait(-signal.SIGKILL)

    def wait(self, exit_code: int = 0) -> dict[str, int]:
        """The last that it told before its end."""
        last: dict[str, int] = {}
        while "exit_code" not in (told := self.read()):
            last = told
        assert told["exit_code"] == exit_code
        return last

    def close(self) -> None:
        self._forker.communicate(timeout=90)
        assert self._forker.returncode == 0


@pytest.fixture
def make_process(tmp_path) -> Iterator[Callable[[], DiskProcess]]:
    processes: list[DiskProcess] = []

    def make() -> DiskProcess:
        processes.append(DiskProcess(tmp_path))
        return processes[-1]

    yield make
    for process in processes:
        process.close()


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
    assert [tier.contains(key.block_hash) for key in keys] == [True, False, True, True, True]
    tier.close()


def test_a_clock_that_was_set_back_keeps_no_old_record_for_ever(tmp_path, monkeypatch):
    now_ns = time.time_ns
    old, new = make_keys(40)[:20], make_keys(40)[20:]
    sizes = {
        "capacity_bytes": 10 * round_up(LAYOUT.record_bytes, PAGE_BYTES),
        "slab_bytes": 1 << 14,
    }
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 24 * 3600 * 10**9)
    tier = open_tier(tmp_path, **sizes)
    put(tier, old)
    assert count_right(tier, old) == 10
    tier.close()
    monkeypatch.setattr(time, "time_ns", now_ns)
    tier = open_tier(tmp_path, **sizes)
    put(tier, new)
    assert count_right(tier, new) == 10
    tier.close()


def test_kill_minus_nine_in_the_middle_of_writes(tmp_path, make_process):
    """50 writers on one directory killed at random moments, and 10 more while they open it.

    Each process mends what the one before left, finds nothing to complain of in it, and reads back
    rightly all that the index knows; or it fails, and with it the test.
    """
    random = np.random.default_rng(0)
    process = make_process()
    totals = dict.fromkeys(("kills", "puts", "evictions", "cut_off", "served"), 0)
    for round_number in range(60):
        process.start(seed=round_number)
        if round_number % 6 == 5:
            time.sleep(random.uniform(0, 0.02))
            process.kill()
            continue
        opened = process.read()
        assert opened["served"] == opened["found"]
        time.sleep(random.uniform(0, 0.1))
        counts = {**opened, **process.kill(), "kills": 1}
        totals = {name: total + counts.get(name, 0) for name, total in totals.items()}
    tier = open_tier(tmp_path, capacity_bytes=PROCESS_CAPACITY)
    assert tier.check() == []
    assert count_served(tier) == count_found(tier)
    assert tier.stats().used_bytes <= PROCESS_CAPACITY
    tier.close()
    print(totals)
    # it was writing, evicting and in the middle of a write when the kills came, and kept something
    assert totals["kills"] == 50 and totals["cut_off"] > 0
    assert min(totals["puts"], totals["evictions"], totals["served"]) > 50


def test_a_writer_killed_beside_others_leaves_them_unharmed(tmp_path, make_process):
    """The dead one's slots come back when its lease is over."""
    survivor = open_tier(tmp_path, capacity_bytes=PROCESS_CAPACITY, write_lease_s=0.05)
    process = make_process()
    for seed in range(10):
        process.start(seed)
        opened = process.read()
        assert opened["served"] == opened["found"]
        for key in KEYS[:20]:
            survivor.delete(key.block_hash)
            put(survivor, [key])
        process.kill()
        assert survivor.check() == []
        assert count_served(survivor) == count_found(survivor) > 0
    time.sleep(0.1)
    for key in (KEYS[0], KEYS[60], KEYS[90]):  # one of each size
        survivor.delete(key.block_hash)
        put(survivor, [key])
    assert count_writing(survivor._index) == 0
    survivor.close()


def test_processes_share_a_directory(tmp_path, make_process):
    processes = [make_process() for _ in range(3)]
    for seed, process in enumerate(processes):
        process.start(seed, seconds=3)
    for process in processes:
        counts = process.wait()
        assert min(counts["puts"], counts["hits"]) > 20 and counts["evictions"] > 0
    tier = open_tier(tmp_path, capacity_bytes=PROCESS_CAPACITY)
    assert tier.check() == []
    assert count_served(tier) == count_found(tier) > 0
    tier.close()


def test_a_reader_overtaken_by_an_eviction_reports_a_miss(tmp_path, monkeypatch):
    first, second = make_keys(2)
    reader = open_tier(tmp_path, capacity_bytes=4096)
    writer = open_tier(tmp_path, capacity_bytes=4096)
    put(writer, [first])
    read = reader._files.read

    def slow_read(slab, slot, out):
        put(writer, [second])  # takes the only slot between look-up and read
        return read(slab, slot, out)

    monkeypatch.setattr(reader._files, "read", slow_read)
    assert reader.get(first.block_hash, memoryview(bytearray(LAYOUT.record_bytes))) is None
    monkeypatch.undo()
    assert count_right(reader, [second]) == 1
    reader.close()
    writer.close()


def test_a_writer_past_its_lease_publishes_nothing(tmp_path, monkeypatch):
    first, second = make_keys(2)
    settings = {"capacity_bytes": 4096, "write_lease_s": 0.05}
    slow, fast = open_tier(tmp_path, **settings), open_tier(tmp_path, **settings)
    write = slow._files.write

    def slow_write(slab, slot, record):
        write(slab, slot, record)
        time.sleep(0.1)
        put(fast, [second])

    monkeypatch.setattr(slow._files, "write", slow_write)
    with pytest.raises(TierTimeout, match=r"within 0.05 s"):
        put(slow, [first])
    assert not fast.contains(first.block_hash)
    assert count_right(fast, [second]) == 1
    assert fast.check() == []
    slow.close()
    fast.close()


@pytest.mark.parametrize(
    "damage",
    ["missing", "garbage", "empty", "damaged page", "other tables", "no text"],
)
def test_a_lost_index_is_rebuilt_from_the_slabs(tmp_path, damage):
    keys = make_keys(40)
    tier = open_tier(tmp_path)
    put(tier, keys)
    tier.delete(keys[0].block_hash)
    tier.close()
    index = tmp_path / "index.sqlite"
    size = index.stat().st_size
    match damage:
        case "missing":
            index.unlink()
        case "garbage":
            index.write_bytes(np.random.default_rng(0).bytes(size))
        case "empty":
            index.write_bytes(b"")
        case "damaged page":
            with index.open("r+b") as file:
                file.seek(4096)
                file.write(np.random.default_rng(0).bytes(size - 4096))
        case "other tables":
            index.unlink()
            with sqlite3.connect(index) as sql:
                sql.execute("CREATE TABLE strangers (name TEXT)")
            sql.close()
        case "no text":  # SQLite's message quotes the bytes, which are no UTF-8
            damaged = index.read_bytes().replace(b"WITHOUT ROWID", b"WITHOUT \xff\xfeWID")
            index.write_bytes(damaged)
    tier = open_tier(tmp_path)
    assert tier.check() == []
    assert count_right(tier, keys) == 39  # what was deleted stays deleted
    assert not tier.contains(keys[0].block_hash)
    put(tier, keys)
    assert count_right(tier, keys) == 40
    tier.close()
    if damage in ("garbage", "damaged page", "other tables", "no text"):
        assert (tmp_path / "damaged-index.sqlite").exists()  # set aside, not destroyed


def test_a_free_slot_of_no_slab_is_damage(tmp_path):
    tier = open_tier(tmp_path)
    put(tier, make_keys(1))
    with sqlite3.connect(tmp_path / "index.sqlite") as sql:
        sql.execute("DELETE FROM slabs")
    sql.close()
    with pytest.raises(TierUnavailable, match="expected a free slot in a known slab"):
        put(tier, make_keys(2))
    tier.close()
    tier = open_tier(tmp_path)
    assert tier.check() == []
    assert count_right(tier, make_keys(1)) == 1
    tier.close()


def test_a_damaged_index_that_others_use_is_left_alone(tmp_path):
    other = open_tier(tmp_path)
    put(other, make_keys(3))
    with (tmp_path / "index.sqlite").open("r+b") as file:
        file.write(bytes(100))
    (tmp_path / "index.sqlite-wal").write_bytes(b"")
    with pytest.raises(TierUnavailable):
        open_tier(tmp_path)
    assert not (tmp_path / "damaged-index.sqlite").exists()
    other._index._connection.close()
    other._files.close()


def test_a_truncated_slab_costs_only_its_own_records(tmp_path):
    keys = make_keys(40)
    tier = open_tier(tmp_path, slab_bytes=1 << 20)
    put(tier, keys)
    (slab,) = tmp_path.glob("slab-*")
    os.truncate(slab, 10 * 4096 + 100)
    assert count_right(tier, keys) == 10
    assert tier.get(keys[10].block_hash, memoryview(bytearray(LAYOUT.record_bytes))) == 100
    assert tier.get(keys[11].block_hash, memoryview(bytearray(LAYOUT.record_bytes))) == 0
    assert len(tier.check()) == 30  # it names each of them
    for key in keys[10:]:
        tier.delete(key.block_hash)
    assert tier.check() == []
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
    assert count_right(tier, keys) == 2  # those that start where the larger slots do
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


def test_a_directory_removed_while_open_takes_no_more_records(tmp_path):
    first, second = make_keys(2)
    tier = open_tier(tmp_path / "tier")
    put(tier, [first])
    shutil.rmtree(tmp_path / "tier")
    with pytest.raises(TierUnavailable, match=r"slab-v1-.*expected the file to stay"):
        put(tier, [second])
    assert not tier.contains(second.block_hash)
    assert tier.stats().num_puts == 1
    tier.close()


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
        sql.execute("PRAGMA user_version = 2")
    sql.close()
    before = sorted((path.name, path.stat().st_size) for path in tmp_path.iterdir())
    with pytest.raises(TierUnavailable, match="expected format version 1, got 2"):
        open_tier(tmp_path)
    assert sorted((path.name, path.stat().st_size) for path in tmp_path.iterdir()) == before


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
    assert [tier.contains(key.block_hash) for key in keys] == [False] * 24 + [True] * 16
    assert sum(path.stat().st_size for path in tmp_path.glob("slab-*")) <= 16 * 4096
    tier.close()


def test_gives_up_on_a_locked_index_in_time(tmp_path):
    (key,) = make_keys(1)
    tier = open_tier(tmp_path, timeout_s=0.2)
    blocker = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    with pytest.raises(TierTimeout, match=r"locked for 0.2 s"):
        put(tier, [key])
    assert time.monotonic() - started < 2
    assert not tier.contains(key.block_hash)  # reading goes on meanwhile
    blocker.execute("ROLLBACK")
    blocker.close()
    put(tier, [key])
    assert count_right(tier, [key]) == 1
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


def test_a_file_size_limit_refuses_writes_and_loses_nothing(tmp_path):
    """The kernel cuts the write that crosses the limit short, then refuses the rest."""
    keys = make_keys(20, LARGE_LAYOUT)
    slot_bytes = round_up(LARGE_LAYOUT.record_bytes, PAGE_BYTES)
    tier = open_tier(tmp_path, slab_bytes=20 * slot_bytes)
    put(tier, keys[:12])
    old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (13 * slot_bytes + 5000, old_limits[1]))
    try:
        put(tier, keys[12:13])
        with pytest.raises(TierFull, match="File too large"):
            put(tier, keys[13:14])
        assert next(tmp_path.glob("slab-*")).stat().st_size == 13 * slot_bytes + 5000
        assert count_right(tier, keys) == 13
        assert tier.check() == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
    put(tier, keys)
    assert count_right(tier, keys) == 20
    assert tier.check() == []
    tier.close()


def test_refuses_to_work_across_a_fork(tmp_path):
    tier = open_tier(tmp_path)
    put(tier, make_keys(1))
    pid = os.fork()
    if pid == 0:  # in the child: exit at once, whatever happens
        try:
            tier.contains(make_keys(1)[0].block_hash)
        except TierUnavailable as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert count_right(tier, make_keys(1)) == 1
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


@pytest.fixture
def closed_directory() -> Iterator[Path]:
    """A directory with five records that this process may read but not write, root or not."""
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
            os.seteuid(65534)  # modes mean nothing to root
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
