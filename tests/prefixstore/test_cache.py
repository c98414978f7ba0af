"""A cache changes when tokens are computed, never which tokens come out."""

import gc
import threading
import time
import weakref

import pytest
import torch
from cached_models import BLOCK_SIZE, as_row, generate, random_tokens, run

from kvkernels import PoolFullError
from kvkernels.nn.decoder_layers import FusedDecoderLayer
from kvkernels.nn.fused_model import fused_model
from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.errors import ConfigError
from prefixstore.index import RadixIndex
from prefixstore.store.config import StoreConfig
from prefixstore.tiers.memory import MemoryTier


def test_warm_output_equals_cold_output_and_transformers_own(model, open_cache):
    tokens = random_tokens(150)
    plain = generate(model, tokens)
    cache = open_cache()
    cold, cold_report = run(cache, model, tokens)
    warm, warm_report = run(cache, model, tokens)
    assert cold == warm == plain
    assert cold_report.num_reused == 0
    assert warm_report.tokens_by_tier == {"device": 144}
    assert warm_report.num_recomputed == 6


@pytest.mark.parametrize("shared", [0, 1, 15, 16, 17, 40, 41, 64, 80, 127])
def test_a_prompt_that_diverges_reuses_the_whole_blocks_before(model, open_cache, shared):
    first, second = random_tokens(128, seed=1), random_tokens(140, seed=2)
    second[0, :shared] = first[0, :shared]
    plain = generate(model, second)
    cache = open_cache()
    run(cache, model, first)
    out, report = run(cache, model, second)
    assert out == plain
    assert report.num_reused == shared // BLOCK_SIZE * BLOCK_SIZE


def test_at_least_one_token_is_computed(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(4 * BLOCK_SIZE)
    cold, _ = run(cache, model, tokens)
    warm, report = run(cache, model, tokens)
    assert warm == cold
    assert report.num_recomputed == BLOCK_SIZE


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17])
def test_a_prompt_of_at_most_about_a_block_is_answered_alike_twice(model, open_cache, length):
    tokens = random_tokens(length)
    cache = open_cache()
    plain = generate(model, tokens)
    assert run(cache, model, tokens)[0] == plain
    assert run(cache, model, tokens)[0] == plain


