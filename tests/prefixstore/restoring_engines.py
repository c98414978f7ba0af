"""Engines over one tier that tests make fail, hang or forget."""

import pytest
from cached_models import BLOCK_SIZE
from dict_tier import DictTier
from engines import GREEDY, Numbers

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine import Engine, EngineConfig
from prefixstore.store import Store, StoreConfig

LENGTH = 30 * BLOCK_SIZE + 5  # of the prompts


@pytest.fixture
def tier():
    return DictTier("slow")


@pytest.fixture
def open_engine(model, tier):
    """Opens an engine with only the given tier; checks and closes it after the test."""
    engines = []

    def open_one(load_timeout_s=5.0, first_tier=None, **settings):
        tiers = [tier] if first_tier is None else [first_tier, tier]
        store = Store(tiers, StoreConfig(load_timeout_s=load_timeout_s))
        config = CacheConfig(block_size=BLOCK_SIZE, pool_tokens=2048)
        cache = PrefixCache.open(model, config, store=store)
        settings = {"max_batch_tokens": 24, "restore_policy": "load", **settings}
        engines.append(Engine(model, Numbers(), cache, EngineConfig(**settings)))
        return engines[-1]

    yield open_one
    tier.fail = lambda call: None
    for engine in engines:
        assert engine.drain(60)
        engine.close()
        assert engine.check() == []
        stats = engine.cache.stats()
        engine.cache.close()
        assert stats.pool_free_blocks + stats.index.num_blocks == stats.pool_blocks


def warm(engine, tokens):
    """Get the prompt into the tier, and empty the pool."""
    engine.submit(tokens, GREEDY).result(60)
    assert engine.cache.flush()
    engine.cache.evict_pool()


def watch(monkeypatch, owner, name, then):
    """Run `then(result, arguments)` after each call of a method."""
    method = getattr(owner, name)

    def watched(*args, **kwargs):
        answer = method(*args, **kwargs)
        then(answer, args, kwargs)
        return answer

    monkeypatch.setattr(owner, name, watched)
