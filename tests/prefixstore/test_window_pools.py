"""Pools of sliding layers hold only windows: their sizes, and that no answer changes."""

import contextlib
import threading

import pytest
import torch
import transformers
from cached_models import (
    BLOCK_SIZE,
    DEVICE,
    calling_first,
    generate,
    random_tokens,
    run,
    tiny_gemma3,
    tiny_llama,
)
from engines import GREEDY, Numbers, answer, expected, open_engine, prompt

from kvkernels.nn import layer_groups
from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine import Engine, SamplingParams
from prefixstore.errors import ConfigError
from prefixstore.pool_sizes import least_window_blocks, pool_sizes

WINDOW = 40  # of the tiny models, in tokens; three blocks hold it


def sliding_only():
    """A model with a single layer group, which has a window."""
    config = transformers.MistralConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=WINDOW,
        max_position_embeddings=2048,
    )
    return transformers.MistralForCausalLM(config).eval().to(DEVICE)


@pytest.fixture(params=[tiny_gemma3, sliding_only], ids=["gemma3", "sliding_only"])
def model(request):
    torch.manual_seed(1)
    return request.param()


def check_empty(cache):
    """Check that every recount is right, and that nothing is held once all is evicted."""
    assert cache.flush()
    assert cache.check() == []
    cache.evict_pool()
    assert cache.stats().index.num_blocks == 0
    assert all(pool.num_free == pool.num_blocks for pool in cache.stats().pools)


@contextlib.contextmanager
def open_cache(model, window_blocks, **options):
    options = {"block_size": BLOCK_SIZE, "pool_tokens": 2048, "memory_bytes": 0, **options}
    with PrefixCache.open(model, window_pool_tokens=window_blocks * BLOCK_SIZE, **options) as cache:
        yield cache
        check_empty(cache)


# ---- sizes -----------------------------------------------------------------------------------


def gemma3_270m():
    """The fields of Gemma 3 270M's configuration that decide its pools' sizes."""
    return transformers.Gemma3TextConfig(
        hidden_size=640,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        max_position_embeddings=32768,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
        dtype="bfloat16",
    )


def sizes_of(model_config, **settings):
    config = CacheConfig(**settings)
    specs = layer_groups(model_config, config.block_size, torch.bfloat16)
    sizes = pool_sizes(config, model_config, specs, torch.device("cpu"))
    return sizes, [n * spec.layout.block_bytes for n, spec in zip(sizes, specs, strict=True)]


def test_a_pool_of_windows_does_not_grow_with_the_context():
    sizes, num_bytes = sizes_of(gemma3_270m(), pool_tokens=32768)
    assert sizes == [512, 152]
    block_bytes = 64 * 2 * 256 * 2  # one layer's keys and values
    assert num_bytes == [512 * 3 * block_bytes, 152 * 15 * block_bytes]
    assert sum(num_bytes) < 0.42 * 512 * 18 * block_bytes
    assert sizes_of(gemma3_270m(), pool_tokens=1 << 20)[0] == [16384, 2048]


def test_a_pool_of_windows_is_never_larger_than_that_of_whole_contexts():
    assert sizes_of(gemma3_270m(), pool_tokens=4096)[0] == [64, 64]
    assert sizes_of(gemma3_270m(), pool_tokens=4096, window_pool_tokens=1 << 20)[0] == [64, 64]
    assert sizes_of(gemma3_270m(), pool_tokens=64)[0] == [1, 1]


