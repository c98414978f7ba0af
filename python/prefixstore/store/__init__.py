"""The tiers in order: look-up, verification, promotion and write policies."""

from prefixstore.store.breaker import BreakerConfig
from prefixstore.store.config import StoreConfig, TierPolicy
from prefixstore.store.load import LoadProgress
from prefixstore.store.loader import LoadObserver
from prefixstore.store.stats import StoreStats, TierUse
from prefixstore.store.store import Store

__all__ = [
    "BreakerConfig",
    "LoadObserver",
    "LoadProgress",
    "Store",
    "StoreConfig",
    "StoreStats",
    "TierPolicy",
    "TierUse",
]
