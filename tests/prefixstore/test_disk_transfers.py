"""The disk tier's transfers: direct and buffered, many at once, parts of records."""

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from disk_tiers import (
    count_right,
    either_way,
    get_all,
    make_bytes,
    make_names,
    open_tier,
    put,
    replace_preadv,
)
from sample_blocks import make_keys

from prefixstore.errors import TierFull, TierUnavailable
from prefixstore.tiers.disk import straight_reads
from prefixstore.tiers.disk.jobs import JOB_BYTES
from prefixstore.tiers.pages import PAGE_BYTES, page_aligned

CAPACITY = 256 << 20
# around a page, around a job, and of several jobs
SIZES = [1, 4095, 4096, 4097, 70_000, JOB_BYTES, JOB_BYTES + 1, 3 * JOB_BYTES + 17]


def aligned(num_bytes: int) -> np.ndarray:
    return page_aligned(num_bytes)[:num_bytes]


def crooked(num_bytes: int) -> np.ndarray:
    """A buffer at an odd address."""
    return page_aligned(num_bytes + 1)[1 : num_bytes + 1]


def copy_to(make: Callable[[int], np.ndarray], data: np.ndarray) -> memoryview:
    memory = make(data.size)
    memory[:] = data
    return memory.data


@pytest.mark.parametrize("has_extension", [True, False])
def test_memory_on_pages_is_told_from_other_memory(monkeypatch, has_extension):
    if not has_extension:
        monkeypatch.setattr(straight_reads, "_kvkernels", None)
    on_pages = [aligned(size).data for size in (1, PAGE_BYTES, 70_000)]
    on_pages[1] = on_pages[1].toreadonly()
    assert straight_reads._begin_on_pages(on_pages)
    assert straight_reads._begin_on_pages([])
    for place in range(4):
        assert not straight_reads._begin_on_pages(
            [*on_pages[:place], crooked(10).data, *on_pages[place:]]
        )


@pytest.mark.parametrize("method", ["get_many", "get_or_abandon_many"])
@pytest.mark.parametrize("deadline_s", [None, 60])
@pytest.mark.parametrize("make_out", [aligned, crooked])
@pytest.mark.parametrize("make_in", [aligned, crooked])
@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_records_are_written_from_and_read_into_any_memory(
    tmp_path, io, make_in, make_out, deadline_s, method
):
    tier = open_tier(tmp_path, capacity_bytes=CAPACITY, io=io)
    names = make_names(2 * len(SIZES))
    records = [make_bytes(size, seed) for seed, size in enumerate(SIZES + SIZES[::-1])]
    views = [copy_to(make_in, record) for record in records]
    deadline = None if deadline_s is None else time.monotonic() + deadline_s
    assert tier.put_many(names, views, deadline=deadline) == [None] * len(names)
    memory = [make_out(record.size + 5000) for record in records]
    for out in memory:
        out[:] = 0xEE
    get = getattr(tier, method)
    outcomes = get(names, [out.data for out in memory], deadline=deadline)
    assert outcomes == [record.size for record in records]
    for record, out in zip(records, memory, strict=True):
        assert np.array_equal(out[: record.size], record)
        assert (out[record.size :] == 0xEE).all()  # nothing after the record is touched
    tier.close()


@pytest.mark.parametrize("make_out", [aligned, crooked])
@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_reads_parts_of_records(tmp_path, io, make_out):
    random = np.random.default_rng(0)
    tier = open_tier(tmp_path, capacity_bytes=CAPACITY, io=io)
    names = make_names(len(SIZES))
    records = [make_bytes(size, seed) for seed, size in enumerate(SIZES)]
    assert not any(tier.put_many(names, [record.data for record in records]))
    numbers = random.integers(0, len(SIZES), 100)
    starts = [int(random.integers(0, SIZES[n] + 1)) for n in numbers]
    outs = [make_out(int(random.integers(1, 200_000))) for _ in numbers]
    outcomes = tier.get_many(
        [names[n] for n in numbers], [out.data for out in outs], offsets=starts
    )
    for n, start, out, outcome in zip(numbers, starts, outs, outcomes, strict=True):
        expected = records[n][start : start + out.size]  # clipped at the record's end
        assert outcome == expected.size
        assert np.array_equal(out[:outcome], expected)
    tier.close()


def test_direct_and_buffered_tiers_on_one_directory_agree(tmp_path):
    """There are few slots, so that each is written both ways, and read both ways afterwards."""
    random = np.random.default_rng(0)
    settings = {"capacity_bytes": 8 * 3 * PAGE_BYTES, "slab_bytes": 8 * 3 * PAGE_BYTES}
    tiers = [open_tier(tmp_path, io=io, **settings) for io in ("auto", "buffered")]
    if not tiers[0]._files.is_direct:
        pytest.skip("the file system takes no direct transfers")
    names = make_names(16)
    records = [make_bytes(10_000 + seed, seed) for seed in range(16)]
    num_hits = 0
    for _ in range(300):
        n, tier = random.integers(16), tiers[random.integers(2)]
        tier.put(names[n], records[n].data)
        for reader in tiers:
            (found,) = get_all(reader, [names[n]], 12_000)
            assert found == records[n].tobytes()
        if random.integers(4) == 0:
            tier.delete(names[n])
        found_now = zip(get_all(tiers[random.integers(2)], names, 12_000), records, strict=True)
        for found, record in found_now:
            assert found is None or found == record.tobytes()
            num_hits += found is not None
    assert num_hits > 300 and tiers[0].stats().num_evictions > 10
    assert tiers[0]._files.is_direct and not tiers[1]._files.is_direct
    for tier in tiers:
        tier.close()


