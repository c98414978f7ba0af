"""Records in a Redis or Valkey."""

from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.redis.tier import RedisTier

__all__ = ["RedisTier", "RedisTierConfig"]
