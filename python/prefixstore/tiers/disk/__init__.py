"""Records on a local disk."""

from prefixstore.tiers.disk.config import DiskTierConfig
from prefixstore.tiers.disk.tier import DiskTier

__all__ = ["DiskTier", "DiskTierConfig"]
