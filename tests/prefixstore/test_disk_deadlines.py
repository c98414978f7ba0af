"""The disk tier at a deadline: what is not begun, and what hangs in the kernel."""

import errno
import os
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from disk_tiers import (
    MIB,
    Clock,
    count_right,
    either_way,
    get_all,
    make_bytes,
    make_names,
    open_tier,
    put,
    replace_preadv,
)
from sample_blocks import LAYOUT, make_keys, make_record

from prefixstore.errors import TierTimeout
from prefixstore.keys import ProtectionConfig
from prefixstore.record_header import TRAILER_BYTES
from prefixstore.tiers.base import PAGE_BYTES, page_aligned
from prefixstore.tiers.disk import DiskTier
from prefixstore.tiers.disk.jobs import JOB_BYTES
from prefixstore.tiers.protected import ProtectedTier


def test_nothing_is_begun_after_the_deadline(tmp_path):
    tier = open_tier(tmp_path)
    first, second = make_keys(2)
    put(tier, [first])
    past = time.monotonic() - 1
    (outcome,) = get_all(tier, [first.name], LAYOUT.record_bytes, past)
    assert isinstance(outcome, TierTimeout)
    (outcome,) = tier.put_many([second.name], [memoryview(make_record(second))], deadline=past)
    assert isinstance(outcome, TierTimeout)
    assert not tier.contains(second.name)
    assert count_right(tier, [first]) == 1
    tier.close()


class Hanging:
    """A system call that hangs at one offset until it is let go."""

    def __init__(self, offset: int) -> None:
        self._offset = offset
        self.may_go_on = threading.Event()
        self.is_over = threading.Event()

    def __call__(self, transfer, offset, num_bytes):
        if offset != self._offset:
            return transfer()
        assert self.may_go_on.wait(60)
        try:
            return transfer()
        finally:
            self.is_over.set()


def hang_reading(monkeypatch, by_extension: bool, offset: int) -> Hanging:
    hanging = Hanging(offset)
    replace_preadv(monkeypatch, by_extension, hanging)
    return hanging


def hang_writing(monkeypatch, offset: int) -> Hanging:
    hanging, write = Hanging(offset), os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, buffers, at: hanging(lambda: write(fd, buffers, at), at, 0)
    )
    return hanging


@either_way
def test_a_read_that_hangs_is_left_behind_at_the_deadline(tmp_path, monkeypatch, by_extension):
    """And does not write into the caller's memory when it ends at last."""
    tier = open_tier(tmp_path, slab_bytes=8 << 20, capacity_bytes=16 << 20)
    names = make_names(4)
    records = [make_bytes(MIB, n) for n in range(4)]
    assert not any(tier.put_many(names, [record.data for record in records]))
    hanging = hang_reading(monkeypatch, by_extension, 2 * MIB)
    outs = [page_aligned(MIB) for _ in names]
    for out in outs:
        out[:] = 0xEE
    started = time.monotonic()
    outcomes = tier.get_many(names, [out.data for out in outs], deadline=started + 0.3)
    assert time.monotonic() - started < 5
    assert isinstance(outcomes.pop(2), TierTimeout)
    assert outcomes == [MIB] * 3
    hanging.may_go_on.set()
    assert hanging.is_over.wait(60)
    time.sleep(0.1)
    assert (outs[2] == 0xEE).all()
    assert get_all(tier, names, MIB) == [record.tobytes() for record in records]
    tier.close()


@either_way
def test_an_abandoned_buffer_may_be_written_to_later_and_is_not_read_through_another(
    tmp_path, monkeypatch, by_extension
):
    tier = open_tier(tmp_path, slab_bytes=8 << 20, capacity_bytes=16 << 20)
    names = make_names(4)
    records = [make_bytes(MIB, n) for n in range(4)]
    assert not any(tier.put_many(names, [record.data for record in records]))
    hanging = hang_reading(monkeypatch, by_extension, 2 * MIB)
    monkeypatch.setattr(tier._transfers, "_read_through", None)
    outs = [page_aligned(MIB) for _ in names]
    deadline = time.monotonic() + 0.3
    outcomes = tier.get_or_abandon_many(names, [out.data for out in outs], deadline=deadline)
    assert time.monotonic() - deadline < 5
    assert isinstance(outcomes.pop(2), TierTimeout)
    assert outcomes == [MIB] * 3
    assert all(np.array_equal(outs[n], records[n]) for n in (0, 1, 3))
    hanging.may_go_on.set()
    assert hanging.is_over.wait(60)
    tier._transfers._threads.close(wait=True)
    assert np.array_equal(outs[2], records[2])
    tier.close()


