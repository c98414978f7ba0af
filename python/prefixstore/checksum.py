"""Checksums of records: native where the extension is, numpy and plain Python where it is not.

CRC-32C guards a header. A payload is guarded by two sums over its little-endian u32 words w_i:
``sum = w_0 + w_1 + ...`` and ``weighted = 1 * w_0 + 2 * w_1 + ...``, both modulo 2**64. They are
order-free, so any parallel schedule gives the same pair. Every change inside one word and every
two-bit error is caught with certainty, and so is any swap of two different words. They are no
defence against an attacker.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

try:
    import _kvkernels
except ModuleNotFoundError:  # only when the extension is absent: a broken build raises
    _kvkernels = None

Buffer: TypeAlias = "bytes | bytearray | memoryview | np.ndarray"
"""Contiguous bytes; a tensor comes as ``tensor.numpy()``."""

WORD_BYTES = 4
_CASTAGNOLI = 0x82F63B78  # reflected polynomial of CRC-32C
_STRIDE_WORDS = 1 << 16  # the fallback works on pieces that fit a processor's cache


def as_bytes(name: str, buffer: Buffer) -> memoryview:
    """The bytes of `buffer` as a flat memoryview, without a copy.

    Raises:
        ValueError: If `buffer` is not contiguous; the message begins with `name`.
    """
    view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError(f"{name}: expected a contiguous buffer, got strides {view.strides}")
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def crc32c(data: Buffer, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of `data`; `crc` continues an earlier call, like `zlib.crc32`."""
    if _kvkernels is not None:
        return _kvkernels.crc32c(data, crc)
    return _slow_crc32c(data, crc)


def crc32c_rows(rows: np.ndarray) -> np.ndarray:
    """``[num_rows]``, uint32: the CRC-32C of each row of ``[num_rows, num_bytes]``, uint8.

    Raises:
        ValueError: If `rows` is not such an array, or not contiguous.
    """
    if _kvkernels is not None:
        return _kvkernels.crc32c_rows(rows)
    if rows.ndim != 2 or rows.dtype != np.uint8 or not rows.flags.c_contiguous:
        raise ValueError(
            f"rows: expected contiguous rows of uint8, got {rows.dtype} {list(rows.shape)}"
        )
    return np.array([_slow_crc32c(row) for row in rows], np.uint32)


def checksum_words(data: Buffer) -> tuple[int, int]:
    """The pair (sum, weighted) of `data`.

    Raises:
        ValueError: If `data` is not contiguous or not a whole number of 4-byte words.
    """
    if _kvkernels is not None:
        return _kvkernels.checksum_words(data)
    return _slow_checksum_words(data)


def _make_crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_CASTAGNOLI if value & 1 else 0)
        table.append(value)
    return table


_CRC_TABLE = _make_crc_table()


def _slow_crc32c(data: Buffer, crc: int = 0) -> int:
    crc ^= 0xFFFFFFFF
    for byte in as_bytes("data", data).tobytes():
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _slow_checksum_words(data: Buffer) -> tuple[int, int]:
    view = as_bytes("data", data)
    if view.nbytes % WORD_BYTES:
        raise ValueError(f"data: expected a multiple of {WORD_BYTES} bytes, got {view.nbytes}")
    words = np.frombuffer(view, "<u4")
    total = weighted = 0
    places = np.arange(1, _STRIDE_WORDS + 1, dtype=np.uint64)
    for start in range(0, words.size, _STRIDE_WORDS):
        piece = words[start : start + _STRIDE_WORDS].astype(np.uint64)
        piece_sum = int(piece.sum(dtype=np.uint64))
        total += piece_sum
        weighted += start * piece_sum + int((piece * places[: piece.size]).sum(dtype=np.uint64))
    return total % 2**64, weighted % 2**64
