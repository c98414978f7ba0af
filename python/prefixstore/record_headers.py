"""All before a record's payload: written and compared for many records at a time, or read.

`HeaderForm` handles all records of one layout at once: record by record, Python takes longer for
the header than a copy does for a payload of 64 KiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kvkernels import CODECS
from prefixstore.block_key import BlockHash, BlockKey
from prefixstore.checksum import Buffer, as_bytes, crc32c_rows
from prefixstore.errors import BlockCorrupted
from prefixstore.record_header import (
    CRC_OFFSET,
    FIXED,
    FIXED_BYTES,
    MAGIC,
    PROTECTIONS,
    VERSION,
    FixedHeader,
    corrupted,
    read_fixed,
)
from prefixstore.record_layout import TABLE_ENTRY_BYTES, RecordLayout

CODEC_LIST = 255  # a codec for each layer, in a list of their own
DTYPE_CODES = {"float32": 1, "float16": 2, "bfloat16": 3}
TABLE_ENTRY = np.dtype([("offset", "<u4"), ("bytes", "<u4"), ("sum", "<u8"), ("weighted", "<u8")])
assert TABLE_ENTRY.itemsize == TABLE_ENTRY_BYTES

_DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}
_CODEC_NAMES = {codec.code: name for name, codec in CODECS.items()}
_CRC = slice(CRC_OFFSET, CRC_OFFSET + 4)
_NAMES = slice(CRC_OFFSET - 48, CRC_OFFSET)  # identity, block_hash, parent_hash


@dataclass(frozen=True, eq=False)
class RecordHeader:
    """What a record says of itself; `key` is to be compared, not trusted.

    Attributes:
        key: Layout, identity, hashes and tokens.
        table: ``[num_layers]`` with fields offset and bytes (in the record), sum, weighted.
    """

    key: BlockKey
    table: np.ndarray


class HeaderForm:
    """What the headers of all records of a layout have in common.

    Args:
        layout: Of the records, as they are written.
    """

    def __init__(self, layout: RecordLayout) -> None:
        self._num_layers = layout.num_layers
        self._tokens = slice(FIXED_BYTES, FIXED_BYTES + 4 * layout.block_size)
        self._table = slice(self._tokens.stop, layout.table_end)
        self._common = common = np.zeros(layout.header_bytes, np.uint8)
        common[:FIXED_BYTES] = np.frombuffer(FIXED.pack(*_common_fields(layout)), np.uint8)
        words = common[self._table].view("<u4").reshape(self._num_layers, -1)
        words[:, :2] = layout.layer_places
        codes = codec_list(layout)
        common[layout.table_end : layout.table_end + len(codes)] = np.frombuffer(codes, np.uint8)

    def write(self, keys: Sequence[BlockKey], sums: np.ndarray) -> np.ndarray:
        """Headers, ``[num_records, header_bytes]``, uint8.

        Args:
            keys: What the blocks are; of their layouts nothing is looked at.
            sums: ``[num_records, num_layers, 2]``, of 8 bytes each: the payloads' checksums.
        """
        rows = np.repeat(self._common[None], len(keys), 0)
        names = [part for k in keys for part in (k.identity, k.block_hash, k.parent_hash)]
        rows[:, _NAMES] = np.frombuffer(b"".join(names), np.uint8).reshape(len(keys), -1)
        tokens = np.concatenate([key.tokens for key in keys]).astype("<u4", copy=False)
        rows[:, self._tokens] = tokens.view(np.uint8).reshape(len(keys), -1)
        self._words(rows)[:, :, 1:] = sums.view("<u8")
        rows[:, _CRC] = crc32c_rows(rows).astype("<u4", copy=False)[:, None].view(np.uint8)
        return rows

    def tables(self, rows: np.ndarray) -> np.ndarray:
        """``[num_records, num_layers]``: the tables in headers, see `RecordHeader.table`."""
        return rows[:, self._table].view(TABLE_ENTRY)

    def are_right(self, rows: np.ndarray, keys: Sequence[BlockKey]) -> np.ndarray:
        """``[num_records]``, bool: which headers are those of their keys, whatever the sums."""
        expected = self.write(keys, self._words(rows)[:, :, 1:])
        return (rows == expected).all(1)

    def _words(self, rows: np.ndarray) -> np.ndarray:
        """``[num_records, num_layers, 3]``, u64: place, sum and weighted sum of each layer."""
        return rows[:, self._table].view("<u8").reshape(len(rows), self._num_layers, 3)


header_form = lru_cache(maxsize=64)(HeaderForm)
_find_layout = lru_cache(maxsize=64)(RecordLayout)  # its checks took a fifth of read_header


def codec_code(layout: RecordLayout) -> int:
    """What the header says of the codecs."""
    return CODECS[layout.codecs[0]].code if len(layout.codecs) == 1 else CODEC_LIST


def codec_list(layout: RecordLayout) -> bytes:
    """The codes of the layers' codecs, where one does not serve all."""
    codes = [CODECS[name].code for name in layout.codecs]
    return bytes(codes) if len(codes) > 1 else b""