def test_what_windows_spare_holds_more_tokens(monkeypatch):
    """In the same memory, if that is what limits the pool."""
    block_bytes = 64 * 2 * 256 * 2
    memory_bytes = 4 * 512 * 18 * block_bytes  # a quarter of it took 32768 tokens without windows
    monkeypatch.setattr("prefixstore.pool_sizes.physical_memory_bytes", lambda: memory_bytes)
    sizes, num_bytes = sizes_of(gemma3_270m())
    assert sizes == [2048, 204] or sum(num_bytes) <= memory_bytes // 4
    assert sizes[0] > 2.5 * 512
    one_more = (sizes[0] + 1) * 3 + (sizes[1] + 1) * 15
    assert one_more * block_bytes > memory_bytes // 4
    monkeypatch.setattr("prefixstore.pool_sizes.physical_memory_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match="pool_tokens: expected room for one block of"):
        sizes_of(gemma3_270m())


def test_refuses_a_pool_that_no_sequence_fits_in():
    least = least_window_blocks(64, 512)
    sizes_of(gemma3_270m(), pool_tokens=32768, window_pool_tokens=least * 64)
    message = r"window_pool_tokens: expected at least 1152 \(two windows of 512 .* got 1088"
    with pytest.raises(ConfigError, match=message):
        sizes_of(gemma3_270m(), pool_tokens=32768, window_pool_tokens=(least - 1) * 64)
    with pytest.raises(ConfigError, match="window_pool_tokens: expected at least one block of 64"):
        CacheConfig(window_pool_tokens=63)
    with pytest.raises(ConfigError, match="window_pool_tokens: expected an integer"):
        CacheConfig(window_pool_tokens=64.5)
    with pytest.raises(ConfigError, match=r"at least 192 .* max_batch_tokens of 64, .* got 176"):
        Engine.open(
            tiny_gemma3(),
            Numbers(),
            block_size=16,
            pool_tokens=2048,
            window_pool_tokens=176,
            max_batch_tokens=64,
            tiers=(),
        )


def test_models_without_windows_have_one_size():
    assert sizes_of(tiny_llama().config, pool_tokens=1024, window_pool_tokens=64)[0] == [16]


def test_only_layers_that_see_all_bound_the_length_of_a_sequence(model):
    settings = {"block_size": BLOCK_SIZE, "pool_tokens": 512, "memory_bytes": 0}
    with Engine.open(model, Numbers(), max_batch_tokens=64, **settings) as engine:
        has_full = any(window is None for window in engine.cache.blocks.device.windows)
        assert engine.max_model_len == (512 if has_full else 2048)


# ---- sessions --------------------------------------------------------------------------------


@pytest.mark.parametrize("window_blocks", [8, 20])
@pytest.mark.parametrize("length", [10, 70, 128, 333, 700])
def test_a_session_answers_as_the_model_alone(model, window_blocks, length):
    tokens = random_tokens(length)
    plain = generate(model, tokens, num_new=50)
    with open_cache(model, window_blocks) as cache:
        cold, _ = run(cache, model, tokens, num_new=50)
        warm, report = run(cache, model, tokens, num_new=50)
    assert cold == warm == plain
    assert report.num_reused in ((length - 1) // BLOCK_SIZE * BLOCK_SIZE, 0)
    assert report.num_reused > 0 or length in (10, 128)


def test_a_long_pass_goes_on_from_what_is_cached(model):
    """The window before it is copied from the pool, including a partly used block."""
    first = random_tokens(75)
    longer = torch.cat([first, random_tokens(500, seed=2)], 1)
    plain = model(longer, use_cache=False).logits[0, -1]
    with open_cache(model, 8) as cache, torch.no_grad():
        for steps in ([75, 500], [70, 5, 400, 100], [575]):
            with cache.session(longer) as session:
                assert session.report.num_reused in (0, 560)
                at = session.num_tokens
                for step in steps if at == 0 else [15]:
                    got = model(longer[:, at : at + step], past_key_values=session).logits[0, -1]
                    at += step
            torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
            if steps != [575]:
                cache.evict_pool()


def test_a_long_pass_that_failed_is_made_again(model):
    tokens = random_tokens(400)
    plain = generate(model, tokens)

    def fail():
        raise KeyboardInterrupt

    with open_cache(model, 8) as cache, cache.session(tokens) as session, torch.no_grad():
        behind_attention = model.model.layers[1].mlp
        with calling_first(behind_attention, fail), pytest.raises(KeyboardInterrupt):
            model(tokens, past_key_values=session)
        model(tokens[:, :30], past_key_values=session)  # a shorter pass, for which there is room
        assert generate(model, tokens, session) == plain


def test_sessions_hold_windows_and_not_what_these_have_passed(model):
    with open_cache(model, 32) as cache:
        sliding = len(cache.stats().pools) - 1
        with contextlib.ExitStack() as stack:
            for seed in range(3):
                tokens = random_tokens(300, seed)
                session = stack.enter_context(cache.session(tokens))
                assert generate(model, tokens, session, 60) == generate(model, tokens, None, 60)
                held = [one for one in session.block_ids(sliding, 0) if one >= 0]
                assert len(held) <= 7  # generated tokens may be taken back, so one block more stays
            cache.evict_pool()
            cache.blocks.device._give_up(sliding, 20)
            assert cache.stats().pools[sliding].num_free >= 32 - 3 * 7


def test_takes_back_as_many_tokens_as_the_last_pass_had(model):
    tokens, other = random_tokens(200), random_tokens(40, seed=5)
    with open_cache(model, 20) as cache, cache.session(tokens) as session, torch.no_grad():
        model(tokens, past_key_values=session)
        model(tokens[:, :40], past_key_values=session)
        session.crop(-40)
        got = model(other, past_key_values=session).logits[0, -1]
        want = model(torch.cat([tokens, other], 1), use_cache=False).logits[0, -1]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_sessions_in_several_threads_share_few_windows(model):
    shared = random_tokens(80, seed=0)
    prompts = [torch.cat([shared, random_tokens(200, seed=seed)], 1) for seed in range(1, 6)]
    plain = [generate(model, tokens) for tokens in prompts]
    outputs = [None] * len(prompts)
    with open_cache(model, 60) as cache:

        def work(number):
            outputs[number] = run(cache, model, prompts[number])[0]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outputs == plain


def test_the_ends_of_many_prompts_stay_cached():
    """The pool keeps the last windows of eight prompts, though not a quarter of their tokens."""
    model = tiny_gemma3()
    prompts = [random_tokens(230, seed=seed) for seed in range(8)]
    with open_cache(model, 40) as cache:
        plain = [run(cache, model, tokens)[0] for tokens in prompts]
        assert cache.stats().evicted_blocks == 0
        for tokens, expected_answer in zip(prompts, plain, strict=True):
            out, report = run(cache, model, tokens)
            assert out == expected_answer
            assert report.tokens_by_tier == {"device": 224}


def test_a_long_pass_learns_where_prompts_part():
    """The first prompt finds nothing, the second learns the branch, the third finds its window."""
    model = tiny_gemma3()
    shared = random_tokens(300, seed=1)
    prompts = [torch.cat([shared, random_tokens(200, seed=seed)], 1) for seed in range(2, 5)]
    with open_cache(model, 20) as cache:
        reused = []
        for tokens in prompts:
            out, report = run(cache, model, tokens)
            assert out == generate(model, tokens)
            reused.append(report.num_reused)
    assert reused == [0, 0, 288]


def test_a_window_that_was_given_up_comes_back_from_a_tier():
    """Blocks that the full layers kept are not loaded again."""
    model = tiny_gemma3()
    tokens = random_tokens(230)
    with open_cache(model, 12, memory_bytes=1 << 24) as cache:
        cold, _ = run(cache, model, tokens)
        assert cache.flush()
        device = cache.blocks.device
        assert device._give_up(1, 99)
        assert device.num_cached(random_tokens(230)[0, :224].cpu().numpy(), "") == 0
        warm, report = run(cache, model, tokens)
    assert warm == cold
    assert report.tokens_by_tier == {"device": 176, "memory": 48}


# ---- engines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tiers", [(), ("memory://64MiB",)], ids=["no_tier", "memory"])
def test_an_engine_answers_many_at_once_as_the_model_alone(model, tiers):
    shared = prompt(150, seed=99)
    prompts = [prompt(length, seed) for seed, length in enumerate((400, 90, 31, 700, 5, 260))]
    prompts += [shared + prompt(60 + 20 * seed, 30 + seed) for seed in range(6)]
    settings = {"window_pool_tokens": 32 * BLOCK_SIZE, "pool_tokens": 4096, "max_batch_tokens": 64}
    with open_engine(model, tiers=tiers, **settings) as engine:
        for _ in range(3):
            outputs = engine.generate(prompts, GREEDY)
            for tokens, output in zip(prompts, outputs, strict=True):
                assert list(output.token_ids) == expected(model, tokens)
        stats = engine.stats()
        assert stats.num_preemptions == 0
        assert stats.cache.index.stripped_blocks > 0
        assert stats.hit_tokens["device"] > 0
        check_empty(engine.cache)


def test_an_engine_runs_a_sequence_of_any_length_in_the_least_pool(model):
    least = least_window_blocks(BLOCK_SIZE, WINDOW, 64)
    settings = {"window_pool_tokens": least * BLOCK_SIZE, "max_batch_tokens": 64, "tiers": ()}
    tokens = prompt(1500)
    with open_engine(model, **settings) as engine:
        for _ in range(2):
            output = answer(engine, tokens, SamplingParams(max_tokens=100, temperature=0))
        assert list(output.token_ids) == expected(model, tokens, 100)
        assert output.report.reuse.num_reused > 0
        assert engine.stats().num_preemptions == 0


def test_answers_that_grow_together_are_not_preempted(model):
    """Only as many run as have room for their windows to the end; the others wait."""
    sampling = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    settings = {"window_pool_tokens": 20 * BLOCK_SIZE, "max_batch_tokens": 64, "tiers": ()}
    prompts = [prompt(10 + seed, seed) for seed in range(10)]
    with open_engine(model, **settings) as engine:
        outputs = engine.generate(prompts, sampling)
        assert engine.stats().num_preemptions == 0
        assert engine.stats().num_steps < 10 * 100
    for tokens, output in zip(prompts, outputs, strict=True):
        assert list(output.token_ids) == expected(model, tokens, 100)
