"""Counted once: prompts that wait, are audited, or are preempted and go on."""

import threading
import time

import pytest
from cached_models import BLOCK_SIZE
from dict_tier import DictTier
from engines import GREEDY, Numbers, answer, expected, open_engine, prompt

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine import Engine, EngineConfig, SamplingParams
from prefixstore.engine.sequence import SequenceBlocks
from prefixstore.store import Store

SHARED = 6  # blocks that are cached
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


def index_counts(engine):
    stats = engine.cache.stats().index
    return stats.num_matches, stats.lookup_blocks, stats.hit_blocks


def test_a_prompt_that_waits_for_room_is_looked_up_once(model, monkeypatch):
    shared = prompt(SHARED * BLOCK_SIZE)
    reserve, has_tried_often, num_tries = SequenceBlocks.reserve, threading.Event(), []

    def counted(self, num_tokens):
        num_tries.append(1)
        if len(num_tries) == 5:
            has_tried_often.set()
        reserve(self, num_tokens)

    with open_engine(model, memory_bytes=0, pool_tokens=1024) as engine:
        answer(engine, shared + prompt(1, seed=1), ONE_TOKEN)
        device = engine.cache.blocks.device
        held = device.reserve_now(0, device.groups[0].allocator.num_free - 2)
        before = index_counts(engine)
        monkeypatch.setattr(SequenceBlocks, "reserve", counted)
        handle = engine.submit(shared + prompt(4 * BLOCK_SIZE + 1, seed=2), ONE_TOKEN)
        assert has_tried_often.wait(30)
        device.groups[0].allocator.release(held)
        assert handle.result(60).report.reuse.tokens_by_tier == {"device": SHARED * BLOCK_SIZE}
        counts = [now - then for now, then in zip(index_counts(engine), before, strict=True)]
    assert counts == [1, SHARED + 4, SHARED]


def test_an_audit_looks_nothing_up(model):
    tokens = prompt(SHARED * BLOCK_SIZE + 1)
    with open_engine(model, memory_bytes=0, audit_share=1) as engine:
        answer(engine, tokens, ONE_TOKEN)
        answer(engine, tokens, ONE_TOKEN)
        ends_at = time.monotonic() + 60
        while not engine.stats().num_audits:
            assert time.monotonic() < ends_at
            time.sleep(0.001)
        assert index_counts(engine) == (2, 2 * SHARED, SHARED)


@pytest.mark.usefixtures("waits_for_look_ups")
@pytest.mark.parametrize("tier", ["computed", "loaded"])
def test_a_prompt_that_gave_its_blocks_away_hits_none_of_its_own(model, tier, monkeypatch):
    """It is preempted before its first token, when half of it was published."""
    monkeypatch.setattr("prefixstore.planner.plan._LEAST_PATIENCE_S", 30.0)
    tokens = prompt(20 * BLOCK_SIZE + 5)
    first, loaded = 2, 5  # blocks on the device; blocks in the tier
    config = CacheConfig(block_size=BLOCK_SIZE, pool_tokens=1024)
    cache = PrefixCache.open(model, config, store=Store([DictTier("dict")]))
    settings = EngineConfig(max_batch_tokens=2 * BLOCK_SIZE, audit_share=0, restore_policy="load")
    with Engine(model, Numbers(), cache, settings) as engine:
        held = {"device": first * BLOCK_SIZE}
        if tier == "loaded":
            answer(engine, tokens[: loaded * BLOCK_SIZE + 1], ONE_TOKEN)
            assert cache.flush()
            cache.evict_pool()
            held = {"dict": loaded * BLOCK_SIZE}
        else:
            answer(engine, tokens[: first * BLOCK_SIZE + 1], ONE_TOKEN)
        counts, before = engine.stats(), index_counts(engine)
        scheduler, is_done = engine._loop.scheduler, threading.Event()
        admit = scheduler.admit

        def preempt_once(now):
            running = scheduler.running
            if running and running[0].num_computed > 10 * BLOCK_SIZE and not is_done.is_set():
                is_done.set()
                scheduler.preempt(running[0])
            admit(now)

        monkeypatch.setattr(scheduler, "admit", preempt_once)
        output = answer(engine, tokens)
        assert is_done.is_set() and output.report.num_preemptions == 1
        assert list(output.token_ids) == expected(model, tokens, GREEDY.max_tokens)
        reuse, num_held = output.report.reuse, sum(held.values())
        assert reuse.tokens_by_tier == held
        assert reuse.num_recomputed == len(tokens) - num_held
        assert sum(reuse.misses.values()) == 20 * BLOCK_SIZE - num_held
        hits = engine.stats().hit_tokens
        assert {name: hits[name] - counts.hit_tokens.get(name, 0) for name in hits} == held
        looked_up = [now - then for now, then in zip(index_counts(engine), before, strict=True)]
        assert looked_up == [1, 20, held.get("device", 0) // BLOCK_SIZE]
    assert cache.check() == []
    cache.close()
