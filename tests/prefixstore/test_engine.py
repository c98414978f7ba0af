"""The engine: its answers, what it reuses, refuses and releases."""

import asyncio
import threading
import time

import pytest
import torch
from cached_models import BLOCK_SIZE, random_tokens, tiny_gemma3
from engines import GREEDY, Numbers, answer, expected, open_engine, prompt

from kvkernels import PoolFullError
from prefixstore.engine import Engine, EngineConfig, FinishReason, SamplingParams
from prefixstore.engine.sequence import SequenceBlocks
from prefixstore.errors import ConfigError, EngineClosed, EngineOverloaded

pytestmark = pytest.mark.usefixtures("waits_for_look_ups")

LENGTHS = (5, 40, 100, 257, 16, 64, 1, 17)


def test_answers_are_those_of_each_prompt_alone(model):
    prompts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    with open_engine(model) as engine:
        outputs = engine.generate(prompts, GREEDY)
    for tokens, output in zip(prompts, outputs, strict=True):
        assert list(output.token_ids) == expected(model, tokens)
        assert output.finish_reason == FinishReason.LENGTH
        assert output.text == Numbers().decode(output.token_ids)
        assert output.report.reuse.num_prompt_tokens == len(tokens)
        assert output.report.num_output_tokens == 12


def test_reuses_what_was_computed_before_answers_too(model):
    with open_engine(model) as engine:
        first = answer(engine, prompt(100))
        turn = prompt(100) + list(first.token_ids) + prompt(20, seed=1)
        second = answer(engine, turn)
        assert list(second.token_ids) == expected(model, turn)
    assert first.report.reuse.misses == {"new": 96}
    # 111 tokens of the first request were computed: the last one's KV was not needed.
    assert second.report.reuse.tokens_by_tier == {"device": 96}
    assert second.report.reuse.misses == {"new": 32}


def test_requests_that_begin_alike_compute_that_once(model):
    shared = prompt(200, seed=9)
    prompts = [shared + prompt(10, seed=20 + i) for i in range(4)]
    with open_engine(model) as engine:
        outputs = engine.generate(prompts, GREEDY)
        num_computed = engine.stats().computed_tokens
    for tokens, output in zip(prompts, outputs, strict=True):
        assert list(output.token_ids) == expected(model, tokens)
    assert [one.report.reuse.tokens_by_tier.get("device", 0) for one in outputs] == [0, *[192] * 3]
    assert num_computed == 210 + 3 * 18 + 4 * 11


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_restores_from_a_tier_after_a_restart(model, tier, tmp_path):
    settings = {"tiers": [f"disk://{tmp_path}?max_bytes=64MiB"]}
    if tier == "memory":
        settings = {"tiers": ["memory://64MiB"], "pool_tokens": 640}
    tokens = prompt(500)
    with open_engine(model, **settings) as engine:
        answer(engine, tokens)
        assert engine.cache.flush()
        if tier == "memory":
            answer(engine, prompt(600, seed=1))  # fills the whole pool
            output = answer(engine, tokens)
    if tier == "disk":
        with open_engine(model, **settings) as engine:
            output = answer(engine, tokens)
    assert list(output.token_ids) == expected(model, tokens)
    reuse = output.report.reuse
    assert (
        reuse.tokens_by_tier.get(tier, 0)
        + sum(reuse.misses.values())
        + reuse.tokens_by_tier.get("device", 0)
        == 496
    )


def test_streams_pieces_as_they_come_to_threads_and_event_loops(model):
    tokens = prompt(30)

    async def read(handle):
        return [delta async for delta in handle]

    with open_engine(model) as engine:
        handle = engine.submit(tokens, GREEDY)
        pieces = list(handle)
        again = asyncio.run(read(handle))
        fresh = asyncio.run(read(engine.submit(tokens, GREEDY)))
    for deltas in (pieces, again, fresh):
        assert [one for delta in deltas for one in delta.token_ids] == expected(model, tokens)
        assert all(delta.finish_reason is None for delta in deltas[:-1])
        assert deltas[-1].finish_reason == FinishReason.LENGTH and deltas[-1].report is not None
    assert len(again) == 1  # the whole prefix was there


