"""Fixtures: models with caches, and tiers."""

import pytest
import torch
from cached_models import BLOCK_SIZE, tiny_gemma3, tiny_llama
from tier_kinds import make_tier, open_tiers

from prefixstore.cache import PrefixCache

__all__ = ["make_tier", "open_tiers"]


@pytest.fixture(params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def model(request):
    torch.manual_seed(1)
    return request.param()


@pytest.fixture
def open_cache(model):
    """Opens caches of the model; checks and closes them when the test is over."""
    caches = []

    def open_one(**options):
        cache = PrefixCache.open(
            model, **{"block_size": BLOCK_SIZE, "pool_tokens": 1024, "memory_bytes": 0, **options}
        )
        caches.append(cache)
        return cache

    yield open_one
    for cache in caches:
        assert cache.check() == []
        cache.close()
