"""An engine's blocks in tiers with other write policies than write-through."""

import pytest
from cached_models import BLOCK_SIZE
from dict_tier import DictTier
from engines import GREEDY, answer, open_over, prompt

from prefixstore.store import TierPolicy

LENGTH = 8 * BLOCK_SIZE + 5
SECOND_TOUCH = {"shared": TierPolicy("write_second_touch")}


@pytest.mark.parametrize("has_memory", [False, True])
def test_what_is_used_again_in_the_pool_reaches_a_tier_that_waits_for_that(model, has_memory):
    shared = DictTier("shared")
    tiers = [DictTier("memory"), shared] if has_memory else [shared]
    with open_over(model, *tiers, policies=SECOND_TOUCH) as engine:
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
    with open_over(model, shared, restore_policy="load") as engine:  # another machine
        again = answer(engine, prompt(LENGTH))
        assert again.token_ids == output.token_ids
        assert again.report.reuse.tokens_by_tier == {"shared": 8 * BLOCK_SIZE}


def test_what_a_preempted_request_finds_of_its_own_was_not_used_again(model):
    shared = DictTier("shared")
    with open_over(model, shared, policies=SECOND_TOUCH, max_batch_tokens=24) as engine:
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
