"""Small blocks with random payloads, for the tests of records, tiers and store."""

import zlib

import numpy as np

from prefixstore.checksum import Buffer
from prefixstore.record import BlockKey, RecordLayout, chain_keys, encode
from prefixstore.store import Store
from prefixstore.store.block_targets import HostBlocks

IDENTITY = bytes(range(16))
# 3 layers and 16 tokens leave 24 bytes of padding after the layer table
LAYOUT = RecordLayout(3, 1, 16, 16, "bfloat16", 0)
LARGE_LAYOUT = RecordLayout(5, 2, 64, 32, "float16", 1)


def make_keys(num_blocks: int, layout: RecordLayout = LAYOUT, seed: int = 0) -> list[BlockKey]:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 1 << 32, num_blocks * layout.block_size, dtype=np.uint32)
    return chain_keys(layout, IDENTITY, tokens)


def make_payload(key: BlockKey) -> np.ndarray:
    """The payload that belongs to a key, always the same."""
    random = np.random.default_rng(zlib.crc32(key.block_hash))
    return random.integers(0, 256, key.layout.block_bytes, dtype=np.uint8)


def make_record(key: BlockKey) -> bytearray:
    record = bytearray(key.layout.record_bytes)
    encode(key, make_payload(key), record)
    return record


def load_block(store: Store, key: BlockKey, out: Buffer) -> str | None:
    """Load a block; returns the tier that had it, or None."""
    return store.load_many([key], HostBlocks([out]))[0]
