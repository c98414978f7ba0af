"""The disk tier shared by processes: killed writers, neighbours, overtaken readers and writers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from disk_process import KEYS, count_found, count_served, count_writing
from disk_tiers import MIB, Clock, count_right, get_all, make_bytes, make_names, open_tier, put
from sample_blocks import LAYOUT, make_keys

from prefixstore.block_key import RecordName
from prefixstore.errors import TierTimeout, TierUnavailable
from prefixstore.tiers.base import Swept
from prefixstore.tiers.disk import slab_table

HERE = Path(__file__).resolve().parent
PROCESS_CAPACITY = 6 << 20  # less than the processes write


class DiskProcess:
    """Starts processes on one directory, one after another; see disk_process.py."""

    def __init__(self, path: Path, lease_s: float = 60) -> None:
        python_path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
        self._forker = subprocess.Popen(
            [sys.executable, HERE / "disk_process.py", path, str(PROCESS_CAPACITY), str(lease_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        )
        self._pid = 0

    def start(self, seed: int, seconds: float = 60) -> None:
        """Start a process; returns when it is about to open the tier."""
        self._forker.stdin.write(f"{seed} {seconds}\n")
        self._forker.stdin.flush()
        self._pid = self.read()["pid"]

    def read(self) -> dict[str, int]:
        return json.loads(self._forker.stdout.readline())

    def kill(self) -> dict[str, int]:
        os.kill(self._pid, signal.SIGKILL)
        return self.wait(-signal.SIGKILL)

    def wait(self, exit_code: int = 0) -> dict[str, int]:
        """Wait for its end; returns the last line that it printed."""
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

    def make(**settings) -> DiskProcess:
        processes.append(DiskProcess(tmp_path, **settings))
        return processes[-1]

    yield make
    for process in processes:
        process.close()


def test_kill_minus_nine_in_the_middle_of_writes(tmp_path, make_process):
    """50 writers on one directory are killed at random moments, and 10 more while they open it;
    more of them if no kill came in the middle of a write.

    Each process mends what the previous one left, finds no fault in its recount, and reads back
    rightly all that the index knows; otherwise it fails, and with it the test.
    """
    random = np.random.default_rng(0)
    process = make_process()
    totals = dict.fromkeys(("kills", "puts", "evictions", "cut_off", "served"), 0)
    for round_number in range(600):
        if round_number >= 60 and totals["cut_off"] > 0:
            break
        process.start(seed=round_number)
        if round_number % 6 == 5:
            time.sleep(random.uniform(0, 0.02))
            process.kill()
            continue
        opened = process.read()
        assert opened["served"] == opened["found"]
        for _ in range(random.integers(20)):
            process.read()  # after each put
        time.sleep(random.uniform(0, 0.005))
        counts = {**opened, **process.kill(), "kills": 1}
        totals = {name: total + counts.get(name, 0) for name, total in totals.items()}
    tier = open_tier(tmp_path, capacity_bytes=PROCESS_CAPACITY)
    assert tier.check() == []
    assert count_served(tier) == count_found(tier)
    assert tier.stats().used_bytes <= PROCESS_CAPACITY
    tier.close()
    print(totals)
    # kills came while it wrote, evicted and was in the middle of a write, and it kept something
    assert totals["kills"] >= 50 and totals["cut_off"] > 0
    assert min(totals["puts"], totals["evictions"], totals["served"]) > 50


def test_a_writer_killed_beside_others_leaves_them_unharmed(tmp_path, make_process):
    """The dead writer's slots become free when its lease ends."""
    survivor = open_tier(tmp_path, capacity_bytes=PROCESS_CAPACITY, write_lease_s=2)
    process = make_process()
    for seed in range(10):
        process.start(seed)
        opened = process.read()
        assert opened["served"] == opened["found"]
        for key in KEYS[:20]:
            survivor.delete(key.name)
            put(survivor, [key])
        process.kill()
        assert survivor.check() == []
        assert count_served(survivor) == count_found(survivor) > 0
    time.sleep(2.1)
    for key in (KEYS[0], KEYS[60], KEYS[90]):  # one of each size
        survivor.delete(key.name)
        put(survivor, [key])
    assert count_writing(survivor._index) == 0
    survivor.close()


@pytest.mark.timeout(120)
def test_a_hundred_kills_of_two_writers_leak_nothing(tmp_path, make_process):
    """Two processes at a time write to one directory, and one after another is killed.

    A third has it open all the time, so that it is never mended at opening: leases and sweeps must
    free what the dead ones left.
    """
    random = np.random.default_rng(1)
    survivor = open_tier(tmp_path, capacity_bytes=PROCESS_CAPACITY, write_lease_s=1)
    processes = [make_process(lease_s=1) for _ in range(2)]
    for seed, process in enumerate(processes):
        process.start(seed)
        process.read()
    num_puts = 0
    for number in range(100):
        time.sleep(random.uniform(0, 0.05))
        process = processes[number % 2]
        num_puts += process.kill().get("puts", 0)
        process.start(seed=2 + number)
        process.read()
    for process in processes:
        process.kill()
    assert num_puts > 100
    assert survivor.check() == []
    time.sleep(1.1)
    survivor.sweep()
    assert count_writing(survivor._index) == 0
    assert survivor.sweep() == Swept()
    assert survivor.check() == []
    with survivor._index.frozen() as sql:
        known = {slab.file_name for slab in slab_table.list_slabs(sql)}
    # a writer that dies before it makes its slab's file leaves a row; the next one makes the file
    assert {path.name for path in tmp_path.glob("slab-*")} <= known
    assert sum(path.stat().st_size for path in tmp_path.glob("slab-*")) <= PROCESS_CAPACITY
    assert count_served(survivor) == count_found(survivor) > 0
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


