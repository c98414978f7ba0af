"""A record: one block of one layer group outside the pool, verified whenever it comes back.

    +--------+-----------+-------------------+---------+--------------------------------+
    | header | token ids | layer table       | padding | payload, layer after layer     |
    | 96     | 4 x block | 24 x num_layers   | zeros   | as the codecs write them       |
    +--------+-----------+-------------------+---------+--------------------------------+
    |<------------- header_bytes, a multiple of 64 --->|<-- payload_bytes ------------->|
    |            under the header's CRC-32C            |  under the table's word sums   |

Where layers have codecs of their own, a list of them lies between table and padding. Every byte is
covered by a check, so any one flipped bit is found. docs/record-format.md gives the bytes field by
field. This guards against accidents, not against an attacker, who can write a record whose checks
are right: that takes a key, see protection.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvkernels import EncodedBlocks, KVPool, decode_blocks, encode_blocks
from prefixstore.block_key import (
    ROOT_HASH,
    BlockHash,
    BlockKey,
    chain_keys,
    hash_block,
)
from prefixstore.checksum import WORD_BYTES, Buffer, as_bytes, checksum_words
from prefixstore.errors import BlockCorrupted
from prefixstore.record_header import corrupted
from prefixstore.record_headers import RecordHeader, header_form, read_header
from prefixstore.record_layout import TABLE_ENTRY_BYTES, RecordLayout

__all__ = [
    "ROOT_HASH",
    "BlockHash",
    "BlockKey",
    "RecordHeader",
    "RecordLayout",
    "chain_keys",
    "check_head",
    "check_header",
    "check_headers",
    "decode",
    "encode",
    "hash_block",
    "read_header",
    "stack_sums",
    "verify",
    "write_headers",
]

_FIRST = torch.zeros(1, dtype=torch.int64)  # id of the only block of a pool of one


def stack_sums(headers: Sequence[RecordHeader]) -> torch.Tensor:
    """``[num_records, num_layers, 2]``, int64: the bits of each layer's sum and weighted sum."""
    tables = np.frombuffer(b"".join(header.table.tobytes() for header in headers), "<i8")
    words = tables.reshape(len(headers), -1, TABLE_ENTRY_BYTES // 8)
    return torch.from_numpy(words[..., 1:].copy())


def encode(key: BlockKey, block: Buffer, out: Buffer) -> int:
    """Write the record of a block.

    Args:
        key: What it is, and the codecs to write it with.
        block: As it lies in the pool, `key.layout.block_bytes`.
        out: `key.layout.encode_bytes` or more, from a multiple of 4 bytes on, written in place.

    Returns:
        Bytes of the record: `key.layout.record_bytes`, or `key.layout.raw.record_bytes` where the
        codecs do not hold the block.

    Raises:
        ValueError: If a buffer has another size or is not contiguous, or `out` is read-only, starts
            elsewhere or overlaps the block.
    """
    layout = key.layout
    source, record = as_bytes("block", block), as_bytes("out", out)
    _check_bytes("block", source, layout.block_bytes)
    if record.nbytes < layout.encode_bytes:
        raise ValueError(f"out: expected {layout.encode_bytes} bytes or more, got {record.nbytes}")
    _check_apart("out", record, source)
    if not _is_aligned(record):
        raise ValueError("out: expected memory from a multiple of 4 bytes on, got another address")
    header_bytes = layout.header_bytes
    payload = _as_tensor(record)[None, header_bytes:]
    encoded = encode_blocks(_as_pool(layout, source), _FIRST, layout.block_format, payloads=payload)
    written = layout
    if encoded.is_raw[0] and not layout.is_raw:
        written = layout.raw
        if written.header_bytes != header_bytes:  # a list of codecs less
            num_bytes = written.payload_bytes
            whole = np.frombuffer(record, np.uint8)
            start = written.header_bytes
            whole[start : start + num_bytes] = whole[header_bytes : header_bytes + num_bytes]
    write_headers([key], written, encoded.sums, [np.frombuffer(record, np.uint8)])
    return written.record_bytes


def write_headers(
    keys: Sequence[BlockKey],
    layout: RecordLayout,
    sums: torch.Tensor,
    records: Sequence[np.ndarray],
) -> None:
    """Write all before the payloads.

    Args:
        keys: What the blocks are.
        layout: How their payloads are written: for each `key.layout` or `key.layout.raw`.
        sums: ``[num_records, num_layers, 2]``, int64: the checksums of the payloads' layers.
        records: Uint8; of each the first `layout.header_bytes` are written.
    """
    if not keys:
        return
    rows = header_form(layout).write(keys, sums.numpy())
    for record, row in zip(records, rows, strict=True):
        record[: layout.header_bytes] = row


def decode(record: Buffer, key: BlockKey, block_out: Buffer) -> None:
    """Verify a record against its key and restore its block.

    Args:
        record: The bytes a tier gave.
        key: What they must be.
        block_out: `key.layout.block_bytes`, written in place; garbage if this raises.

    Raises:
        BlockCorrupted: If any byte of the record is not what `encode` wrote for this key.
        ValueError: If a buffer is not contiguous, or `block_out` has another size, is read-only
            or overlaps the record.
    """
    data, target = as_bytes("record", record), as_bytes("block_out", block_out)
    _check_bytes("block_out", target, key.layout.block_bytes)
    _check_apart("block_out", target, data)
    header = check_header(data, key)
    layout = header.key.layout
    if not _is_aligned(data):
        data = np.frombuffer(data, np.uint8).copy().data
    encoded = EncodedBlocks(
        layout.block_format,
        _as_tensor(data)[None, layout.header_bytes :],
        stack_sums([header]),
        torch.zeros(1, dtype=torch.bool),
    )
    is_good = decode_blocks(encoded, _as_pool(layout, target), _FIRST)[0]
    if not is_good.all():
        raise BlockCorrupted(
            "payload: expected the table's checksums, got others in layers"
            f" {(~is_good).nonzero()[:, 0].tolist()}"
        )


def check_header(record: Buffer, key: BlockKey) -> RecordHeader:
    """Verify that a whole record is that of a key, as far as its header tells.

    The payload is as long as it has to be; that its bytes are right is still to be seen.

    Raises:
        BlockCorrupted: If the record is another's or damaged, or its codecs lose something that
            those of the key do not.
        ValueError: If `record` is not contiguous.
    """
    data = as_bytes("record", record)
    header = check_head(data, key)
    if data.nbytes != header.key.layout.record_bytes:
        raise corrupted("record", f"{header.key.layout.record_bytes} bytes", data.nbytes)
    return header


def check_headers(
    records: Sequence[np.ndarray], keys: Sequence[BlockKey]
) -> list[RecordHeader | BlockCorrupted]:
    """`check_header` of many records, each contiguous; an error is in its place."""
    found: dict[int, RecordHeader | BlockCorrupted] = {}
    for layout in dict.fromkeys(key.layout for key in keys):
        alike = [
            number
            for number, (record, key) in enumerate(zip(records, keys, strict=True))
            if key.layout == layout and record.nbytes == layout.record_bytes
        ]
        if not alike:
            continue
        form = header_form(layout)
        rows = np.stack([records[number][: layout.header_bytes] for number in alike])
        is_right = form.are_right(rows, [keys[number] for number in alike])
        for number, is_own, table in zip(alike, is_right, form.tables(rows), strict=True):
            if is_own:
                found[number] = RecordHeader(keys[number], table)
    # What is left is damaged, another's, or written in another way that does as well.
    for number, (record, key) in enumerate(zip(records, keys, strict=True)):
        if number not in found:
            try:
                found[number] = check_header(record, key)
            except BlockCorrupted as error:
                found[number] = error
    return [found[number] for number in range(len(records))]


def check_head(record: Buffer, key: BlockKey) -> RecordHeader:
    """`check_header` of a record that may end anywhere after its header.

    Raises:
        BlockCorrupted: As `check_header`, but for the record's length.
        ValueError: If `record` is not contiguous.
    """
    header = read_header(record)
    found = header.key
    if found.layout != key.layout and not key.layout.accepts(found.layout):
        raise corrupted("layout", key.layout, found.layout)
    for name in ("identity", "parent_hash", "block_hash"):
        if getattr(found, name) != getattr(key, name):
            raise corrupted(name, getattr(key, name).hex(), getattr(found, name).hex())
    if found.tokens.tobytes() != key.tokens.tobytes():
        raise BlockCorrupted("tokens: expected those of the key, got others")
    return header


def verify(record: Buffer) -> RecordHeader:
    """Verify a whole record by itself, every byte of it, without knowing what it should be.

    Raises:
        BlockCorrupted: If its bytes are not as they were written, or its name is not that of its
            tokens.
        ValueError: If `record` is not contiguous.
    """
    data = as_bytes("record", record)
    header = read_header(data)
    key = header.key
    if data.nbytes != key.layout.record_bytes:
        raise corrupted("record", f"{key.layout.record_bytes} bytes", data.nbytes)
    name = hash_block(key.parent_hash, key.identity, key.layout.layer_group, key.tokens)
    if name != key.block_hash:
        raise corrupted("block_hash", name.hex(), key.block_hash.hex())
    wrong = [
        layer
        for layer, entry in enumerate(header.table)
        if checksum_words(data[entry["offset"] : entry["offset"] + entry["bytes"]])
        != (entry["sum"], entry["weighted"])
    ]
    if wrong:
        raise BlockCorrupted(
            f"payload: expected the table's checksums, got others in layers {wrong}"
        )
    return header


def _as_tensor(view: memoryview) -> torch.Tensor:
    """The bytes as a tensor, in place; a copy where they may not be written."""
    array = np.frombuffer(view, np.uint8)
    return torch.from_numpy(array.copy() if view.readonly else array)


def _is_aligned(view: memoryview) -> bool:
    """Whether codecs read and write payloads there, whose offsets are multiples of 4."""
    return np.frombuffer(view, np.uint8).ctypes.data % WORD_BYTES == 0


def _as_pool(layout: RecordLayout, block: memoryview) -> KVPool:
    """A pool of this one block."""
    shape = layout.block_format.layout
    data = _as_tensor(block).view(shape.dtype).view(1, *shape.block_shape)
    return KVPool.over(shape, data)


def _check_bytes(name: str, view: memoryview, expected: int) -> None:
    if view.nbytes != expected:
        raise ValueError(f"{name}: expected {expected} bytes, got {view.nbytes}")


def _check_apart(name: str, target: memoryview, source: memoryview) -> None:
    """Refuse a target that cannot be written, or that shares memory with the source."""
    if target.readonly:
        raise ValueError(f"{name}: expected a writable buffer, got a read-only one")
    if np.may_share_memory(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)):
        raise ValueError(f"{name}: expected no overlap with the source, got one")
