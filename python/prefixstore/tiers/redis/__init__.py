"""Records in a Redis or Valkey; who opens no such tier needs no client library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefixstore.tiers.redis.config import RedisTierConfig

if TYPE_CHECKING:
    from prefixstore.tiers.redis.tier import RedisTier

__all__ = ["RedisTier", "RedisTierConfig"]


def __getattr__(name: str) -> Any:
    if name == "RedisTier":
        from prefixstore.tiers.redis.tier import RedisTier

        return RedisTier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