def test_ends_at_stop_strings_and_stop_tokens(model):
    tokens = prompt(30)
    usual = expected(model, tokens)
    with open_engine(model) as engine:
        stop = f" {usual[4]}"
        at = next(i for i, one in enumerate(usual) if str(one).startswith(str(usual[4])))
        by_text = answer(engine, tokens, SamplingParams(max_tokens=12, temperature=0, stop=[stop]))
        by_token = answer(
            engine, tokens, SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[usual[4]])
        )
    assert by_text.finish_reason == by_token.finish_reason == FinishReason.STOP
    assert by_text.text == Numbers().decode(usual[:at])
    assert list(by_token.token_ids) == usual[: usual.index(usual[4]) + 1]
    assert by_token.text == Numbers().decode(usual[: usual.index(usual[4])])


def test_a_seed_gives_the_same_answer_alone_and_beside_others(model):
    sampling = SamplingParams(max_tokens=12, temperature=1.5, top_p=0.95, seed=7)
    with open_engine(model) as engine:
        alone = answer(engine, prompt(33), sampling)
        others = [engine.submit(prompt(20 + i, seed=i), GREEDY) for i in range(5)]
        beside = answer(engine, prompt(33), sampling)
        another = answer(engine, prompt(33), SamplingParams(max_tokens=12, temperature=1.5, seed=8))
        for handle in others:
            handle.result(60)
    assert alone.token_ids == beside.token_ids != another.token_ids


def test_a_pool_too_small_for_all_preempts_and_goes_on(model):
    prompts = [prompt(60, seed=i) for i in range(6)]
    sampling = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
    with open_engine(model, pool_tokens=320, max_running=6) as engine:
        outputs = engine.generate(prompts, sampling)
        assert engine.stats().num_preemptions > 0
    for tokens, output in zip(prompts, outputs, strict=True):
        assert list(output.token_ids) == expected(model, tokens, 80)
    preempted = [one.report for one in outputs if one.report.num_preemptions]
    assert preempted and all(report.times.preempted_s > 0 for report in preempted)


def test_goes_on_when_others_than_requests_give_blocks_back():
    torch.manual_seed(1)
    model = tiny_gemma3()
    with open_engine(model) as engine:
        device = engine.cache.blocks.device
        # A sliding group's blocks are not set aside: the request is admitted and finds none.
        sliding = next(n for n, window in enumerate(device.windows) if window is not None)
        allocator = device.groups[sliding].allocator
        held = allocator.allocate(allocator.num_free - 1)
        handle = engine.submit(prompt(100), GREEDY)
        while not engine.stats().num_preemptions:
            time.sleep(0.01)
        allocator.release(held)
        output = handle.result(20)
    assert list(output.token_ids) == expected(model, prompt(100))


def test_a_cancelled_request_ends_wherever_it_is(model):
    long = SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True)
    with open_engine(model, max_running=1) as engine:
        running, queued = engine.submit(prompt(40), long), engine.submit(prompt(50, 1), long)
        next(iter(running))
        queued.cancel()
        assert queued.result(60).finish_reason == FinishReason.CANCELLED
        running.cancel()
        ended = running.result(60)
        assert ended.finish_reason == FinishReason.CANCELLED and ended.token_ids
        running.cancel()  # no effect
        assert answer(engine, prompt(40)).token_ids


def test_to_cancel_a_finished_request_does_nothing_to_the_next_of_its_id(model):
    with open_engine(model) as engine:
        first = engine.submit(prompt(40), GREEDY, request_id="a")
        first.result(60)
        with engine._loop.changed:  # so that the next is queued when the first is cancelled
            following = engine.submit(prompt(40), GREEDY, request_id="a")
            first.cancel()
        assert following.result(60).finish_reason == FinishReason.LENGTH


def test_a_cancel_that_comes_with_the_last_token_is_forgotten(model, monkeypatch):
    with open_engine(model) as engine:
        run, end, handles = engine._loop.runner.run, engine._loop.roster.end, []

        def cancel_and_run(*arguments):
            if len(handles) == 1:
                handles[0].cancel()
            return run(*arguments)

        def end_and_submit(*arguments):
            end(*arguments)
            if len(handles) == 1:
                handles.append(engine.submit(prompt(40), GREEDY, request_id="a"))

        monkeypatch.setattr(engine._loop.runner, "run", cancel_and_run)
        monkeypatch.setattr(engine._loop.roster, "end", end_and_submit)
        with engine._loop.changed:
            once = SamplingParams(max_tokens=1, ignore_eos=True)
            handles.append(engine.submit(prompt(40), once, request_id="a"))
        assert handles[0].result(60).finish_reason == FinishReason.LENGTH
        assert engine.drain(60)
        assert handles[1].result(60).finish_reason == FinishReason.LENGTH