@either_way
def test_under_a_key_abandoned_buffers_are_not_read_through_another_either(
    tmp_path, monkeypatch, by_extension
):
    disk = open_tier(tmp_path)
    tier = ProtectedTier(disk, ProtectionConfig(bytes(32)))
    (key,) = make_keys(1)
    put(tier, [key])
    num_bytes = LAYOUT.record_bytes
    out, tight = page_aligned(num_bytes + TRAILER_BYTES), page_aligned(num_bytes)

    def ask(out, seconds):
        deadline = time.monotonic() + seconds
        (outcome,) = tier.get_or_abandon_many([key.name], [out.data], deadline=deadline)
        return outcome

    # without room for the trailer it comes by way of the tier's own memory, which it keeps
    assert ask(tight, 60) == num_bytes and tight.tobytes() == bytes(make_record(key))
    monkeypatch.setattr(disk._transfers, "_read_through", None)
    assert ask(out, 60) == num_bytes and out[:num_bytes].tobytes() == bytes(make_record(key))
    hanging = hang_reading(monkeypatch, by_extension, 0)
    out[:] = 0
    assert isinstance(ask(out, 0.2), TierTimeout)
    assert not out.any()
    hanging.may_go_on.set()
    assert hanging.is_over.wait(60)
    tier.close()


@either_way
def test_what_may_yet_be_written_to_is_told_of_even_if_the_record_is_gone(
    tmp_path, monkeypatch, by_extension
):
    tier = open_tier(tmp_path, slab_bytes=8 << 20, capacity_bytes=16 << 20)
    names = make_names(4)
    assert not any(tier.put_many(names, [make_bytes(MIB, n).data for n in range(4)]))
    hanging = hang_reading(monkeypatch, by_extension, 2 * MIB)
    deleting = threading.Timer(0.1, lambda: tier._index.unpublish_many(set(names)))
    deleting.start()
    outs = [page_aligned(MIB).data for _ in names]
    outcomes = tier.get_or_abandon_many(names, outs, deadline=time.monotonic() + 0.5)
    deleting.join()
    assert isinstance(outcomes.pop(2), TierTimeout)
    assert outcomes == [None] * 3
    hanging.may_go_on.set()
    assert hanging.is_over.wait(60)
    tier.close()


@either_way
def test_what_may_yet_be_written_to_is_told_of_even_if_another_piece_cannot_be_read(
    tmp_path, monkeypatch, by_extension
):
    tier = open_tier(tmp_path, slab_bytes=8 * MIB, capacity_bytes=16 * MIB)
    (name,) = make_names(1)
    record = make_bytes(8 * MIB, 0)
    assert tier.put_many([name], [record.data]) == [None]
    may_go_on, has_failed = threading.Event(), threading.Event()

    def fail_at_the_start(read, offset, _):
        if offset == 0:
            has_failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read()

    replace_preadv(monkeypatch, by_extension, fail_at_the_start)
    read_failing = os.preadv  # the extension's reads do not hang: what failed is read again here

    def read_hanging(fd, buffers, offset):
        assert offset == 0 or may_go_on.wait(60)
        return read_failing(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read_hanging)
    out = page_aligned(8 * MIB)
    deadline = time.monotonic() + 0.5
    (outcome,) = tier.get_or_abandon_many([name], [out.data], deadline=deadline)
    assert has_failed.is_set()
    assert isinstance(outcome, TierTimeout)
    may_go_on.set()
    tier._transfers._threads.close(wait=True)
    tier.close()


