"""A cache changes when tokens are computed, never which tokens come out."""

import gc
import threading
from functools import partial

import numpy as np
import pytest
import torch
import transformers

from kvkernels import PoolFullError
from kvkernels.errors import UnsupportedError
from kvkernels.nn.transformers import paged_attention
from prefixstore.cache import PrefixCache
from prefixstore.errors import ConfigError, TierUnavailable
from prefixstore.store import StoreConfig
from prefixstore.tiers.memory import MemoryTier

BLOCK_SIZE = 16
VOCABULARY = 97


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_gemma3():
    """Two layer groups; the window of 40 tokens is no multiple of the block."""
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=40,
        layer_types=[f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
        max_position_embeddings=2048,
    )
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture(params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def model(request):
    torch.manual_seed(1)
    return request.param()


def random_tokens(num_tokens, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(3, VOCABULARY, (1, num_tokens)))


@torch.no_grad()
def generate(model, tokens, past_key_values=None, num_new=12):
    return model.generate(
        tokens,
        past_key_values=past_key_values,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones_like(tokens),
    )[0, tokens.shape[1] :].tolist()


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


def run(cache, model, tokens, **options):
    with cache.session(tokens) as session:
        return generate(model, tokens, session, **options), session.report


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
def test_short_prompts(model, open_cache, length):
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
        whole = torch.cat([tokens, torch.tensor([answer])], dim=1)
        assert session.commit(whole) == 80  # 89 tokens are stored, the last one never is
    follow_up = torch.cat([whole, random_tokens(9, seed=5)], dim=1)
    plain = generate(model, follow_up)
    out, report = run(cache, model, follow_up)
    assert out == plain
    assert report.num_reused == 80


def test_commit_refuses_other_tokens(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    with cache.session(tokens) as session:
        generate(model, tokens, session)
        other = tokens.clone()
        other[0, 7] = 1
        with pytest.raises(ValueError, match=r"token_ids: expected to continue .* at 7, got 1"):
            session.commit(other)
    with pytest.raises(ValueError, match="expected an open session, got a released one"):
        session.commit(torch.cat([tokens, tokens], dim=1))


def refusal(cache, model, tokens, **inputs):
    """What the model says to a session of `tokens` run on other inputs; nothing gets cached."""
    with cache.session(tokens) as session, torch.no_grad():
        with pytest.raises((ValueError, UnsupportedError)) as error:
            model(past_key_values=session, **inputs)
        assert session.num_tokens == 0
    assert cache.session(tokens).report.num_reused == 0
    return str(error.value)


def test_a_session_refuses_what_is_not_its_own(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    other = tokens.clone()
    other[0, 7] = 1
    refused = partial(refusal, cache, model, tokens)
    expected = f"input_ids: expected the session's token {tokens[0, 7]} at 7, got 1"
    assert refused(input_ids=other) == expected
    shifted = torch.arange(1, 41)[None]
    expected = "position_ids: expected 0 to 39 with a session, got 1 to 40"
    assert refused(input_ids=tokens, position_ids=shifted) == expected
    embeddings = model.get_input_embeddings()(tokens)
    assert refused(inputs_embeds=embeddings).startswith("inputs_embeds: expected input_ids alone")
    assert refused(input_ids=tokens[:, :0]).startswith("input_ids: expected more tokens than the 0")
    both = torch.cat([tokens, tokens])
    assert refused(input_ids=both) == (
        "input_ids: expected one sequence with a session, got shape [2, 40]"
    )


def test_a_session_passed_to_another_model_caches_nothing(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    torch.manual_seed(2)
    other = type(model)(model.config).eval()
    with (
        paged_attention(other),
        cache.session(tokens) as session,
        torch.no_grad(),
        pytest.raises(ValueError, match="expected a forward pass of the model the cache"),
    ):
        other(tokens, past_key_values=session)
    assert cache.session(tokens).report.num_reused == 0


def test_commit_refuses_what_the_model_was_not_run_on(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    with cache.session(tokens) as session:
        answer = torch.tensor([generate(model, tokens, session, num_new=30)])
        made_up = answer.clone()
        made_up[0, 11] = (answer[0, 11] + 1) % VOCABULARY
        with pytest.raises(ValueError, match=r"input_ids: expected the session's token .* at 51"):
            session.commit(torch.cat([tokens, made_up], dim=1))
        assert session.commit(torch.cat([tokens, answer], dim=1)) == 64


def test_what_was_cropped_away_may_be_other_tokens(model, open_cache):
    cache = open_cache()
    tokens, other = random_tokens(30), random_tokens(30, seed=5)
    with cache.session(tokens) as session, torch.no_grad():
        model(tokens, past_key_values=session)
        model(tokens[:, :10], past_key_values=session)
        session.crop(-5)
        model(other[:, :10], past_key_values=session)
        whole = torch.cat([tokens, tokens[:, :5], other[:, :10]], dim=1)
        assert session.commit(whole) == 32
    plain = generate(model, whole)
    assert run(cache, model, whole)[0] == plain


def test_changed_weights_need_another_cache(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    run(cache, model, tokens)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="model: expected the weights the cache was opened with"):
        cache.session(tokens)
    assert run(open_cache(), model, tokens)[1].num_reused == 0


def test_a_closed_cache_gives_the_model_back(model, open_cache):
    before = model.config._attn_implementation
    first, second = open_cache(), open_cache()
    tokens = random_tokens(40)
    first.close()
    with pytest.raises(ValueError, match="session: expected an open cache, got a closed one"):
        first.session(tokens)
    run(second, model, tokens)
    second.close()
    second.close()
    assert model.config._attn_implementation == before
    generate(model, tokens)


def test_a_cache_that_cannot_be_opened_leaves_nothing_open(tmp_path):
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=VOCABULARY)
    bloom = transformers.BloomForCausalLM(config).eval()
    before, threads = bloom.config._attn_implementation, threading.active_count()
    with pytest.raises((UnsupportedError, ConfigError)):
        PrefixCache.open(bloom, disk_path=tmp_path)
    with pytest.raises(UnsupportedError):
        PrefixCache.open(bloom, pool_tokens=64, disk_path=tmp_path)
    assert bloom.config._attn_implementation == before
    assert threading.active_count() == threads
    assert not list(tmp_path.iterdir())


def test_a_tier_that_cannot_be_opened_leaves_the_model_alone(model, tmp_path):
    before = model.config._attn_implementation
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(TierUnavailable):
        PrefixCache.open(model, pool_tokens=64, disk_path=tmp_path / "file")
    assert model.config._attn_implementation == before


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
    assert used == 6  # the whole blocks of the prompt stay, in the index alone


def test_a_full_pool_raises_and_recovers(model, open_cache):
    cache = open_cache(pool_tokens=128)
    small, large = random_tokens(40, seed=1), random_tokens(200, seed=2)
    expected = generate(model, small)
    with cache.session(large) as session, pytest.raises(PoolFullError):
        generate(model, large, session)
    assert run(cache, model, small)[0] == expected


def test_open_sessions_keep_their_blocks_under_pressure(model, open_cache):
    cache = open_cache(pool_tokens=512)
    held_tokens = random_tokens(100, seed=1)
    plain = generate(model, held_tokens, num_new=20)
    run(cache, model, held_tokens)
    with cache.session(held_tokens) as held:
        for seed in range(2, 6):
            run(cache, model, random_tokens(200, seed=seed))
        assert generate(model, held_tokens, held, num_new=20) == plain


def test_no_block_is_dropped_while_the_writer_is_slow(model, open_cache, monkeypatch):
    may_write = threading.Event()
    put = MemoryTier.put

    def slow_put(*arguments):
        may_write.wait(60)
        return put(*arguments)

    monkeypatch.setattr(MemoryTier, "put", slow_put)
    cache = open_cache(pool_tokens=20_000, memory_bytes=1 << 28)
    for seed in range(9):  # more blocks than a store queues by default
        run(cache, model, random_tokens(2000, seed=seed), num_new=1)
    assert cache.stats().store.queue_entries > StoreConfig().queue_entries
    may_write.set()
    assert cache.flush(60)
    assert cache.stats().store.num_dropped == 0


def test_sessions_in_several_threads(model, open_cache, tmp_path):
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


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "token_ids: expected at least one token, got none"),
        ([[1, 2], [3, 4]], r"token_ids: expected one sequence, .* got shape \[2, 2\]"),
        ([1.5, 2.5], "token_ids: expected integers, got float64"),
        ([1, -2], r"token_ids: expected token ids 0 to 2\*\*32 - 1, got -2 to 1"),
    ],
)
def test_refuses_tokens_that_are_none(open_cache, tokens, message):
    with pytest.raises(ValueError, match=message):
        open_cache().session(tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 24}, "block_size: expected one of 16, 32, 64, 128, 256, got 24"),
        ({"pool_tokens": 8}, "pool_tokens: expected at least one block of 16, got 8"),
        ({"pool_tokens": 64.5}, "pool_tokens: expected an integer, got 64.5"),
        ({"salt": 3}, "salt: expected a string, got 3"),
        ({"memory_bytes": -1}, "memory_bytes: expected 0 or more, got -1"),
        ({"disk_path": "x", "disk_bytes": 0}, "disk_bytes: expected more than 0, got 0"),
    ],
)
def test_refuses_a_config_out_of_range(open_cache, options, message):
    with pytest.raises(ConfigError, match=message):
        open_cache(**options)


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