def test_tenants_are_served_in_turn(model):
    order = [("busy", f"b{number}") for number in range(6)] + [("calm", "calm")]
    with open_engine(model, max_running=1) as engine:
        handles = [
            engine.submit(prompt(40, seed), GREEDY, tenant=tenant, request_id=name)
            for seed, (tenant, name) in enumerate(order)
        ]
        for handle in handles:
            handle.result(60)
        done = [report.request_id for report in engine.recent()]
    assert done.index("calm") <= 2


def test_overload_is_answered_at_once(model):
    long = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    with open_engine(model, max_running=1, max_queued=2) as engine:
        handles = [engine.submit(prompt(40, i), long) for i in range(3)]
        with pytest.raises(EngineOverloaded, match="expected at most 2 waiting"):
            for i in range(2):
                engine.submit(prompt(40, 5 + i), long)
        assert engine.stats().num_refused >= 1
        for handle in handles:
            handle.cancel()


def test_generates_more_answers_than_may_wait(model):
    prompts = [prompt(40, seed) for seed in range(12)]
    with open_engine(model, max_running=2, max_queued=1) as engine:
        outputs = engine.generate(prompts, GREEDY)
        assert engine.stats().num_refused == 0
    answers = [list(output.token_ids) for output in outputs]
    assert answers == [expected(model, tokens) for tokens in prompts]


def test_generates_beside_others_that_take_the_room(model, monkeypatch):
    """Another request comes between any two steps of those that `generate` submits."""
    prompts, others = [prompt(40, seed) for seed in range(6)], []
    with open_engine(model, max_running=1, max_queued=1) as engine:
        make_request = engine._request

        def after_another(*arguments, **options):
            made = make_request(*arguments, **options)
            if len(others) < len(prompts):
                request = make_request(prompt(40, 20 + len(others)), GREEDY)
                with engine._loop.changed:
                    if engine._loop.roster.has_room:
                        engine._loop.roster.accept(request)
                        others.append(request.answer.handle)
            return made

        monkeypatch.setattr(engine, "_request", after_another)
        outputs = engine.generate(prompts, GREEDY)
        for handle in others:
            handle.result(60)
    answers = [list(output.token_ids) for output in outputs]
    assert others and answers == [expected(model, tokens) for tokens in prompts]


def test_generates_nothing_if_a_prompt_is_refused(model):
    long = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    with open_engine(model) as engine:
        with pytest.raises(ValueError, match="expected at least one token"):
            engine.generate([prompt(40, 1), prompt(40, 2), []], long)
        assert engine.drain(60)
        assert engine.stats().num_finished == {"cancelled": 2}
        with pytest.raises(EngineClosed):
            engine.submit([])


def test_who_has_a_free_place_does_not_count_as_waiting(model):
    """However late the engine's thread wakes up: here it waits for the lock throughout."""
    with open_engine(model, max_running=2, max_queued=1) as engine:
        with engine._loop.changed:
            handles = [engine.submit(prompt(40, i), GREEDY) for i in range(3)]
            with pytest.raises(EngineOverloaded, match="expected at most 1 waiting"):
                engine.submit(prompt(40, 4), GREEDY)
        assert engine.stats().num_refused == 1
        for handle in handles:
            handle.result(60)


def test_salts_share_nothing(model):
    with open_engine(model) as engine:
        answer(engine, prompt(100), salt="a")
        other = answer(engine, prompt(100), salt="b")
        same = answer(engine, prompt(100), salt="a")
    assert other.report.reuse.tokens_by_tier == {}
    assert same.report.reuse.tokens_by_tier == {"device": 96}


