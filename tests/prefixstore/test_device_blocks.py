"""Loads take pool blocks as soon as they are free, and wait no longer than the deadline."""

import threading
import time

import numpy as np
import pytest
import torch
from cached_models import BLOCK_SIZE, generate, random_tokens, run, tiny_llama
from dict_tier import DictTier

from kvkernels import BlockAllocator, KVLayout, KVPool, PoolFullError
from kvkernels.nn import PagedGroup
from prefixstore.cache import PrefixCache
from prefixstore.device import DeviceBlocks
from prefixstore.store import Store, StoreConfig

LAYOUT = KVLayout(1, 1, 16, BLOCK_SIZE, torch.float32)


def make_blocks(allocator):
    group = PagedGroup(KVPool(LAYOUT, allocator.num_blocks), allocator, [0])
    return DeviceBlocks([group], BLOCK_SIZE)


@pytest.mark.parametrize("failure", [1, 2, 3])
def test_blocks_that_another_thread_gives_back_are_taken(failure):
    class GivesBack(BlockAllocator):
        """An allocator where another thread frees blocks right after an allocation failed."""

        num_failures = 0

        def allocate(self, num_blocks):
            try:
                return super().allocate(num_blocks)
            except PoolFullError:
                self.num_failures += 1
                if self.num_failures == failure:
                    self.release(held)
                raise

    allocator = GivesBack(4)
    held = allocator.allocate(4)
    if failure <= 2:
        assert len(make_blocks(allocator).reserve(0, 2)) == 2
    else:  # found full both before and after the wait
        with pytest.raises(PoolFullError):
            make_blocks(allocator).reserve(0, 2)


def test_a_wait_for_writers_is_over_when_enough_is_free():
    blocks = make_blocks(BlockAllocator(4))
    held = blocks.reserve(0, 4)
    for block_id in held:
        blocks.writes.begin(0, block_id)
    blocks.groups[0].allocator.release(held)
    threading.Timer(0.1, lambda: [blocks.writes.end(0, one) for one in held[:2]]).start()
    started = time.monotonic()
    assert sorted(blocks.reserve(0, 2)) == sorted(held[:2])
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize("becomes", ["free", "evictable"])
def test_what_a_session_gives_back_ends_a_wait_for_a_writer(becomes):
    blocks = make_blocks(BlockAllocator(4))
    allocator, held = blocks.groups[0].allocator, blocks.reserve(0, 4)
    blocks.writes.begin(0, held[0])
    tokens = np.arange(2 * BLOCK_SIZE, dtype=np.uint32)

    def end_session():
        if becomes == "free":
            allocator.release(held[1:3])
        else:
            blocks.unpin(match)

    if becomes == "evictable":
        blocks.insert(tokens, "", np.array(held[1:3], dtype=np.int32)[:, None])
        match = blocks.hold(tokens, "")
        allocator.release(held[1:3])
    threading.Timer(0.1, end_session).start()
    started = time.monotonic()
    assert sorted(blocks.reserve(0, 2)) == sorted(held[1:3])
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize("waits", [True, False])
def test_nothing_is_evicted_for_what_cannot_be_had(waits):
    blocks = make_blocks(BlockAllocator(8))
    held = blocks.reserve(0, 6)
    prompts = [np.full(3 * BLOCK_SIZE, seed, dtype=np.uint32) for seed in range(2)]
    for prompt, ids in zip(prompts, (held[:3], held[3:]), strict=True):
        blocks.insert(prompt, "", np.array(ids, dtype=np.int32)[:, None])
    blocks.groups[0].allocator.release(held)
    match = blocks.hold(prompts[0], "")
    reserve = blocks.reserve if waits else blocks.reserve_now
    with pytest.raises(PoolFullError):
        reserve(0, 6)  # two are free, and three that no session holds
    assert blocks.num_cached(prompts[1], "") == 3
    assert blocks.evicted_blocks == 0
    assert len(reserve(0, 4)) == 4
    assert blocks.evicted_blocks == 2
    assert blocks.num_cached(prompts[0], "") == 3
    blocks.unpin(match)
    assert blocks.check() == []


def test_a_writer_that_hangs_is_waited_for_until_the_deadline():
    blocks = make_blocks(BlockAllocator(4))
    held = blocks.reserve(0, 4)
    blocks.writes.begin(0, held[0])
    started = time.monotonic()
    for deadline in (started - 1, started + 0.1):
        with pytest.raises(PoolFullError):
            blocks.reserve(0, 1, deadline)
    assert 0.1 <= time.monotonic() - started < 5.0


def test_a_tier_that_hangs_in_a_write_delays_a_session_until_its_load_timeout(monkeypatch):
    monkeypatch.setattr("prefixstore.pool_blocks.MAX_RECORDS", 4)  # per batch; the rest waits
    torch.manual_seed(1)
    model, tier, goes_on = tiny_llama(), DictTier("slow"), threading.Event()
    store = Store([tier], StoreConfig(load_timeout_s=0.5, queue_bytes=1 << 30))
    first, second = random_tokens(600), random_tokens(1000, seed=1)
    options = {"store": store, "block_size": BLOCK_SIZE, "pool_tokens": 1024}
    with PrefixCache.open(model, **options) as cache:
        run(cache, model, first)
        assert cache.flush()
        cache.evict_pool()
        tier.fail = lambda call: goes_on.wait(60) if call == "put" else None
        run(cache, model, second)  # all its blocks wait to be written
        started = time.monotonic()
        with cache.session(first):
            assert time.monotonic() - started < 5.0
        goes_on.set()
        assert cache.flush()
        assert run(cache, model, first)[0] == generate(model, first)
        assert cache.check() == []