@either_way
def test_threads_that_hang_keep_no_memory_but_what_they_read_into(
    tmp_path, monkeypatch, by_extension
):
    tier = open_tier(tmp_path, num_threads=1, slab_bytes=8 << 20, capacity_bytes=16 << 20)
    names = make_names(2)
    assert not any(tier.put_many(names, [make_bytes(JOB_BYTES, n).data for n in range(2)]))
    hanging = hang_reading(monkeypatch, by_extension, 0)
    kept = []
    for _ in range(2):  # the second call waits for the only thread
        outs = [page_aligned(JOB_BYTES) for _ in names]
        kept += [weakref.ref(out) for out in outs]
        deadline = time.monotonic() + 0.2
        outcomes = tier.get_or_abandon_many(names, [out.data for out in outs], deadline=deadline)
        assert all(isinstance(outcome, TierTimeout) for outcome in outcomes)
        del outs
    assert [out() is not None for out in kept] == [True, False, False, False]
    hanging.may_go_on.set()
    assert hanging.is_over.wait(60)
    tier._transfers._threads.close(wait=True)
    assert not any(out() is not None for out in kept)
    tier.close()


@either_way
def test_a_thread_that_hangs_does_not_keep_the_process(tmp_path, by_extension):
    program = f"""if True:
        import threading, time
        from pathlib import Path
        import pytest
        from disk_tiers import MIB, make_bytes, make_names, open_tier, replace_preadv
        from prefixstore.errors import TierTimeout
        from prefixstore.tiers.base import page_aligned

        tier = open_tier(Path({str(tmp_path)!r}), slab_bytes=2 * MIB, capacity_bytes=4 * MIB)
        (name,) = make_names(1)
        assert tier.put_many([name], [make_bytes(MIB, 0).data]) == [None]
        hang = lambda *_: threading.Event().wait()
        replace_preadv(pytest.MonkeyPatch(), {by_extension}, hang)
        outs, deadline = [page_aligned(MIB).data], time.monotonic() + 0.2
        (outcome,) = tier.get_or_abandon_many([name], outs, deadline=deadline)
        assert isinstance(outcome, TierTimeout), outcome
        print("left behind")
    """
    told = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        timeout=60,
        check=True,
        capture_output=True,
        text=True,
    )
    assert told.stdout == "left behind\n"


def test_a_write_that_hangs_is_left_behind_and_never_shown(tmp_path, monkeypatch):
    settings = {"capacity_bytes": 4 * MIB, "slab_bytes": 4 * MIB}
    tier = open_tier(tmp_path, write_lease_s=1, **settings)
    names = make_names(8)
    records = [make_bytes(MIB, n) for n in range(8)]
    views = [record.data for record in records]
    hanging = hang_writing(monkeypatch, 2 * MIB)
    outcomes = tier.put_many(names[:4], views[:4], deadline=time.monotonic() + 0.3)
    assert isinstance(outcomes.pop(2), TierTimeout)
    assert outcomes == [None] * 3
    assert tier.contains_many(names[:4]) == [True, True, False, True]
    assert not any(tier.put_many(names[4:7], views[4:7]))  # its slot is not used meanwhile
    hanging.may_go_on.set()
    assert hanging.is_over.wait(60)
    assert get_all(tier, names[4:7], MIB) == [view.tobytes() for view in views[4:7]]
    assert not tier.contains(names[2])
    time.sleep(1.1)
    assert tier.sweep().num_orphans == 1
    assert not tier.put_many(names[7:], views[7:])[0]
    assert tier.stats().num_records == 4
    tier.close()


@contextmanager
def locked_by_another(tier: DiskTier) -> Iterator[None]:
    sql = sqlite3.connect(tier._config.path / "index.sqlite", isolation_level=None)
    sql.execute("BEGIN IMMEDIATE")
    yield
    sql.close()


@pytest.mark.parametrize("locked", [locked_by_another, lambda tier: tier._index.frozen()])
def test_marks_of_use_wait_for_nobody(tmp_path, locked):
    """And go along with the next transaction."""
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
    """Let a writer die beside a record, and reading what it left hang."""
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