def _common_fields(layout: RecordLayout) -> FixedHeader:
    return FixedHeader(
        magic=MAGIC,
        version=VERSION,
        header_bytes=layout.header_bytes,
        codec=codec_code(layout),
        dtype=DTYPE_CODES[layout.dtype],
        flags=0,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        num_tokens=layout.block_size,
        layer_group=layout.layer_group,
        payload_bytes=layout.payload_bytes,
        identity=b"",
        block_hash=b"",
        parent_hash=b"",
        crc=0,
        latent_dim=layout.latent_dim or 0,
        reserved=b"",
    )


def read_header(record: Buffer) -> RecordHeader:
    """Read and verify all before the payload; `record` may end anywhere after that.

    Raises:
        BlockCorrupted: If the bytes are no header of version 1, or not as they were written.
        ValueError: If `record` is not contiguous.
    """
    data = as_bytes("record", record)
    fixed = read_fixed(data)
    if fixed.flags in PROTECTIONS:
        what = PROTECTIONS[fixed.flags]
        raise BlockCorrupted(f"flags: expected a plain record, got one {what} with a key")
    dtype = _DTYPE_NAMES.get(fixed.dtype)
    if dtype is None:
        raise corrupted("dtype", f"one of {list(_DTYPE_NAMES)}", fixed.dtype)
    try:
        layout = _find_layout(
            fixed.num_layers,
            fixed.num_kv_heads,
            fixed.head_dim,
            fixed.block_size,
            dtype,
            fixed.layer_group,
            _read_codecs(data, fixed),
            fixed.latent_dim or None,
        )
    except ValueError as error:
        raise BlockCorrupted(str(error)) from None
    for name, expected in (
        ("codec", codec_code(layout)),
        ("flags", 0),
        ("reserved", bytes(10)),
        ("num_tokens", layout.block_size),
        ("header_bytes", layout.header_bytes),
        ("payload_bytes", layout.payload_bytes),
    ):
        if getattr(fixed, name) != expected:
            raise corrupted(name, expected, getattr(fixed, name))
    tokens = np.frombuffer(data, "<u4", layout.block_size, FIXED_BYTES)
    key = BlockKey(
        layout,
        fixed.identity,
        BlockHash(fixed.parent_hash),
        BlockHash(fixed.block_hash),
        tokens.astype(np.uint32, copy=False),
    )
    return RecordHeader(key, _read_table(data, layout))


def _read_codecs(data: memoryview, fixed: FixedHeader) -> tuple[str, ...]:
    """The names of the layers' codecs, one where it serves all of them."""
    codes = [fixed.codec]
    if fixed.codec == CODEC_LIST:
        start = FIXED_BYTES + 4 * fixed.block_size + TABLE_ENTRY_BYTES * fixed.num_layers
        codes = list(data[start : min(start + fixed.num_layers, fixed.header_bytes)])
    unknown = [code for code in codes if code not in _CODEC_NAMES]
    if unknown:
        raise corrupted("codec", f"one of {[*_CODEC_NAMES, CODEC_LIST]}", unknown[0])
    return tuple(_CODEC_NAMES[code] for code in codes)


def _read_table(data: memoryview, layout: RecordLayout) -> np.ndarray:
    table = np.frombuffer(data, TABLE_ENTRY, layout.num_layers, FIXED_BYTES + 4 * layout.block_size)
    places = table.view("<u4").reshape(-1, TABLE_ENTRY_BYTES // 4)[:, :2]
    if places.tobytes() != layout.layer_places.tobytes():
        raise BlockCorrupted(
            f"layer table: expected adjoining layers of {layout.payload_bytes} bytes in all,"
            " got others"
        )
    padding = data[layout.table_end + len(codec_list(layout)) : layout.header_bytes]
    if any(padding):
        raise BlockCorrupted("padding: expected zeros, got other bytes")
    return table
