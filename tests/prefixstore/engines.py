"""Engines on tiny models, and what their requests must answer."""

import contextlib
import threading
import time

from cached_models import BLOCK_SIZE, as_row, generate, random_tokens

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine import Engine, EngineConfig, SamplingParams
from prefixstore.store import Store, StoreConfig

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


class Numbers:
    """A tokenizer whose text is the token ids: " 17 4"."""

    eos_token_id = None

    def decode(self, token_ids, **_):
        return "".join(f" {token_id}" for token_id in token_ids)


@contextlib.contextmanager
def open_engine(model, **settings):
    """An engine with small blocks; at the end its recount and the number of threads are checked."""
    settings = {"block_size": BLOCK_SIZE, "pool_tokens": 4096, "max_batch_tokens": 64, **settings}
    with Engine.open(model, Numbers(), **settings) as engine:
        yield engine
        assert engine.drain(60), "requests hang"
        assert engine.check() == []
        assert engine.stats().num_running == engine.stats().num_queued == 0
        engine.cache.flush()
        # A load that took too long for its request holds blocks until it ends.
        ends_at = time.monotonic() + 30
        while has_leak(engine.cache.stats()) and time.monotonic() < ends_at:
            time.sleep(0.01)
        stats = engine.cache.stats()
        assert not has_leak(stats), "blocks leak"
        for pool in stats.pools:
            # In a sliding group the index may know blocks without holding them.
            assert pool.window is not None or num_held(pool) == stats.index.num_blocks


def num_held(pool):
    return pool.num_blocks - pool.num_free


def has_leak(stats):
    """Whether a pool holds blocks that the index does not know."""
    return any(num_held(pool) > stats.index.num_blocks for pool in stats.pools)


@contextlib.contextmanager
def open_over(model, *tiers, policies=None, **settings):
    """An engine over the test's own tiers."""
    store = Store(list(tiers), StoreConfig(policies=policies or {}))
    config = CacheConfig(block_size=BLOCK_SIZE, pool_tokens=2048)
    cache = PrefixCache.open(model, config, store=store)
    with contextlib.closing(cache), Engine(model, Numbers(), cache, EngineConfig(**settings)) as it:
        yield it
        assert it.drain(60), "requests hang"
        assert it.check() == []


def wait_threads(num_threads: int) -> None:
    """Wait until at most so many threads are left: joined ones may still be ending."""
    ends_at = time.monotonic() + 30
    while threading.active_count() > num_threads and time.monotonic() < ends_at:
        time.sleep(0.01)
    names = [thread.name for thread in threading.enumerate()]
    assert len(names) <= num_threads, names


def prompt(num_tokens, seed=0):
    return random_tokens(num_tokens, seed)[0].tolist()


def expected(model, tokens, num_new=12):
    """The model's own answer, with its end-of-sequence token treated like any other."""
    model.generation_config.eos_token_id = None
    return generate(model, as_row(tokens), num_new=num_new)


def answer(engine, tokens, sampling=GREEDY, **options):
    return engine.submit(tokens, sampling, **options).result(60)
