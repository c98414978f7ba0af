"""What becomes of an engine's blocks in tiers that do not take every block."""

import contextlib

import pytest
from cached_models import BLOCK_SIZE
from dict_tier import DictTier
from engines import GREEDY, Numbers, answer, prompt

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine import Engine, EngineConfig
from prefixstore.store import Store, StoreConfig, TierPolicy

LENGTH = 8 * BLOCK_SIZE + 5


@contextlib.contextmanager
def open_over(model, *tiers, **settings):
    """An engine over these tiers, of which the last takes what is used again."""
    policies = {tiers[-1].name: TierPolicy("write_second_touch")}
    cache = PrefixCache.open(
        model,
        CacheConfig(block_size=BLOCK_SIZE, pool_tokens=2048),
        store=Store(list(tiers), StoreConfig(policies=policies)),
    )
    with contextlib.closing(cache), Engine(model, Numbers(), cache, EngineConfig(**settings)) as it:
        yield it


@pytest.mark.parametrize("has_memory", [False, True])
def test_what_is_used_again_in_the_pool_reaches_a_tier_that_waits_for_that(model, has_memory):
    shared = DictTier("shared")
    tiers = [DictTier("memory"), shared] if has_memory else [shared]
    with open_over(model, *tiers) as engine:
        answer(engine, prompt(LENGTH))
        assert engine.cache.flush()
        assert not shared.records, "it was used once"
        output = answer(engine, prompt(LENGTH))
        assert output.report.reuse.tokens_by_tier == {"device": 8 * BLOCK_SIZE}
        assert engine.cache.flush()
        num_records = len(shared.records)
        for _ in range(3):
            answer(engine, prompt(LENGTH))
        assert engine.cache.flush() and len(shared.records) == num_records
    with open_over(model, shared, restore_policy="load") as engine:  # as on another machine
        again = answer(engine, prompt(LENGTH))
        assert again.token_ids == output.token_ids
        assert again.report.reuse.tokens_by_tier == {"shared": 8 * BLOCK_SIZE}


def test_what_a_preempted_request_finds_of_its_own_was_not_used_again(model):
    shared = DictTier("shared")
    with open_over(model, shared, max_batch_tokens=24) as engine:
        scheduler = engine._loop.scheduler
        next_steps, num_calls = scheduler.next_steps, [0]

        def preempt_once(now):
            num_calls[0] += 1
            if num_calls[0] == 3:
                scheduler.preempt(scheduler.running[0])
                scheduler.admit(now)
            return next_steps(now)

        scheduler.next_steps = preempt_once
        report = engine.submit(prompt(LENGTH), GREEDY).result(60).report
        assert report.num_preemptions == 1
        assert engine.cache.flush()
        assert not shared.records
