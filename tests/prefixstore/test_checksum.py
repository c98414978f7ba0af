"""Checksums: native and fallback code follow the definitions, and refuse invalid input."""

import threading
import time

import numpy as np
import pytest

from prefixstore import checksum

SIZES = (0, 4, 60, 64, 252, 256, 260, 4096, 16380, 16384, 300004)


@pytest.fixture(params=["native", "fallback"])
def checksums(request, monkeypatch):
    if request.param == "fallback":
        monkeypatch.setattr(checksum, "_kvkernels", None)
    elif checksum._kvkernels is None:
        pytest.skip("the extension is not built")
    return checksum


def random_bytes(num_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def exact_sums(data: np.ndarray) -> tuple[int, int]:
    words = data.view("<u4").tolist()
    weighted = sum((i + 1) * word for i, word in enumerate(words))
    return sum(words) % 2**64, weighted % 2**64


def test_crc32c_has_the_published_check_values(checksums):
    assert checksums.crc32c(b"") == 0
    assert checksums.crc32c(b"123456789") == 0xE3069283
    assert checksums.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert checksums.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert checksums.crc32c(bytes(range(32))) == 0x46DD794E


def test_crc32c_continues_where_it_stopped(checksums):
    data = random_bytes(1000)
    for cut in (0, 1, 7, 8, 500, 1000):
        assert checksums.crc32c(data[cut:], checksums.crc32c(data[:cut])) == checksums.crc32c(data)


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (5, 0), (7, 130)], ids=str)
def test_the_checksums_of_rows_are_those_of_each_row(checksums, shape):
    rows = random_bytes(shape[0] * shape[1]).reshape(shape)
    sums = checksums.crc32c_rows(rows)
    assert sums.dtype == np.uint32
    assert sums.tolist() == [checksums.crc32c(row) for row in rows]


def test_rows_of_other_kinds_are_refused(checksums):
    rows = np.zeros((4, 8), np.uint8)
    for wrong, told in (
        (rows[0], r"uint8 \[8\]"),
        (rows.view("<u4"), r"uint32 \[4, 2\]"),
        (rows[:, ::2], r"uint8 \[4, 4\]"),
        (rows.T, r"uint8 \[8, 4\]"),
    ):
        with pytest.raises(
            ValueError, match="rows: expected contiguous rows of uint8, got " + told
        ):
            checksums.crc32c_rows(wrong)


@pytest.mark.parametrize("num_bytes", SIZES)
def test_sums_are_the_definition(checksums, num_bytes):
    data = random_bytes(num_bytes)
    assert checksums.checksum_words(data) == exact_sums(data)


def test_sums_wrap_modulo_two_to_the_64(checksums):
    data = np.full(1 << 20, 0xFF, np.uint8)
    expected = exact_sums(data)
    assert checksums.checksum_words(data) == expected
    words = data.size // 4
    assert (2**32 - 1) * words * (words + 1) // 2 > 2**64  # so the case does wrap


def test_every_flipped_bit_and_swapped_word_changes_the_pair(checksums):
    data = random_bytes(256)
    right = checksums.checksum_words(data)
    for bit in range(data.size * 8):
        flipped = data.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        assert checksums.checksum_words(flipped) != right
    swapped = data.view("<u4").copy()
    swapped[[3, 40]] = swapped[[40, 3]]
    assert checksums.checksum_words(swapped) != right


def test_takes_any_contiguous_buffer(checksums):
    data = random_bytes(64)
    buffers = (data.tobytes(), bytearray(data), memoryview(data)[:], data.view(np.float32))
    assert {checksums.checksum_words(buffer) for buffer in buffers} == {exact_sums(data)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(6), "data: expected a .*multiple of 4"),
        (np.zeros(16, np.uint8)[::2], "data: expected a contiguous"),
    ],
    ids=["half a word", "strided"],
)
def test_refuses_what_is_no_row_of_words(checksums, data, message):
    with pytest.raises(ValueError, match=message):
        checksums.checksum_words(data)


def test_lets_other_threads_run_meanwhile(checksums):
    if checksum._kvkernels is None:
        pytest.skip("the fallback holds the lock")
    data = np.zeros(256 << 20, np.uint8)  # 20 ms or more, in which a held GIL shows
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    spans = []
    for _ in range(10):  # on a busy machine the other thread may not run during one of them
        started = time.perf_counter()
        checksums.checksum_words(data)
        spans.append((started, time.perf_counter()))
    stop.set()
    thread.join()
    counts = [sum(begin < moment < end for moment in ticks) for begin, end in spans]
    assert max(counts) >= 3  # with the GIL held there might be one before and one after
