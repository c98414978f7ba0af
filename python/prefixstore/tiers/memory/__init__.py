"""Records in host memory."""

from prefixstore.tiers.memory.tier import MemoryTier, MemoryTierConfig

__all__ = ["MemoryTier", "MemoryTierConfig"]
