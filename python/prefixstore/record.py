"""A record: one block of one layer group outside the pool, verified whenever it comes back.

    +--------+-----------+-------------------+---------+--------------------------------+
    | header | token ids | layer table       | padding | payload, layer after layer     |
    | 96     | 4 x block | 24 x num_layers   | zeros   | num_layers x layer_bytes       |
    +--------+-----------+-------------------+---------+--------------------------------+
    |<------------- header_bytes, a multiple of 64 --->|<-- payload_bytes ------------->|
    |            under the header's CRC-32C            |  under the table's word sums   |

Every byte is covered by a check, so any one flipped bit is found. docs/record-format.md gives the
bytes field by field. This guards against accidents, not against an attacker, who can write a
record whose checks are right.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from prefixstore.block_key import (
    FIXED_BYTES,
    MAX_HEADER_BYTES,
    ROOT_HASH,
    TABLE_ENTRY_BYTES,
    BlockHash,
    BlockKey,
    RecordLayout,
    chain_keys,
    hash_block,
)
from prefixstore.checksum import Buffer, as_bytes, copy_parts_with_checksums, crc32c
from prefixstore.errors import BlockCorrupted

__all__ = [
    "ROOT_HASH",
    "BlockHash",
    "BlockKey",
    "RecordHeader",
    "RecordLayout",
    "chain_keys",
    "decode",
    "encode",
    "hash_block",
    "read_header",
]

VERSION = 1
CODEC_RAW = 1
DTYPE_CODES = {"float32": 1, "float16": 2, "bfloat16": 3}
_DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}

_MAGIC = b"KVB1"
_FIXED = struct.Struct("<4sHHBBHHHHHHHQ16s16s16sI12s")
_CRC_OFFSET = 80
_TABLE_ENTRY = np.dtype([("offset", "<u4"), ("bytes", "<u4"), ("sum", "<u8"), ("weighted", "<u8")])
assert _FIXED.size == FIXED_BYTES and _TABLE_ENTRY.itemsize == TABLE_ENTRY_BYTES


class _Fixed(NamedTuple):
    """The first 96 bytes, in their order."""

    magic: bytes
    version: int
    header_bytes: int
    codec: int
    dtype: int
    flags: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_tokens: int
    layer_group: int
    payload_bytes: int
    identity: bytes
    block_hash: bytes
    parent_hash: bytes
    crc: int
    reserved: bytes


@dataclass(frozen=True, eq=False)
class RecordHeader:
    """What a record says of itself; `key` is to be compared, not trusted.

    Attributes:
        key: Layout, identity, hashes and tokens.
        table: ``[num_layers]`` with fields offset and bytes (in the record), sum, weighted.
    """

    key: BlockKey
    table: np.ndarray


def encode(key: BlockKey, payload: Buffer, out: Buffer) -> None:
    """Write the record of a block.

    Args:
        key: What it is.
        payload: The block as it lies in the pool, `key.layout.payload_bytes`.
        out: `key.layout.record_bytes`, written in place, every byte.

    Raises:
        ValueError: If a buffer has another size or is not contiguous, or `out` is read-only or
            overlaps the payload.
    """
    layout = key.layout
    source, record = as_bytes("payload", payload), as_bytes("out", out)
    _check_bytes("payload", source, layout.payload_bytes)
    _check_bytes("out", record, layout.record_bytes)
    _check_writable("out", record)
    header_bytes, tokens_end = layout.header_bytes, FIXED_BYTES + 4 * layout.block_size
    sums = np.empty((layout.num_layers, 2), np.uint64)
    copy_parts_with_checksums(source, record[header_bytes:], layout.num_layers, sums)
    table = np.empty((layout.num_layers, 3), "<u8")
    table[:, 0], table[:, 1:] = _layer_places(layout), sums
    _FIXED.pack_into(record, 0, *_fixed_fields(key))
    record[FIXED_BYTES:tokens_end] = key.tokens.astype("<u4", copy=False).tobytes()
    record[tokens_end:header_bytes] = table.tobytes().ljust(header_bytes - tokens_end, b"\0")
    struct.pack_into("<I", record, _CRC_OFFSET, crc32c(record[:header_bytes]))


def decode(record: Buffer, key: BlockKey, payload_out: Buffer) -> None:
    """Verify a record against its key and copy its payload out.

    Args:
        record: The bytes a tier gave.
        key: What they must be.
        payload_out: `key.layout.payload_bytes`, written in place; garbage if this raises.

    Raises:
        BlockCorrupted: If any byte of the record is not what `encode` wrote for this key.
        ValueError: If a buffer is not contiguous, or `payload_out` has another size, is read-only
            or overlaps the record.
    """
    layout = key.layout
    data, target = as_bytes("record", record), as_bytes("payload_out", payload_out)
    _check_bytes("payload_out", target, layout.payload_bytes)
    _check_writable("payload_out", target)
    header = read_header(data)
    found = header.key
    for name in ("layout", "identity", "parent_hash", "block_hash"):
        if getattr(found, name) != getattr(key, name):
            raise _corrupted(name, getattr(key, name), getattr(found, name))
    if found.tokens.tobytes() != key.tokens.tobytes():
        raise BlockCorrupted("tokens: expected those of the key, got others")
    if data.nbytes != layout.record_bytes:
        raise _corrupted("record", f"{layout.record_bytes} bytes", data.nbytes)
    sums = np.empty((layout.num_layers, 2), np.uint64)
    copy_parts_with_checksums(data[layout.header_bytes :], target, layout.num_layers, sums)
    if sums.tobytes() != header.table.view("<u8").reshape(-1, 3)[:, 1:].tobytes():
        wrong = (header.table["sum"] != sums[:, 0]) | (header.table["weighted"] != sums[:, 1])
        layers = np.flatnonzero(wrong).tolist()
        raise BlockCorrupted(f"payload: expected the table's checksums, got others in {layers}")


def read_header(record: Buffer) -> RecordHeader:
    """Read and verify all before the payload; `record` may end anywhere after that.

    Raises:
        BlockCorrupted: If the bytes are no header of version 1, or not as they were written.
    """
    data = as_bytes("record", record)
    fixed = _read_fixed(data)
    dtype = _DTYPE_NAMES.get(fixed.dtype)
    if dtype is None:
        raise _corrupted("dtype", f"one of {list(_DTYPE_NAMES)}", fixed.dtype)
    try:
        layout = _find_layout(
            fixed.num_layers,
            fixed.num_kv_heads,
            fixed.head_dim,
            fixed.block_size,
            dtype,
            fixed.layer_group,
        )
    except ValueError as error:
        raise BlockCorrupted(str(error)) from None
    for name, expected in (
        ("codec", CODEC_RAW),
        ("flags", 0),
        ("reserved", bytes(12)),
        ("num_tokens", layout.block_size),
        ("header_bytes", layout.header_bytes),
        ("payload_bytes", layout.payload_bytes),
    ):
        if getattr(fixed, name) != expected:
            raise _corrupted(name, expected, getattr(fixed, name))
    tokens = np.frombuffer(data, "<u4", layout.block_size, FIXED_BYTES)
    key = BlockKey(
        layout,
        fixed.identity,
        BlockHash(fixed.parent_hash),
        BlockHash(fixed.block_hash),
        tokens.astype(np.uint32, copy=False),
    )
    return RecordHeader(key, _read_table(data, layout))


def _read_fixed(data: memoryview) -> _Fixed:
    """The first 96 bytes, after the header's checksum has been found right."""
    if data.nbytes < FIXED_BYTES:
        raise _corrupted("record", f"at least {FIXED_BYTES} bytes", data.nbytes)
    fixed = _Fixed._make(_FIXED.unpack_from(data))
    if fixed.magic != _MAGIC:
        raise _corrupted("magic", _MAGIC, fixed.magic)
    if fixed.version != VERSION:
        raise _corrupted("version", f"{VERSION}, the one this reader knows", fixed.version)
    if not FIXED_BYTES <= fixed.header_bytes <= min(data.nbytes, MAX_HEADER_BYTES):
        raise _corrupted("header_bytes", f"{FIXED_BYTES} to {data.nbytes}", fixed.header_bytes)
    crc = crc32c(bytes(4), crc32c(data[:_CRC_OFFSET]))
    crc = crc32c(data[_CRC_OFFSET + 4 : fixed.header_bytes], crc)
    if crc != fixed.crc:
        raise _corrupted("header checksum", f"{fixed.crc:#010x}", f"{crc:#010x}")
    return fixed


