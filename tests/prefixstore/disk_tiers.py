"""Opens, fills and reads disk tiers, for their tests."""

import ctypes
import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sample_blocks import make_payload, make_record

from prefixstore.block_key import BlockHash, RecordName
from prefixstore.errors import BlockCorrupted, TierError
from prefixstore.record import BlockKey, decode
from prefixstore.tiers.disk import DiskTier, DiskTierConfig, straight_reads
from prefixstore.tiers.pages import PAGE_BYTES, page_aligned, round_up

CAPACITY = 2 << 20
MIB = 1 << 20


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.seconds = 1e6

    def __call__(self) -> float:
        return self.seconds


def open_tier(path: Path, *, clock: Clock | None = None, **settings) -> DiskTier:
    return DiskTier(DiskTierConfig(path, **{"capacity_bytes": CAPACITY, **settings}), clock)


def put(tier: DiskTier, keys: list[BlockKey]) -> None:
    for key in keys:
        tier.put(key.name, memoryview(make_record(key)))


def put_with(tier: DiskTier, keys: list[BlockKey], priority: int) -> list[TierError | None]:
    """Put records in one call; returns each one's outcome."""
    records = [memoryview(make_record(key)) for key in keys]
    return tier.put_many([key.name for key in keys], records, priority=priority)


def contains(tier: DiskTier, keys: list[BlockKey]) -> list[bool]:
    return tier.contains_many([key.name for key in keys])


def count_right(tier: DiskTier, keys: list[BlockKey]) -> int:
    """How many records are found and verify; a wrong one that passes for right fails the test."""
    num_right = 0
    for key in keys:
        record, payload = bytearray(key.layout.record_bytes), bytearray(key.layout.payload_bytes)
        num_read = tier.get(key.name, memoryview(record))
        if num_read is not None:
            try:
                decode(record[:num_read], key, payload)
            except BlockCorrupted:
                continue
            assert payload == make_payload(key).tobytes()
            num_right += 1
    return num_right


def make_names(num: int, seed: int = 0) -> list[RecordName]:
    random = np.random.default_rng(seed)
    return [RecordName(bytes(16), BlockHash(random.bytes(16))) for _ in range(num)]


def make_bytes(num_bytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def get_all(
    tier: DiskTier, names: list[RecordName], num_bytes: int, deadline: float | None = None
) -> list[bytes | TierError | None]:
    outs = [page_aligned(round_up(num_bytes, PAGE_BYTES)) for _ in names]
    outcomes = tier.get_many(names, [out.data for out in outs], deadline=deadline)
    return [
        out[:outcome].tobytes() if isinstance(outcome, int) else outcome
        for out, outcome in zip(outs, outcomes, strict=True)
    ]


class _Buffer(ctypes.Structure):
    """A struct iovec."""

    _fields_ = (("data", ctypes.c_void_p), ("num_bytes", ctypes.c_size_t))


_PREADV = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t,
    ctypes.c_int,
    ctypes.POINTER(_Buffer),
    ctypes.c_int,
    ctypes.c_int64,
    use_errno=True,
)


_REPLACED: list = []  # kept alive for threads that may outlive their tests
either_way = pytest.mark.parametrize("by_extension", [True, False])


def replace_preadv(
    monkeypatch, by_extension: bool, call: Callable[[Callable[[], int], int, int], int]
) -> None:
    """Replace system calls that read by `call(read, offset, num_bytes)`; `read()` is the real one.

    Args:
        monkeypatch: Undoes it.
        by_extension: Whether to replace the extension's calls too; otherwise it is not used.
        call: Returns the bytes read, or raises OSError.
    """
    read_files = os.preadv

    def preadv(fd, buffers, offset):
        num_bytes = sum(buffer.nbytes for buffer in buffers)
        return call(lambda: read_files(fd, buffers, offset), offset, num_bytes)

    monkeypatch.setattr(os, "preadv", preadv)
    if not by_extension:
        monkeypatch.setattr(straight_reads, "_kvkernels", None)
        return
    system_preadv = _PREADV(("preadv", ctypes.CDLL(None)))

    def extension_preadv(fd, buffers, count, offset):
        def read():
            num_read = system_preadv(fd, buffers, count, offset)
            if num_read < 0:
                raise OSError(ctypes.get_errno(), "preadv")
            return num_read

        num_bytes = sum(buffers[number].num_bytes for number in range(count))
        try:
            return call(read, offset, num_bytes)
        except OSError as error:
            ctypes.set_errno(error.errno)
            return -1

    replaced = _PREADV(extension_preadv)
    _REPLACED.append(replaced)
    address = ctypes.cast(replaced, ctypes.c_void_p).value
    monkeypatch.setattr(straight_reads, "_preadv_address", address)


def break_page(monkeypatch, page: int) -> None:
    """Make reads and writes of that page of a slab fail."""
    bad, write_files = page * PAGE_BYTES, os.pwritev

    def fail_at(offset: int, num_bytes: int) -> None:
        if offset <= bad < offset + num_bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read_or_fail(read, offset, num_bytes):
        fail_at(offset, num_bytes)
        return read()

    def pwritev(fd, buffers, offset):
        fail_at(offset, sum(buffer.nbytes for buffer in buffers))
        return write_files(fd, buffers, offset)

    replace_preadv(monkeypatch, True, read_or_fail)
    monkeypatch.setattr(os, "pwritev", pwritev)


def damage_order_of_use(index: Path) -> None:
    """Flip a bit that the quick check passes over: an entry has no row."""
    good, page = _page_of(index, "slots_in_use_order")
    for at in reversed(page):
        index.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        if _answers(index)[0] == ("ok",) != _answers(index)[1]:
            return
    raise AssertionError("expected a bit that only the full check misses")


def lose_hash(index: Path, block_hash: bytes) -> None:
    """Change a hash among the sorted ones, so that a look-up no longer finds it."""
    good, page = _page_of(index, "slots_by_hash")
    end = good.index(block_hash, page.start, page.stop) + len(block_hash)
    index.write_bytes(good[: end - 1] + bytes([good[end - 1] ^ 1]) + good[end:])
    quick, full = _answers(index)
    assert quick == ("ok",) != full


def _page_of(index: Path, tree: str) -> tuple[bytes, range]:
    """The file of a closed index, and where the root of a tree lies there."""
    with sqlite3.connect(index) as sql:
        sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page_bytes,) = sql.execute("PRAGMA page_size").fetchone()
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        (root,) = sql.execute(query, (tree,)).fetchone()
    sql.close()
    return index.read_bytes(), range((root - 1) * page_bytes, root * page_bytes)


def _answers(index: Path) -> list[tuple[str]]:
    """Of SQLite's quick check and of its full one."""
    with sqlite3.connect(index) as sql:
        answers = [
            sql.execute(f"PRAGMA {kind}_check").fetchone() for kind in ("quick", "integrity")
        ]
    sql.close()
    return answers
