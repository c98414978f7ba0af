"""What an engine's requests report when a pass, a reader or the engine fails."""

import asyncio
import itertools
import threading
import time

import pytest
import torch
from cached_models import BLOCK_SIZE, calling_first
from engines import GREEDY, Numbers, answer, expected, open_engine, prompt

from prefixstore.engine import Engine, FinishReason
from prefixstore.errors import EngineClosed, ModelChanged


def test_a_failing_pass_ends_its_requests_and_no_others(model):
    with open_engine(model) as engine:
        before = answer(engine, prompt(40))

        def fail():
            raise RuntimeError("out of luck")

        with calling_first(model.model, fail):
            broken = answer(engine, prompt(40, seed=3))
        after = answer(engine, prompt(40))
    assert broken.finish_reason == FinishReason.ERROR and "out of luck" in broken.error
    assert after.token_ids == before.token_ids


def test_logits_that_are_no_numbers_end_their_own_request_alone(model):
    with open_engine(model, memory_bytes=0) as engine:
        run = engine._loop.runner.run

        def spoil_last(chunks, *arguments):
            logits = run(chunks, *arguments)
            if len(chunks) == 3 and logits is not None:
                logits = logits.clone()  # others may hold views of a graph's output
                logits[-1, 3] = torch.nan
            return logits

        engine._loop.runner.run = spoil_last
        with engine._loop.changed:  # so that they are admitted together
            handles = [engine.submit(prompt(20, seed), GREEDY) for seed in range(3)]
        *sound, spoiled = [handle.result(60) for handle in handles]
    assert spoiled.finish_reason == FinishReason.ERROR
    assert spoiled.error == "logits: expected a finite largest one, got nan"
    for seed, output in enumerate(sound):
        assert list(output.token_ids) == expected(model, prompt(20, seed))


class Wordless(Numbers):
    """Has no text for what the model says, as one of fewer tokens than the model has."""

    def decode(self, token_ids, **_):
        raise KeyError(token_ids[-1])


def test_a_token_without_text_ends_its_own_request_alone(model, monkeypatch):
    with open_engine(model) as engine:
        with engine._loop.changed:  # so that they are admitted together
            sound = engine.submit(prompt(40), GREEDY)
            monkeypatch.setattr(engine, "tokenizer", Wordless())
            broken = engine.submit(prompt(40, seed=3), GREEDY)
        outputs = [handle.result(60) for handle in (sound, broken)]
    assert list(outputs[0].token_ids) == expected(model, prompt(40))
    assert outputs[1].finish_reason == FinishReason.ERROR
    assert outputs[1].error.startswith("tokenizer: KeyError: ")


def test_a_reader_whose_event_loop_is_closed_stops_nobody(model, monkeypatch):
    """Not even its own request: its answer can still be read elsewhere, whole."""
    with open_engine(model, memory_bytes=0) as engine:  # no look-up delays a request
        run, num_passes, loop_closed = engine._loop.runner.run, itertools.count(), threading.Event()

        def run_when_closed(*arguments):
            assert next(num_passes) == 0 or loop_closed.wait(60)
            return run(*arguments)

        monkeypatch.setattr(engine._loop.runner, "run", run_when_closed)
        with engine._loop.changed:  # so that they are admitted together
            handles = [engine.submit(prompt(20, seed), GREEDY) for seed in range(2)]
        loop, reader = asyncio.new_event_loop(), aiter(handles[0])
        loop.run_until_complete(anext(reader))
        loop.close()
        loop_closed.set()
        for seed, handle in enumerate(handles):
            assert list(handle.result(60).token_ids) == expected(model, prompt(20, seed))


def test_a_fault_of_the_engine_leaves_nobody_waiting(model, monkeypatch):
    with Engine.open(model, Numbers(), block_size=BLOCK_SIZE, pool_tokens=4096) as engine:
        with engine._loop.changed:
            monkeypatch.setattr(engine._loop.scheduler, "next_steps", lambda now: 1 / 0)
            handle = engine.submit(prompt(40), GREEDY)
        output = handle.result(60)
        assert output.finish_reason == FinishReason.ERROR
        assert output.error == "ZeroDivisionError: division by zero"
        with pytest.raises(EngineClosed, match="has failed: ZeroDivisionError"):
            engine.submit(prompt(40))


class Panic(BaseException):
    """As a tokenizer in Rust raises."""


def panic(*_):
    raise Panic("index out of bounds")


def test_a_panic_leaves_nobody_waiting(model, monkeypatch):
    with Engine.open(model, Numbers(), block_size=BLOCK_SIZE, pool_tokens=4096) as engine:
        with engine._loop.changed:
            handles = [engine.submit(prompt(40, seed), GREEDY) for seed in range(2)]
            monkeypatch.setattr(handles[0], "put", panic)
        output = handles[1].result(60)
        assert output.error == "Panic: index out of bounds"
        assert engine.has_failed
        assert engine.drain(60)


def test_a_fault_in_ending_one_answer_leaves_no_other_waiting(model, monkeypatch):
    with Engine.open(model, Numbers(), block_size=BLOCK_SIZE, pool_tokens=4096) as engine:
        with engine._loop.changed:
            monkeypatch.setattr(engine._loop.scheduler, "next_steps", lambda now: 1 / 0)
            handles = [engine.submit(prompt(40, seed), GREEDY) for seed in range(3)]
            monkeypatch.setattr(handles[0], "put", lambda delta: 1 / 0)
        for handle in handles[1:]:
            assert handle.result(60).finish_reason == FinishReason.ERROR
        assert engine.drain(60)


def test_changed_weights_end_the_requests(model):
    with open_engine(model) as engine:
        answer(engine, prompt(40))
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        time.sleep(1.1)
        assert engine.has_changed_model
        with pytest.raises(ModelChanged, match="expected the weights"):
            engine.submit(prompt(40))


def test_a_model_that_cannot_be_compared_ends_its_requests_alone(model, monkeypatch):
    with open_engine(model) as engine:
        before = answer(engine, prompt(40))
        with monkeypatch.context() as patch:
            with engine._loop.changed:
                handle = engine.submit(prompt(40, seed=3), GREEDY)
                patch.setattr(engine.cache.served_model, "check_weights", lambda: {}["training"])
                engine._loop._weights_checked = 0.0
            output = handle.result(60)
        assert output.finish_reason == FinishReason.ERROR
        assert output.error == "model: KeyError: 'training'"
        assert answer(engine, prompt(40)).token_ids == before.token_ids


def test_tells_once_why_a_model_cannot_be_compared(model, monkeypatch, caplog):
    reasons = ["gone", "gone", "gone\nfor good", "gone\nfor good", None, "gone"]

    def check_weights():
        if reasons[0] is not None:
            raise RuntimeError(reasons[0])

    with open_engine(model) as engine:
        monkeypatch.setattr(engine.cache.served_model, "check_weights", check_weights)
        with engine._loop.changed:
            while reasons:
                if reasons[0] is None:
                    engine._loop._check_weights()
                else:
                    with pytest.raises(ValueError, match="model: RuntimeError: gone"):
                        engine._loop._check_weights()
                del reasons[0]
            monkeypatch.undo()
    told = [record for record in caplog.records if record.name == "prefixstore.engine.loop"]
    expected = "the model cannot be compared with what it was: RuntimeError: gone"
    assert [one.getMessage() for one in told] == [expected, f"{expected} for good", expected]
    assert not any(one.exc_info for one in told)
