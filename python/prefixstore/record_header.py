"""The first 96 bytes of a record, which name it and say how long it is.

Apart from what codecs need, so that tiers can tell records without them.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from prefixstore.checksum import crc32c
from prefixstore.errors import BlockCorrupted

VERSION = 1
MAGIC = b"KVB1"
FIXED_BYTES = 96
MAX_HEADER_BYTES = 65472  # the largest multiple of 64 that a u16 holds
MAX_RECORD_BYTES = 1 << 31  # without a trailer
CRC_OFFSET = 80
FIXED = struct.Struct("<4sHHBBHHHHHHHQ16s16s16sIH10s")
assert FIXED.size == FIXED_BYTES

# Flags: how a record was protected with a key. It then has a trailer; see protection.py.
AUTHENTICATED = 1
SEALED = 2
PROTECTIONS = {AUTHENTICATED: "authenticated", SEALED: "sealed"}
TRAILER_BYTES = 88


class FixedHeader(NamedTuple):
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
    latent_dim: int  # 0 where keys and values lie apart
    reserved: bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of the whole record, its trailer included."""
        trailer_bytes = TRAILER_BYTES if self.flags in PROTECTIONS else 0
        return self.header_bytes + self.payload_bytes + trailer_bytes


def read_fixed(data: memoryview) -> FixedHeader:
    """The fixed header of what begins with a record, after the whole header's checksum is right.

    Raises:
        BlockCorrupted: If the bytes are no header of version 1, or not as they were written.
    """
    if data.nbytes < FIXED_BYTES:
        raise corrupted("record", f"at least {FIXED_BYTES} bytes", data.nbytes)
    fixed = FixedHeader._make(FIXED.unpack_from(data))
    if fixed.magic != MAGIC:
        raise corrupted("magic", MAGIC, fixed.magic)
    if fixed.version != VERSION:
        raise corrupted("version", f"{VERSION}, the one this reader knows", fixed.version)
    if not FIXED_BYTES <= fixed.header_bytes <= min(data.nbytes, MAX_HEADER_BYTES):
        raise corrupted("header_bytes", f"{FIXED_BYTES} to {data.nbytes}", fixed.header_bytes)
    crc = header_crc(data[: fixed.header_bytes])
    if crc != fixed.crc:
        raise corrupted("header checksum", f"{fixed.crc:#010x}", f"{crc:#010x}")
    return fixed


def header_crc(header: memoryview) -> int:
    """CRC-32C of all before the payload, its own field taken as zero."""
    crc = crc32c(bytes(4), crc32c(header[:CRC_OFFSET]))
    return crc32c(header[CRC_OFFSET + 4 :], crc)


def corrupted(what: str, expected: object, found: object) -> BlockCorrupted:
    """The error of a field that is not as it should be."""
    return BlockCorrupted(f"{what}: expected {expected}, got {found}")