def test_committed_answers_are_reused(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(50)
    with cache.session(tokens) as session:
        answer = generate(model, tokens, session, num_new=40)
        whole = torch.cat([tokens, as_row(answer)], dim=1)
        assert session.commit(whole) == 80  # 89 tokens are stored, the last one never is
    follow_up = torch.cat([whole, random_tokens(9, seed=5)], dim=1)
    plain = generate(model, follow_up)
    out, report = run(cache, model, follow_up)
    assert out == plain
    assert report.num_reused == 80


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_evicted_blocks_come_back_from_a_tier(model, open_cache, tmp_path, tier):
    places = {"memory": {"memory_bytes": 1 << 24}, "disk": {"disk_path": tmp_path}}
    cache = open_cache(pool_tokens=320, **places[tier])
    prompts = [random_tokens(200, seed=seed) for seed in range(4)]
    plain = [generate(model, tokens) for tokens in prompts]
    for tokens, expected in zip(prompts, plain, strict=True):
        assert run(cache, model, tokens)[0] == expected
        assert cache.flush(10)
    assert cache.stats().evicted_blocks > 0
    out, report = run(cache, model, prompts[0])
    assert out == plain[0]
    assert report.num_reused == 192
    assert report.tokens_by_tier.get(tier, 0) > 0


def test_blocks_survive_a_restart_on_disk(model, open_cache, tmp_path):
    tokens = random_tokens(300)
    plain = generate(model, tokens)
    with PrefixCache.open(
        model, block_size=BLOCK_SIZE, pool_tokens=1024, memory_bytes=0, disk_path=tmp_path
    ) as first:
        run(first, model, tokens)
    cache = open_cache(disk_path=tmp_path)
    out, report = run(cache, model, tokens)
    assert out == plain
    assert report.tokens_by_tier == {"disk": 288}
    assert run(cache, model, tokens)[1].tokens_by_tier == {"device": 288}


def test_a_fused_model_gives_the_same_tokens_and_decodes_in_replaced_layers(
    model, open_cache, monkeypatch
):
    tokens, runs, own_run = random_tokens(200), [], FusedDecoderLayer.run
    plain = generate(model, tokens)
    monkeypatch.setattr(
        FusedDecoderLayer, "run", lambda self, *args: runs.append(self) or own_run(self, *args)
    )
    with fused_model(model):
        cache = open_cache()
        runs.clear()  # of the trial
        cold, _ = run(cache, model, tokens)
        num_cold = len(runs)
        warm, report = run(cache, model, tokens)
    assert cold == warm == plain
    assert report.num_reused == 192
    assert num_cold == len(runs) - num_cold == len(plain) * model.config.num_hidden_layers


def test_a_damaged_record_is_a_counted_miss(model, open_cache, tmp_path):
    tokens = random_tokens(300)
    plain = generate(model, tokens)
    options = {"block_size": BLOCK_SIZE, "pool_tokens": 1024, "memory_bytes": 0}
    with PrefixCache.open(model, disk_path=tmp_path, **options) as first:
        run(first, model, tokens)
    damage_every_slab(tmp_path)
    cache = open_cache(disk_path=tmp_path)
    out, report = run(cache, model, tokens)
    assert out == plain
    assert report.num_reused < 288
    disk = {tier.name: tier for tier in cache.stats().store.tiers}["disk"]
    assert disk.num_corrupted > 0


def damage_every_slab(path):
    """Flip one bit in the middle of every payload file."""
    slabs = [
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(part in file.name for part in ("sqlite", ".db", "-wal", "-shm", "lock"))
    ]
    assert slabs
    for slab in slabs:
        data = bytearray(slab.read_bytes())
        for at in range(2000, len(data), 4096):
            data[at] ^= 16
        slab.write_bytes(data)


def test_another_model_never_gets_these_blocks(model, open_cache, tmp_path):
    tokens = random_tokens(100)
    options = {"block_size": BLOCK_SIZE, "pool_tokens": 1024, "memory_bytes": 0}
    with PrefixCache.open(model, disk_path=tmp_path, **options) as first:
        run(first, model, tokens)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1.0
    plain = generate(model, tokens)
    out, report = run(open_cache(disk_path=tmp_path), model, tokens)
    assert out == plain
    assert report.num_reused == 0


def test_salts_never_meet(model, open_cache, tmp_path):
    tokens = random_tokens(100)
    cache = open_cache(disk_path=tmp_path)
    with cache.session(tokens, salt="alice") as session:
        generate(model, tokens, session)
    assert cache.flush(10)
    with cache.session(tokens, salt="bob") as session:
        assert session.report.num_reused == 0
    with cache.session(tokens, salt="alice") as session:
        assert session.report.num_reused == 96


def test_a_session_passed_straight_to_generate_gives_its_blocks_back(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(100)
    generate(model, tokens, cache.session(tokens))
    gc.collect()
    used = cache.stats().pool_blocks - cache.stats().pool_free_blocks
    assert used == 6  # the prompt's whole blocks stay, held only by the index


def test_a_session_may_be_collected_while_its_locks_are_held(model, open_cache, monkeypatch):
    match, num_collected = RadixIndex.match, 0

    def match_after_collecting(*arguments):
        nonlocal num_collected
        num_collected += gc.collect()
        return match(*arguments)

    cache = open_cache()
    cycle = [cache.session(random_tokens(100))]
    cycle.append(cycle)
    session = weakref.ref(cycle[0])
    generate(model, random_tokens(100), cycle[0])
    del cycle
    monkeypatch.setattr(RadixIndex, "match", match_after_collecting)
    cache.session(random_tokens(100, seed=1)).release()
    assert session() is None
    assert num_collected > 0
    used = cache.stats().pool_blocks - cache.stats().pool_free_blocks
    assert used == 6  # the prompt's whole blocks stay, held only by the index


def test_a_full_pool_raises_and_recovers(model, open_cache):
    cache = open_cache(pool_tokens=128)
    small, large = random_tokens(40, seed=1), random_tokens(200, seed=2)
    expected = generate(model, small)
    with cache.session(large) as session, pytest.raises(PoolFullError):
        generate(model, large, session)
    assert run(cache, model, small)[0] == expected


@pytest.mark.parametrize("pool_tokens", [1 << 50, 1 << 60])  # memory, and numbers, end before
def test_refuses_a_pool_that_there_is_no_memory_for(model, open_cache, pool_tokens):
    with pytest.raises(ConfigError, match=r"pool_tokens: expected room for \d+ bytes on "):
        open_cache(pool_tokens=pool_tokens)
    assert run(open_cache(), model, random_tokens(40))[0] == generate(model, random_tokens(40))


def test_open_sessions_keep_their_blocks_under_pressure(model, open_cache):
    cache = open_cache(pool_tokens=512)
    held_tokens = random_tokens(100, seed=1)
    plain = generate(model, held_tokens, num_new=20)
    run(cache, model, held_tokens)
    with cache.session(held_tokens) as held:
        for seed in range(2, 6):
            run(cache, model, random_tokens(200, seed=seed))
        assert generate(model, held_tokens, held, num_new=20) == plain


def test_pressure_leaves_what_open_sessions_hold_in_the_index(model, open_cache):
    """Evicting blocks that a session holds would free nothing."""
    cache = open_cache(pool_tokens=40 * BLOCK_SIZE)
    held_tokens, large = random_tokens(30 * BLOCK_SIZE + 1, seed=1), random_tokens(240, seed=2)
    with cache.session(held_tokens) as held:
        generate(model, held_tokens, held, num_new=2)
        with cache.session(large) as session, pytest.raises(PoolFullError):
            generate(model, large, session)
        again = cache.session(held_tokens)
        assert again.report.num_reused == 30 * BLOCK_SIZE
        again.release()


def delay_puts(monkeypatch, wait):
    """Make a memory tier wait before it takes records, in every way of putting them."""

    def late(take):
        def wait_and_take(*arguments, **options):
            wait()
            return take(*arguments, **options)

        return wait_and_take

    monkeypatch.setattr(MemoryTier, "put_many", late(MemoryTier.put_many))
    monkeypatch.setattr(MemoryTier, "reserve_many", late(MemoryTier.reserve_many))


def test_pressure_waits_for_writes_before_it_evicts_more(model, open_cache, monkeypatch):
    delay_puts(monkeypatch, lambda: time.sleep(0.02))
    cache = open_cache(pool_tokens=40 * BLOCK_SIZE, memory_bytes=1 << 24)
    run(cache, model, random_tokens(30 * BLOCK_SIZE + 1, seed=1), num_new=2)
    run(cache, model, random_tokens(12 * BLOCK_SIZE, seed=3), num_new=2)
    assert cache.stats().evicted_blocks == 3  # 30 blocks, then 12 and one of the answer, in 40


@pytest.mark.parametrize("store", [None, StoreConfig(write_timeout_s=29)], ids=["default", "set"])
def test_no_block_is_dropped_while_the_writer_is_slow(model, open_cache, monkeypatch, store):
    may_write = threading.Event()
    delay_puts(monkeypatch, lambda: may_write.wait(60))
    cache = open_cache(pool_tokens=20_000, memory_bytes=1 << 28, config=CacheConfig(store=store))
    for seed in range(9):  # more blocks than a store queues by default
        run(cache, model, random_tokens(2000, seed=seed), num_new=1)
    assert cache.stats().store.queue_entries > StoreConfig().max_queue_entries
    may_write.set()
    assert cache.flush(60)
    assert cache.stats().store.num_dropped == 0


def test_sessions_in_several_threads_answer_as_without_a_cache(model, open_cache, tmp_path):
    cache = open_cache(pool_tokens=2048, memory_bytes=1 << 24, disk_path=tmp_path)
    shared = random_tokens(80, seed=0)
    prompts = [torch.cat([shared, random_tokens(30, seed=seed)], 1) for seed in range(1, 7)]
    plain = [generate(model, tokens) for tokens in prompts]
    outputs = [None] * len(prompts)

    def work(number):
        outputs[number] = run(cache, model, prompts[number])[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == plain


def test_two_caches_share_one_disk(model, open_cache, tmp_path):
    tokens = random_tokens(100)
    first = open_cache(disk_path=tmp_path)
    second = open_cache(disk_path=tmp_path)
    cold, _ = run(first, model, tokens)
    assert first.flush(10)
    out, report = run(second, model, tokens)
    assert out == cold
    assert report.tokens_by_tier == {"disk": 96}


def test_a_damaged_disk_index_loses_no_answer(model, open_cache, tmp_path):
    tokens = random_tokens(100)
    options = {"block_size": BLOCK_SIZE, "pool_tokens": 1024, "memory_bytes": 0}
    with PrefixCache.open(model, disk_path=tmp_path, **options) as first:
        expected, _ = run(first, model, tokens)
    (index,) = (file for file in tmp_path.rglob("*") if file.is_file() and is_sqlite(file))
    index.write_bytes(b"no database at all" * 100)
    assert run(open_cache(disk_path=tmp_path), model, tokens)[0] == expected


def is_sqlite(file):
    with file.open("rb") as stream:
        return stream.read(16) == b"SQLite format 3\0"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_load_that_raises_gives_its_blocks_back(model, open_cache, monkeypatch, error):
    tokens = random_tokens(150)
    cache = open_cache(memory_bytes=1 << 24)
    cold, _ = run(cache, model, tokens)
    assert cache.flush(30)
    cache.evict_pool()
    allocators = [group.allocator for group in cache.blocks.device.groups]
    num_free = [allocator.num_free for allocator in allocators]
    lend_many, left = MemoryTier.lend_many, len(allocators) - 1  # the last group's raises

    def interrupted(tier, names):
        nonlocal left
        if left == 0:
            raise error
        left -= 1
        return lend_many(tier, names)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(MemoryTier, "lend_many", interrupted)
        cache.session(tokens)
    assert [allocator.num_free for allocator in allocators] == num_free
    warm, report = run(cache, model, tokens)
    assert warm == cold
    assert report.num_recomputed == 6


@pytest.mark.parametrize("where", ["touch", "making"])
def test_an_interrupted_session_holds_no_blocks(model, open_cache, monkeypatch, where):
    cache = open_cache()
    tokens = random_tokens(200)
    run(cache, model, tokens)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if where == "touch":
            patched.setattr(cache.blocks, "touch", interrupt)
        else:
            patched.setattr(cache.blocks.device, "max_pass_blocks", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.session(tokens)
    gc.collect()
    cache.evict_pool()
    stats = cache.stats()
    assert stats.pool_free_blocks == stats.pool_blocks
    assert run(cache, model, tokens)[0] == generate(model, tokens)
