"""What a block is called and shaped like: layout, identity, hashes and tokens.

Each block's hash covers its parent's, so equal hashes mean equal tokens from the first on, as far
as 128 bits of BLAKE2b can say; a record's tokens are compared besides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

import numpy as np

BlockHash = NewType("BlockHash", bytes)
"""16 bytes: names a block by its tokens and everything before them."""

DIGEST_BYTES = 16
ROOT_HASH = BlockHash(bytes(DIGEST_BYTES))
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FIXED_BYTES = 96
TABLE_ENTRY_BYTES = 24
ALIGNMENT = 64
MAX_HEADER_BYTES = 65472  # the largest multiple of 64 that a u16 holds
MAX_RECORD_BYTES = 1 << 31

_HASH_PERSON = b"kvkernels block1"  # 1 is the record version: two versions never share a name


@dataclass(frozen=True)
class RecordLayout:
    """Shape of the block in a record.

    Attributes:
        num_layers: Layers in the group.
        num_kv_heads: Key-value heads of a layer.
        head_dim: Width of one head, in elements.
        block_size: Tokens in the block, a multiple of 16: so each layer fills whole 64-byte lines.
        dtype: "float32", "float16" or "bfloat16".
        layer_group: Which of the model's layer groups, from 0.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    layer_group: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_layers", 1),
            ("num_kv_heads", 1),
            ("head_dim", 1),
            ("block_size", 16),
            ("layer_group", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= 0xFFFF:
                raise ValueError(f"{name}: expected an integer {least} to 65535, got {value!r}")
        if self.block_size % 16:
            raise ValueError(f"block_size: expected a multiple of 16, got {self.block_size}")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype: expected one of {list(ITEM_BYTES)}, got {self.dtype!r}")
        if self.header_bytes > MAX_HEADER_BYTES:
            raise ValueError(
                f"num_layers, block_size: expected at most {MAX_HEADER_BYTES} header bytes,"
                f" got {self.header_bytes}"
            )
        if self.record_bytes > MAX_RECORD_BYTES:
            raise ValueError(
                f"layout: expected records of at most {MAX_RECORD_BYTES} bytes,"
                f" got {self.record_bytes}"
            )

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's keys and values."""
        item_bytes = ITEM_BYTES[self.dtype]
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * item_bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of all layers."""
        return self.num_layers * self.layer_bytes

    @property
    def header_bytes(self) -> int:
        """Bytes before the payload: header, token ids, layer table and padding."""
        used = FIXED_BYTES + 4 * self.block_size + TABLE_ENTRY_BYTES * self.num_layers
        return -(-used // ALIGNMENT) * ALIGNMENT

    @property
    def record_bytes(self) -> int:
        """Bytes of the whole record."""
        return self.header_bytes + self.payload_bytes


@dataclass(frozen=True, eq=False)
class BlockKey:
    """All that a record must agree with before its payload is used.

    Attributes:
        layout: Shape and dtype.
        identity: 16 bytes: digest of everything that must be equal for KV to be valid, and salt.
        parent_hash: Hash of the block before, `ROOT_HASH` for the first.
        block_hash: The block's own hash, see `hash_block`.
        tokens: ``[block_size]``, uint32.
    """

    layout: RecordLayout
    identity: bytes
    parent_hash: BlockHash
    block_hash: BlockHash
    tokens: np.ndarray

    def __post_init__(self) -> None:
        for name in ("identity", "parent_hash", "block_hash"):
            value = getattr(self, name)
            if not isinstance(value, bytes) or len(value) != DIGEST_BYTES:
                raise ValueError(f"{name}: expected {DIGEST_BYTES} bytes, got {value!r}")
        tokens, shape = self.tokens, (self.layout.block_size,)
        if tokens.dtype != np.uint32 or tokens.shape != shape:
            raise ValueError(
                f"tokens: expected uint32 {list(shape)}, got {tokens.dtype} {list(tokens.shape)}"
            )


def hash_block(
    parent_hash: BlockHash, identity: bytes, layer_group: int, tokens: np.ndarray
) -> BlockHash:
    """BLAKE2b-128, personalised `kvkernels block1`, of parent_hash (16 bytes), identity (16),
    layer_group (u32) and the token ids (u32 each), all little endian, nothing between them.
    """
    digest = hashlib.blake2b(parent_hash, digest_size=DIGEST_BYTES, person=_HASH_PERSON)
    digest.update(identity)
    digest.update(layer_group.to_bytes(4, "little"))
    digest.update(tokens.astype("<u4", copy=False).tobytes())
    return BlockHash(digest.digest())


def chain_keys(
    layout: RecordLayout,
    identity: bytes,
    tokens: Sequence[int] | np.ndarray,
    first_parent: BlockHash = ROOT_HASH,
) -> list[BlockKey]:
    """The keys of all whole blocks of `tokens`, each chained to the one before.

    Args:
        layout: Shape of the records; its `layer_group` goes into the hashes, so that the blocks
            of two groups never meet.
        identity: 16 bytes; the salt is part of it.
        tokens: Token ids ``[num_tokens]``, 0 to 2**32 - 1; copied.
        first_parent: Hash of the block before the first token.

    Raises:
        ValueError: If tokens are not a flat run of such integers, or a digest is not 16 bytes.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"tokens: expected flat integers, got {ids.dtype} {list(ids.shape)}")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > 0xFFFFFFFF):
        raise ValueError(f"tokens: expected 0 to 2**32 - 1, got {ids.min()} to {ids.max()}")
    ids = ids.astype(np.uint32)  # a copy: keys must not change with the caller's array
    ids.flags.writeable = False
    keys, parent = [], first_parent
    for start in range(0, ids.size - layout.block_size + 1, layout.block_size):
        block = ids[start : start + layout.block_size]
        block_hash = hash_block(parent, identity, layout.layer_group, block)
        keys.append(BlockKey(layout, identity, parent, block_hash, block))
        parent = block_hash
    return keys
