"""Helpers that save blocks into a store and load them."""

import numpy as np
from dict_tier import CAPACITY
from sample_blocks import load_block, make_payload

from prefixstore.block_key import BlockKey
from prefixstore.store import Store
from prefixstore.store.block_sources import HostBlock
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig


def memory_and_disk(path) -> tuple[MemoryTier, DiskTier]:
    return (
        MemoryTier(MemoryTierConfig(CAPACITY)),
        DiskTier(DiskTierConfig(path, CAPACITY)),
    )


def save(store: Store, keys: list[BlockKey]) -> None:
    for key in keys:
        assert store.save(key, HostBlock(make_payload(key)))
    assert store.flush(30)


def load(store: Store, key: BlockKey) -> str | None:
    """Load a block; a wrong payload fails the test."""
    out = np.full(key.layout.payload_bytes, 0xEE, np.uint8)
    name = load_block(store, key, out)
    assert name is None or np.array_equal(out, make_payload(key)), "wrong output"
    return name


def use_of(store: Store, name: str):
    return next(use for use in store.stats().tiers if use.name == name)
