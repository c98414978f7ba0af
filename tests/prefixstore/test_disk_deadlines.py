"""The disk tier at a deadline: work that is not begun, and calls that hang in the kernel."""

import errno
import os
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
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
from hanging_calls import WAITS_S, hang_reading, hang_writing
from sample_blocks import LAYOUT, make_keys, make_record

from prefixstore.errors import TierTimeout
from prefixstore.keys import ProtectionConfig
from prefixstore.record_header import TRAILER_BYTES
from prefixstore.tiers.disk.jobs import JOB_BYTES
from prefixstore.tiers.pages import page_aligned
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


@either_way
def test_a_read_that_hangs_is_left_behind_at_the_deadline(tmp_path, monkeypatch, by_extension):
    """When it ends at last, it does not write into the caller's memory."""
    tier = open_tier(tmp_path, slab_bytes=8 << 20, capacity_bytes=16 << 20)
    names = make_names(4)
    records = [make_bytes(MIB, n) for n in range(4)]
    assert not any(tier.put_many(names, [record.data for record in records]))
    hanging = hang_reading(monkeypatch, by_extension, 2 * MIB)
    outs = [page_aligned(MIB) for _ in names]
    for out in outs:
        out[:] = 0xEE
    for wait_s in WAITS_S:
        deadline = time.monotonic() + wait_s
        outcomes = tier.get_many(names, [out.data for out in outs], deadline=deadline)
        assert time.monotonic() < deadline + 30
        assert isinstance(outcomes.pop(2), TierTimeout)
        if outcomes == [MIB] * 3:
            break
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
    for wait_s in WAITS_S:
        deadline = time.monotonic() + wait_s
        outcomes = tier.get_or_abandon_many(names, [out.data for out in outs], deadline=deadline)
        assert time.monotonic() < deadline + 30
        assert isinstance(outcomes.pop(2), TierTimeout)
        if outcomes == [MIB] * 3:
            break
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

    # without room for the trailer the tier reads into its own memory, and keeps that
    assert ask(tight, 60) == num_bytes and tight.tobytes() == bytes(make_record(key))
    monkeypatch.setattr(disk._transfers, "_read_through", None)
    assert ask(out, 60) == num_bytes and out[:num_bytes].tobytes() == bytes(make_record(key))
    hanging = hang_reading(monkeypatch, by_extension, 0)
    out[:] = 0
    for wait_s in WAITS_S:
        assert isinstance(ask(out, wait_s), TierTimeout)
        if hanging.has_begun.is_set():
            break
    assert not out.any()
    hanging.may_go_on.set()
    assert hanging.is_over.wait(60)
    tier.close()


@either_way
def test_what_may_yet_be_written_to_is_told_of_even_if_the_record_is_gone(
    tmp_path, monkeypatch, by_extension
):
    hanging = hang_reading(monkeypatch, by_extension, 2 * MIB)
    names = make_names(4)
    for wait_s in WAITS_S:
        tier = open_tier(tmp_path / str(wait_s), slab_bytes=8 << 20, capacity_bytes=16 << 20)
        assert not any(tier.put_many(names, [make_bytes(MIB, n).data for n in range(4)]))
        hanging.meanwhile = partial(tier._index.unpublish_many, set(names))
        outs = [page_aligned(MIB).data for _ in names]
        outcomes = tier.get_or_abandon_many(names, outs, deadline=time.monotonic() + wait_s)
        assert isinstance(outcomes.pop(2), TierTimeout)
        if outcomes == [None] * 3:
            break
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
    read_failing = os.preadv  # failed reads of the extension are repeated here

    def read_hanging(fd, buffers, offset):
        assert offset == 0 or may_go_on.wait(60)
        return read_failing(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read_hanging)
    out = page_aligned(8 * MIB)
    for wait_s in WAITS_S:
        deadline = time.monotonic() + wait_s
        (outcome,) = tier.get_or_abandon_many([name], [out.data], deadline=deadline)
        assert isinstance(outcome, TierTimeout)
        if has_failed.is_set():
            break
    assert has_failed.is_set()
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

    def give_up(wait_s):
        outs = [page_aligned(JOB_BYTES) for _ in names]
        views, deadline = [out.data for out in outs], time.monotonic() + wait_s
        outcomes = tier.get_or_abandon_many(names, views, deadline=deadline)
        assert all(isinstance(outcome, TierTimeout) for outcome in outcomes)
        return [weakref.ref(out) for out in outs]

    for wait_s in WAITS_S:
        kept = give_up(wait_s)
        if hanging.has_begun.is_set():
            break
    kept += give_up(0.2)  # waits for the only thread
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
        from prefixstore.tiers.pages import page_aligned

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
    clock, names = Clock(), make_names(8)
    records = [make_bytes(MIB, n) for n in range(8)]
    views = [record.data for record in records]
    hanging = hang_writing(monkeypatch, 2 * MIB)
    for wait_s in WAITS_S:
        tier = open_tier(tmp_path / str(wait_s), clock=clock, write_lease_s=1, **settings)
        outcomes = tier.put_many(names[:4], views[:4], deadline=time.monotonic() + wait_s)
        assert isinstance(outcomes.pop(2), TierTimeout)
        if outcomes == [None] * 3:
            break
    assert outcomes == [None] * 3
    assert tier.contains_many(names[:4]) == [True, True, False, True]
    assert not any(tier.put_many(names[4:7], views[4:7]))  # its slot is not used meanwhile
    hanging.may_go_on.set()
    assert hanging.is_over.wait(60)
    assert get_all(tier, names[4:7], MIB) == [view.tobytes() for view in views[4:7]]
    assert not tier.contains(names[2])
    clock.seconds += 1.1
    assert tier.sweep().num_orphans == 1
    assert not tier.put_many(names[7:], views[7:])[0]
    assert tier.stats().num_records == 4
    tier.close()
