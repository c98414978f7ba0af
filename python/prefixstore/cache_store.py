"""The store of a cache, from its settings and the sizes of its pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvkernels.nn import PagedGroup
from prefixstore.config import CacheConfig
from prefixstore.store import Store, StoreConfig
from prefixstore.tier_urls import open_tiers


def open_store(config: CacheConfig, groups: Sequence[PagedGroup]) -> Store | None:
    """Open the tiers that a cache's settings name; None if these are none.

    Args:
        config: Of the cache.
        groups: Its pools, which bound what waits to be written.

    Raises:
        ConfigError: If a tier's URL is wrong.
        TierUnavailable: If a tier of this machine cannot be opened.
    """
    tiers, policies = open_tiers(config.tier_urls)
    if not tiers:
        return None
    store_config = _store_config(config.store or StoreConfig(), groups)
    try:
        return Store(tiers, replace(store_config, policies=policies))
    except BaseException:
        for tier in tiers:
            tier.close()
        raise


def _store_config(config: StoreConfig, groups: Sequence[PagedGroup]) -> StoreConfig:
    # Waiting blocks cost no memory, as the writer reads them where they lie in the pool. So the
    # queue may hold a whole pool, and no block of a long prompt is dropped. A pool that runs out of
    # blocks waits for the writer.
    if config.queue_bytes is None:
        pool_bytes = sum(group.pool.capacity_bytes for group in groups)
        config = replace(config, queue_bytes=max(config.max_queue_bytes, pool_bytes))
    if config.queue_entries is None:
        num_blocks = sum(group.pool.num_blocks for group in groups)
        config = replace(config, queue_entries=max(config.max_queue_entries, num_blocks))
    return config