def refuse_to_open(monkeypatch) -> None:
    open_file = os.open

    def refusing(path, flags, *arguments, **keywords):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return open_file(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refusing)


def refuse_to_write(monkeypatch) -> None:
    write = os.pwritev

    def refusing(fd, *arguments):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(fd, *arguments)

    monkeypatch.setattr(os, "pwritev", refusing)


@pytest.mark.parametrize("refuse", [refuse_to_open, refuse_to_write])
def test_a_file_system_without_direct_transfers_is_used_through_the_page_cache(
    tmp_path, monkeypatch, caplog, refuse
):
    refuse(monkeypatch)
    keys = make_keys(30)
    tier = open_tier(tmp_path / "auto", slab_bytes=4 * PAGE_BYTES)
    put(tier, keys)
    assert count_right(tier, keys) == 30
    assert tier.check() == []
    assert not tier._files.is_direct
    assert caplog.text.count("no direct transfers here") == 1
    tier.close()
    tier = open_tier(tmp_path / "direct", io="direct")
    with pytest.raises(TierUnavailable, match="Invalid argument"):
        put(tier, keys)
    tier.close()


def test_a_batch_takes_a_few_statements(tmp_path):
    """One look-up for a batch that is read; one and two transactions for one that is written."""
    tier = open_tier(tmp_path)
    names = make_names(100)
    statements: list[str] = []
    for connection in (tier._index.look_ups._reader, tier._index._writer):
        connection._sql.set_trace_callback(statements.append)
    assert not any(tier.put_many(names, [make_bytes(3000, n).data for n in range(100)]))
    assert sum(s.startswith("BEGIN") for s in statements) == 2
    looked_up = [s for s in statements if s.startswith("SELECT") and "block_hash IN" in s]
    assert len(looked_up) == 1
    statements.clear()
    get_all(tier, names, 3000)
    assert [s.partition(" ")[0] for s in statements] == ["PRAGMA", "SELECT", "PRAGMA"]
    statements.clear()
    get_all(tier, names, 3000)  # nothing changed: their places are remembered
    assert [s.partition(" ")[0] for s in statements] == ["PRAGMA", "PRAGMA"]
    statements.clear()
    assert all(tier.delete_many(names))
    assert sum(s.startswith("BEGIN") for s in statements) == 2
    tier.close()


@either_way
def test_neighbours_move_in_one_system_call(tmp_path, monkeypatch, by_extension):
    tier = open_tier(tmp_path, slab_bytes=1 << 20)
    if not tier._files.is_direct:
        pytest.skip("the file system takes no direct transfers")
    names = make_names(100)
    calls: list[int] = []
    write = os.pwritev

    def counting_write(fd, buffers, offset):
        calls.append(offset)
        return write(fd, buffers, offset)

    def counting_read(read, offset, _):
        calls.append(offset)
        return read()

    monkeypatch.setattr(os, "pwritev", counting_write)
    replace_preadv(monkeypatch, by_extension, counting_read)
    assert not any(tier.put_many(names, [make_bytes(3000, n).data for n in range(100)]))
    assert None not in get_all(tier, names, 3000)
    assert calls == [0, 0]
    tier.close()


@either_way
@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_who_reads_without_a_deadline_is_one_of_the_threads(
    tmp_path, monkeypatch, by_extension, io
):
    tier = open_tier(tmp_path, num_threads=2, capacity_bytes=4 * JOB_BYTES, io=io)
    names = make_names(2)
    records = [make_bytes(JOB_BYTES, n) for n in range(2)]
    assert not any(tier.put_many(names, [record.data for record in records]))
    both, readers = threading.Barrier(2, timeout=10), set()

    def read_together(read, *_):
        if threading.current_thread().name not in readers:
            readers.add(threading.current_thread().name)
            both.wait()
        return read()

    replace_preadv(monkeypatch, by_extension, read_together)
    assert get_all(tier, names, JOB_BYTES) == [record.tobytes() for record in records]
    assert len(readers) == 2 and threading.current_thread().name in readers
    tier.close()