def _read_table(data: memoryview, layout: RecordLayout) -> np.ndarray:
    start = FIXED_BYTES + 4 * layout.block_size
    table = np.frombuffer(data, _TABLE_ENTRY, layout.num_layers, start)
    end = start + table.nbytes
    places = table.view("<u8").reshape(-1, 3)[:, 0]
    if places.tobytes() != _layer_places(layout).tobytes():
        raise BlockCorrupted(
            f"layer table: expected adjoining layers of {layout.layer_bytes} bytes, got others"
        )
    if any(data[end : layout.header_bytes]):
        raise BlockCorrupted("padding: expected zeros, got other bytes")
    return table


def _fixed_fields(key: BlockKey) -> _Fixed:
    layout = key.layout
    return _Fixed(
        magic=_MAGIC,
        version=VERSION,
        header_bytes=layout.header_bytes,
        codec=CODEC_RAW,
        dtype=DTYPE_CODES[layout.dtype],
        flags=0,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        num_tokens=layout.block_size,
        layer_group=layout.layer_group,
        payload_bytes=layout.payload_bytes,
        identity=key.identity,
        block_hash=key.block_hash,
        parent_hash=key.parent_hash,
        crc=0,
        reserved=bytes(12),
    )


_find_layout = lru_cache(maxsize=64)(RecordLayout)  # its checks took a fifth of read_header


@lru_cache(maxsize=64)
def _layer_places(layout: RecordLayout) -> np.ndarray:
    """The first 8 bytes of every table entry, offset and bytes, as one u64 each."""
    offsets = layout.header_bytes + np.arange(layout.num_layers) * layout.layer_bytes
    return (offsets | layout.layer_bytes << 32).astype("<u8")


def _check_bytes(name: str, view: memoryview, expected: int) -> None:
    if view.nbytes != expected:
        raise ValueError(f"{name}: expected {expected} bytes, got {view.nbytes}")


def _check_writable(name: str, view: memoryview) -> None:
    if view.readonly:
        raise ValueError(f"{name}: expected a writable buffer, got a read-only one")


def _corrupted(what: str, expected: object, found: object) -> BlockCorrupted:
    return BlockCorrupted(f"{what}: expected {expected}, got {found}")
