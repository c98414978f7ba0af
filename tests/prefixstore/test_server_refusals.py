"""Requests that the server refuses whatever their fields say, and the errors."""

import json

import httpx
import pytest
from chat_model import chat_model, chat_tokenizer
from scripted_engine import ScriptedEngine
from serving import CHAT, PATHS, TEXT, serving, wait_until

from prefixstore.engine import Engine, SamplingParams


@pytest.fixture(scope="module")
def engine():
    engine = ScriptedEngine(chat_tokenizer())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, max_body_bytes=100_000) as running:
        yield running


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"{",
            b"nonsense",
            b'"text"',
            b"[]",
            b"5",
            b"null",
            b'{"model": "tiny"',
            b"\xff\xfe",
        ),
        b"[" * 90_000,
        b'{"a":' * 15_000,
        b'{"model": "tiny", "messages": ' + b"[" * 50_000 + b"]" * 49_000 + b"}",
        b'{"model": 1' + b"0" * 9_000 + b"}",
        b'{"model": "\\ud800", "prompt": "a"}',
    ],
    ids=lambda content: content[:20].decode("latin-1"),
)
def test_refuses_what_is_no_such_json(server, path, content):
    headers = {"content-type": "application/json"}
    answer = server.post(path, None, content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    server.assert_answers()


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_takes_only_json(server, kind):
    headers = {} if kind is None else {"content-type": kind}
    answer = server.post(PATHS[0], None, content=json.dumps(CHAT), headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"]["message"].startswith("content-type: expected application/json")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/nothing", 404),
        ("GET", PATHS[0], 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/metrics", 405),
    ],
)
def test_answers_other_paths_in_the_same_form(server, method, path, status):
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_refuses_a_chat_without_a_template():
    tokenizer = chat_tokenizer()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    engine = ScriptedEngine(tokenizer)
    try:
        with serving(engine) as server:
            answer = server.post(PATHS[0], CHAT)
            assert answer.status_code == 400
            assert "use /v1/completions" in answer.json()["error"]["message"]
    finally:
        tokenizer.chat_template = template
        engine.close()


def test_an_overloaded_engine_is_429_and_takes_nothing_of_the_request():
    engine = ScriptedEngine(
        chat_tokenizer(), max_running=1, max_queued=2, step_s=0.01, is_endless=True
    )
    running = engine.submit([5], SamplingParams(max_tokens=10_000))
    with serving(engine, retry_after_s=6.5) as server:
        answer = server.post(PATHS[0], {**CHAT, "n": 3})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "7"
        assert answer.json()["error"]["code"] == "engine_overloaded"
        running.cancel()
        wait_until(lambda: not engine.queued and not engine.running)
        assert len(engine.asked) > 1 and all(handle.is_cancelled for handle in engine.asked)
        server.assert_answers()
    engine.close()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (PATHS[0], {**CHAT, "n": 4}, "n"),
        (PATHS[1], {**TEXT, "prompt": ["one"] * 4}, "prompt"),
    ],
)
def test_refuses_more_answers_than_an_idle_engine_takes_for_good(path, body, param):
    engine = ScriptedEngine(chat_tokenizer(), max_running=1, max_queued=2)
    with serving(engine) as server:
        answer = server.post(path, body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert "expected at most 3 answers, got 4" in answer.json()["error"]["message"]
        assert not engine.asked
    engine.close()


@pytest.mark.parametrize("error_after", [0, 2])
def test_an_engine_that_fails_is_500_and_says_nothing_of_why(error_after):
    engine = ScriptedEngine(chat_tokenizer(), error="disk /secret", error_after=error_after)
    with serving(engine) as server:
        answer = server.post(PATHS[0], CHAT)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        stream = server.post(PATHS[0], {**CHAT, "stream": True})
        last = stream.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
        assert "secret" not in answer.text + stream.text
    engine.close()


def test_an_engine_that_stopped_for_good_is_neither_ready_nor_shutting_down(monkeypatch):
    engine = Engine.open(chat_model(), chat_tokenizer(), block_size=16, pool_tokens=1024)
    with engine, serving(engine) as server:
        server.assert_answers()
        monkeypatch.setattr(engine._loop.scheduler, "next_steps", lambda now: 1 / 0)
        for _ in range(2):  # the first stops it
            answer = server.post(PATHS[0], CHAT)
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "internal_error"
        for path in ("/health", "/health/ready", "/health/live"):
            answer = server.get(path)
            assert answer.status_code == 503 and answer.json() == {"status": "failed"}
