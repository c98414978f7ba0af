"""Records in an object store."""

from prefixstore.tiers.remote.config import RemoteTierConfig
from prefixstore.tiers.remote.tier import RemoteTier

__all__ = ["RemoteTier", "RemoteTierConfig"]