@pytest.fixture
def interruptible():
    """Make SIGINT interrupt, even if the tests were started with it ignored, as by a shell in the
    background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@either_way
@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_reader_waits_for_the_other_threads(tmp_path, monkeypatch, by_extension):
    tier = open_tier(tmp_path, num_threads=2, capacity_bytes=4 * JOB_BYTES)
    names = make_names(2)
    assert not any(tier.put_many(names, [make_bytes(JOB_BYTES, n).data for n in range(2)]))
    has_begun, ended = threading.Event(), []

    def read_interrupted(read, *_):
        if threading.current_thread() is threading.main_thread():
            assert has_begun.wait(10)
            if by_extension:
                return read()
            raise KeyboardInterrupt
        has_begun.set()
        time.sleep(0.2)
        if by_extension:  # whose other thread is waiting by now
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        ended.append(read())
        return ended[-1]

    replace_preadv(monkeypatch, by_extension, read_interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_all(tier, names, JOB_BYTES)
    assert ended == [JOB_BYTES]
    monkeypatch.undo()
    tier.close()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_reader_with_a_deadline_begins_no_more(tmp_path, monkeypatch):
    tier = open_tier(tmp_path, num_threads=1, capacity_bytes=4 * JOB_BYTES)
    names = make_names(2)
    assert not any(tier.put_many(names, [make_bytes(JOB_BYTES, n).data for n in range(2)]))
    may_go_on, begun = threading.Event(), []

    def read_interrupted(read, offset, _):
        begun.append(offset)
        os.kill(os.getpid(), signal.SIGINT)
        assert may_go_on.wait(60)
        return read()

    replace_preadv(monkeypatch, True, read_interrupted)
    outs = [page_aligned(JOB_BYTES).data for _ in names]
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        tier.get_or_abandon_many(names, outs, deadline=started + 50)
    assert time.monotonic() - started < 25
    may_go_on.set()
    tier._transfers._threads.close(wait=True)
    assert begun == [0]
    monkeypatch.undo()
    tier.close()


def test_moves_as_many_records_a_call_as_the_kernel_takes(tmp_path):
    num_records = 4 * JOB_BYTES // PAGE_BYTES
    tier = open_tier(tmp_path, capacity_bytes=4 * JOB_BYTES, slab_bytes=4 * JOB_BYTES)
    names = make_names(num_records)
    records = make_bytes(num_records * 3000, 0).reshape(num_records, 3000)
    assert not any(tier.put_many(names, [record.data for record in records]))
    assert get_all(tier, names, 3000) == [record.tobytes() for record in records]
    tier.close()


def test_a_record_may_come_twice_in_a_batch(tmp_path):
    tier = open_tier(tmp_path)
    (name,) = make_names(1)
    first, second = make_bytes(3000, 0), make_bytes(3000, 1)
    assert tier.put_many([name, name], [first.data, second.data]) == [None, None]
    assert get_all(tier, [name, name], 3000) == [first.tobytes()] * 2
    assert tier.stats().num_puts == 1
    tier.close()


def test_what_has_no_room_does_not_keep_the_rest_of_a_batch_out(tmp_path):
    tier = open_tier(tmp_path, capacity_bytes=8 * PAGE_BYTES, slab_bytes=8 * PAGE_BYTES)
    names = make_names(13)
    records = [make_bytes(3000, n).data for n in range(12)]
    outcomes = tier.put_many(names, [*records, make_bytes(9 * PAGE_BYTES, 12).data])
    assert outcomes[:8] == [None] * 8
    assert all(isinstance(outcome, TierFull) for outcome in outcomes[8:])
    assert tier.contains_many(names) == [True] * 8 + [False] * 5
    tier.close()


@either_way
@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_a_bad_spot_on_the_disk_costs_only_the_record_read_there(
    tmp_path, monkeypatch, by_extension, io
):
    """Its neighbours were to be read in the same system call."""
    tier = open_tier(tmp_path, slab_bytes=20 * PAGE_BYTES, io=io)
    names = make_names(10)
    records = [make_bytes(3000, n) for n in range(10)]
    assert not any(tier.put_many(names, [record.data for record in records]))

    def read_failing(read, offset, num_bytes):
        if offset <= 5 * PAGE_BYTES < offset + num_bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read()

    replace_preadv(monkeypatch, by_extension, read_failing)
    outcomes = get_all(tier, names, 3000)
    bad = outcomes.pop(5)
    assert isinstance(bad, TierUnavailable) and os.strerror(errno.EIO) in str(bad)
    del records[5]
    assert outcomes == [record.tobytes() for record in records]
    monkeypatch.undo()
    assert tier.contains_many(names) == [True] * 10
    tier.close()


def test_a_bad_spot_on_the_disk_costs_only_the_record_written_there(tmp_path, monkeypatch):
    """Its neighbours were to be written in the same system call."""
    tier = open_tier(tmp_path, slab_bytes=20 * PAGE_BYTES)
    names = make_names(10)
    records = [make_bytes(3000, n) for n in range(10)]
    write = os.pwritev

    def failing(fd, buffers, offset):
        if offset <= 5 * PAGE_BYTES < offset + sum(buffer.nbytes for buffer in buffers):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", failing)
    outcomes = tier.put_many(names, [record.data for record in records])
    assert [type(outcome) for outcome in outcomes] == [
        TierUnavailable if n == 5 else type(None) for n in range(10)
    ]
    monkeypatch.undo()
    assert tier.contains_many(names) == [n != 5 for n in range(10)]
    tier.close()
