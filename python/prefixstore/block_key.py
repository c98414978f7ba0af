"""What a block is called: identity, hashes and tokens, and the layout of its record.

Each block's hash covers its parent's, so equal hashes mean equal tokens from the first on, as far
as 128 bits of BLAKE2b can say; a record's tokens are compared besides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, NewType

import numpy as np

if TYPE_CHECKING:
    from prefixstore.record_layout import RecordLayout

BlockHash = NewType("BlockHash", bytes)
"""16 bytes: names a block by its tokens and everything before them."""

DIGEST_BYTES = 16
ROOT_HASH = BlockHash(bytes(DIGEST_BYTES))

_HASH_PERSON = b"kvkernels block1"  # 1 is the record version: two versions never share a name


class RecordName(NamedTuple):
    """What a tier calls a record.

    Attributes:
        identity: 16 bytes: of the model, the salt and what else must be equal. It groups records;
            those of two identities never share a hash.
        block_hash: 16 bytes: which block.
    """

    identity: bytes
    block_hash: BlockHash


@dataclass(frozen=True, eq=False)
class BlockKey:
    """All that a record must agree with before its payload is used.

    Attributes:
        layout: Shape, dtype and codecs; what else does for it, `RecordLayout.accepts` says.
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

    @cached_property
    def name(self) -> RecordName:
        """What tiers call its record."""
        return RecordName(self.identity, self.block_hash)


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
    layout: RecordLayout | Sequence[RecordLayout],
    identity: bytes,
    tokens: Sequence[int] | np.ndarray,
    first_parent: BlockHash = ROOT_HASH,
) -> list[BlockKey]:
    """The keys of all whole blocks of `tokens`, each chained to the one before.

    Args:
        layout: Of the records, or of the first, the second, ... record; the last one is also that
            of all further ones. They differ in their codecs alone. Their `layer_group` goes into
            the hashes, so that the blocks of two groups never meet.
        identity: 16 bytes; the salt is part of it.
        tokens: Token ids ``[num_tokens]``, 0 to 2**32 - 1; copied.
        first_parent: Hash of the block before the first token.

    Raises:
        ValueError: If tokens are not a flat run of such integers, or a digest is not 16 bytes; or
            if layouts differ in more than their codecs.
    """
    layouts = list(layout) if isinstance(layout, Sequence) else [layout]
    if len({one.raw for one in layouts}) != 1:
        raise ValueError(f"layout: expected layouts of one block, got {layouts}")
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"tokens: expected flat integers, got {ids.dtype} {list(ids.shape)}")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > 0xFFFFFFFF):
        raise ValueError(f"tokens: expected 0 to 2**32 - 1, got {ids.min()} to {ids.max()}")
    ids = ids.astype(np.uint32)  # a copy: keys must not change with the caller's array
    ids.flags.writeable = False
    keys, parent = [], first_parent
    block_size, layer_group = layouts[0].block_size, layouts[0].layer_group
    for number in range(ids.size // block_size):
        block = ids[number * block_size : (number + 1) * block_size]
        block_hash = hash_block(parent, identity, layer_group, block)
        own_layout = layouts[min(number, len(layouts) - 1)]
        keys.append(BlockKey(own_layout, identity, parent, block_hash, block))
        parent = block_hash
    return keys