def test_with_reuse_off_everything_is_computed(model):
    with open_engine(model, reuses_prefixes=False, memory_bytes=0) as engine:
        for _ in range(2):
            output = answer(engine, prompt(100))
            assert output.report.reuse.tokens_by_tier == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "token_ids: expected at least one token"),
        (([1, 97],), "prompt: expected token ids below 97, got 97"),
        (([[1, 2], [3, 4]],), "expected one sequence"),
        (([1] * 2048,), r"prompt: expected fewer than 2048 tokens \(max_model_len\), got 2048"),
        ((["a"],), "expected integers"),
        (("a\ud83d",), r"prompt: expected whole characters, .* U\+D83D, at 1"),
    ],
)
def test_refuses_prompts_that_cannot_be_served(model, arguments, message):
    with open_engine(model) as engine, pytest.raises(ValueError, match=message):
        engine.submit(*arguments)


def test_refuses_a_salt_that_no_digest_can_be_made_of(model):
    with open_engine(model) as engine:
        with pytest.raises(ValueError, match="salt: expected whole characters"):
            engine.submit(prompt(40), salt="a\ud83d")
        assert answer(engine, prompt(40)).token_ids


def test_refuses_after_drain_and_ends_what_runs_at_close(model):
    long = SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True)
    with Engine.open(model, Numbers(), block_size=BLOCK_SIZE, pool_tokens=4096) as engine:
        handle = engine.submit(prompt(40), long)
        assert not engine.drain(0.01)
        with pytest.raises(EngineClosed):
            engine.submit(prompt(40))
    assert handle.result(60).finish_reason == FinishReason.CANCELLED
    engine.close()


def test_making_room_for_one_prompt_may_preempt_another(model, monkeypatch):
    with open_engine(model, max_running=4) as engine:
        scheduler, has_failed = engine._loop.scheduler, threading.Event()
        grow = SequenceBlocks.grow

        def grow_once_in_vain(sequence, start, stop):
            if len(scheduler.running) == 3 and start == 0 and not has_failed.is_set():
                has_failed.set()
                raise PoolFullError("num_blocks: expected none, got one")
            grow(sequence, start, stop)

        monkeypatch.setattr(SequenceBlocks, "grow", grow_once_in_vain)
        prompts = [prompt(10, seed) for seed in range(3)]
        with engine._loop.changed:  # so that they are admitted together
            handles = [engine.submit(tokens, GREEDY) for tokens in prompts]
        outputs = [handle.result(60) for handle in handles]
        assert has_failed.is_set() and engine.stats().num_preemptions == 1
    for tokens, output in zip(prompts, outputs, strict=True):
        assert list(output.token_ids) == expected(model, tokens)


def test_holds_no_more_of_a_sliding_window_than_it_needs():
    torch.manual_seed(1)
    model = tiny_gemma3()
    held = []
    with open_engine(model, max_batch_tokens=32) as engine:
        handle = engine.submit(
            random_tokens(800)[0].tolist(), SamplingParams(max_tokens=50, temperature=0)
        )
        for _ in handle:
            with engine._loop.changed:
                running = engine._loop.scheduler.running
                held += [(request.sequence.tables[1] >= 0).sum() for request in running]
    window_blocks = -(-40 // BLOCK_SIZE)
    assert held and max(held) <= window_blocks + 32 // BLOCK_SIZE + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_running": 0}, "max_running: expected a positive integer, got 0"),
        ({"max_batch_tokens": 4}, "max_batch_tokens: expected one for each running"),
        ({"max_queued": -1}, "max_queued: expected 0 or more"),
        ({"max_queued": True}, "max_queued: expected 0 or more"),
        ({"audit_seed": "1"}, "audit_seed: expected an integer or None, got '1'"),
        ({"reuses_prefixes": "false"}, "reuses_prefixes: expected a boolean, got 'false'"),
        ({"fuses_layers": 0}, "fuses_layers: expected a boolean, got 0"),
        ({"cuda_graphs": None}, "cuda_graphs: expected a boolean, got None"),
        ({"batch_invariant": "no"}, "batch_invariant: expected a boolean, got 'no'"),
    ],
)
def test_refuses_bounds_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_refuses_more_tokens_than_the_model_or_the_pool_has(model):
    with pytest.raises(ConfigError, match="max_model_len: expected at most 2048"):
        Engine.open(model, Numbers(), block_size=BLOCK_SIZE, pool_tokens=4096, max_model_len=4096)
    with pytest.raises(ConfigError, match="nobody"):
        Engine.open(model, Numbers(), nobody=1)