@pytest.mark.parametrize("is_own_write", [False, True])
@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_reader_overtaken_by_an_eviction_reports_a_miss(
    tmp_path, monkeypatch, is_own_write, num_slots
):
    first, second = make_keys(2)
    reader = open_tier(tmp_path, capacity_bytes=4096 * num_slots)
    other = open_tier(tmp_path, capacity_bytes=4096 * num_slots)
    writer = reader if is_own_write else other
    put(writer, [first])
    read = reader._files.read

    def slow_read(slab, slot, out):
        put(writer, [second])  # takes the only slot, or the other one, between look-up and read
        return read(slab, slot, out)

    monkeypatch.setattr(reader._files, "read", slow_read)
    outcome = reader.get(first.name, memoryview(bytearray(LAYOUT.record_bytes)))
    assert outcome == (None if num_slots == 1 else LAYOUT.record_bytes)
    monkeypatch.undo()
    assert count_right(reader, [second]) == 1
    reader.close()
    other.close()


def test_records_are_looked_up_again_only_after_a_change(tmp_path, monkeypatch):
    first, second = make_keys(2)
    tier, other = open_tier(tmp_path), open_tier(tmp_path)
    put(tier, [first])
    looked_up = []
    places_among = tier._index.look_ups.places_among

    def counted(names, deadline):
        looked_up.extend(names)
        return places_among(names, deadline)

    monkeypatch.setattr(tier._index.look_ups, "places_among", counted)
    assert count_right(tier, [first]) == count_right(tier, [first]) == 1
    assert looked_up == []
    read = tier._files.read

    def slow_read(slab, slot, out):
        put(other, [second])
        return read(slab, slot, out)

    monkeypatch.setattr(tier._files, "read", slow_read)
    assert count_right(tier, [first]) == 1
    assert looked_up == [first.name]
    tier.close()
    other.close()


def test_a_writer_past_its_lease_publishes_nothing(tmp_path, monkeypatch):
    first, second = make_keys(2)
    clock = Clock()
    slow, fast = [open_tier(tmp_path, clock=clock, capacity_bytes=4096) for _ in range(2)]
    write = slow._files.write

    def slow_write(slab, slot, record):
        write(slab, slot, record)
        clock.seconds += 100
        put(fast, [second])

    monkeypatch.setattr(slow._files, "write", slow_write)
    with pytest.raises(TierTimeout, match=r"expected a write within [0-9.]+ s \(write_lease_s\)"):
        put(slow, [first])
    assert not fast.contains(first.name)
    assert count_right(fast, [second]) == 1
    assert fast.check() == []
    slow.close()
    fast.close()


def test_a_writer_past_its_lease_begins_no_write(tmp_path, monkeypatch):
    """Its slots may be another's by then, whose record it would write over."""
    settings = {"capacity_bytes": 8 * MIB, "slab_bytes": 8 * MIB, "num_threads": 1}
    clock, names, offsets = Clock(), make_names(2), []
    slow = open_tier(tmp_path, clock=clock, write_lease_s=0.4, **settings)
    fast = open_tier(tmp_path, clock=clock, **settings)
    other, bytes_of_other = make_names(1, seed=1)[0], make_bytes(4 * MIB, 1)
    write = slow._files.write

    def slow_write(slab, offset, buffers):
        offsets.append(offset)
        write(slab, offset, buffers)
        time.sleep(0.25)  # more than a half of the lease
        clock.seconds += 100
        assert fast.put_many([other], [bytes_of_other.data]) == [None]

    monkeypatch.setattr(slow._files, "write", slow_write)
    records = [make_bytes(4 * MIB, n).data for n in (2, 3)]
    with pytest.raises(TierTimeout, match=r"expected a write within 0.4 s \(write_lease_s\)"):
        raise slow.put_many(names, records, deadline=time.monotonic() + 60)[1]
    assert len(offsets) <= 1  # none where this process stood still before the first
    assert get_all(fast, [other], 4 * MIB) == ([bytes_of_other.tobytes()] if offsets else [None])
    slow.close()
    fast.close()


def test_a_writer_past_its_lease_wipes_nothing(tmp_path, monkeypatch):
    first, second = make_keys(1), make_keys(1, seed=1)
    clock, large = Clock(), RecordName(bytes(16), bytes(32))
    dead, slow, fast = [open_tier(tmp_path, clock=clock, write_lease_s=0.5) for _ in range(3)]
    dead._index.allocate_many({first[0].name: LAYOUT.record_bytes}, 0)  # never published
    clock.seconds += 1
    write = slow._files.write

    def slow_write(slab, offset, buffers):
        write(slab, offset, buffers)
        clock.seconds += 1
        time.sleep(0.6)
        put(fast, second)  # into the slot that `slow` is about to wipe for a dead writer

    monkeypatch.setattr(slow._files, "write", slow_write)
    with pytest.raises(TierTimeout, match=r"within 0.5 s"):
        slow.put(large, memoryview(bytes(4 * LAYOUT.record_bytes)))
    assert count_right(fast, second) == 1
    for tier in (dead, slow, fast):
        tier.close()


def test_refuses_to_work_across_a_fork(tmp_path):
    tier = open_tier(tmp_path)
    put(tier, make_keys(1))
    pid = os.fork()
    if pid == 0:  # in the child: exit at once, whatever happens
        try:
            tier.contains(make_keys(1)[0].name)
        except TierUnavailable as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert count_right(tier, make_keys(1)) == 1
    tier.close()
