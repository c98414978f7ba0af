"""Prompts that are slow to tokenize delay no other request, and only a bounded number waits."""

import logging
import threading

import pytest
from chat_model import chat_tokenizer
from scripted_engine import ScriptedEngine
from serving import (
    CHAT,
    MODEL,
    PATHS,
    TEXT,
    in_thread,
    read_all,
    request_bytes,
    serving,
    wait_until,
)

from prefixstore.server import run

CONTEXT = 512
HELD = {**TEXT, "prompt": "held"}


class HeldTokenizer:
    """Tokenizes like `tokenizer`, but waits for `go_on` with the text "held"."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.go_on = threading.Event()
        self.texts = []

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __len__(self):
        return len(self._tokenizer)

    def __call__(self, text, **options):
        self.texts.append(text)
        if text == "held":
            assert self.go_on.wait(30)
        return self._tokenizer(text, **options)


@pytest.fixture
def tokenizer():
    made = HeldTokenizer(chat_tokenizer())
    yield made
    made.go_on.set()


@pytest.fixture
def engine(tokenizer):
    engine = ScriptedEngine(
        tokenizer, is_endless=True, step_s=0.01, max_model_len=CONTEXT, max_running=4, max_queued=0
    )
    yield engine
    tokenizer.go_on.set()
    engine.close()


@pytest.fixture
def server(engine):
    with serving(engine) as running:
        yield running


def post_held(server, tokenizer, number=1, **options):
    """Post the slow prompt `number` times; its answers come once it may go on."""
    threads = [in_thread(lambda: server.post(PATHS[1], HELD, **options)) for _ in range(number)]
    wait_until(lambda: "held" in tokenizer.texts)
    return threads


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_ends_while_another_prompt_is_read(server, engine, tokenizer, stream):
    body = {**CHAT, "max_tokens": 100, "stream": stream}
    answering, answers = in_thread(lambda: server.post(PATHS[0], body))
    wait_until(lambda: engine.asked)
    [(reading, held)] = post_held(server, tokenizer)
    assert engine.running
    answering.join(20)
    assert answers and answers[0].status_code == 200
    assert not held
    tokenizer.go_on.set()
    reading.join()
    assert held[0].status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_of_a_client_that_goes_before_its_turn_nothing_is_read(
    server, engine, tokenizer, path, caplog
):
    caplog.set_level(logging.INFO, "prefixstore.server")
    [(reading, _)] = post_held(server, tokenizer)
    body = {PATHS[0]: CHAT, PATHS[1]: {**TEXT, "prompt": "Nobody waits"}}[path]
    with server.connect() as connection:
        connection.sendall(request_bytes(path, body))
    wait_until(
        lambda: any(getattr(one, "fields", {}).get("status") == 499 for one in caplog.records)
    )
    tokenizer.go_on.set()
    reading.join()
    server.assert_answers()
    assert len(engine.asked) == 2
    assert not [text for text in tokenizer.texts if "Nobody" in text or "Hello" in text]


def test_no_more_prompts_wait_than_the_engine_would_take(server, tokenizer):
    threads = post_held(server, tokenizer, 5)
    wait_until(lambda: any(answers for _, answers in threads))
    tokenizer.go_on.set()
    for thread, _ in threads:
        thread.join()
    *taken, refused = sorted(
        (answers[0] for _, answers in threads), key=lambda one: one.status_code
    )
    assert [one.status_code for one in taken] == [200] * 4
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert "4 requests that wait to be read" in refused.json()["error"]["message"]
    assert "\nkvkernels_requests_refused_total 1.0\n" in server.get("/metrics").text


@pytest.mark.parametrize("path", PATHS)
def test_a_tenant_that_asks_much_delays_no_other(engine, tokenizer, path, tmp_path):
    """The other one gets a place that was taken, and its turn."""
    key_file = tmp_path / "keys.toml"
    keys = {tenant: f"kvk-of-{tenant}-0123456789" for tenant in ("many", "few")}
    key_file.write_text(
        "".join(f'[[keys]]\ntenant = "{tenant}"\nkey = "{key}"\n' for tenant, key in keys.items())
    )
    key_file.chmod(0o600)
    headers = {tenant: {"authorization": f"Bearer {key}"} for tenant, key in keys.items()}
    with serving(engine, api_keys_file=str(key_file)) as server:
        threads = post_held(server, tokenizer, 5, headers=headers["many"])
        wait_until(lambda: any(answers for _, answers in threads))
        body = {**{PATHS[0]: CHAT, PATHS[1]: TEXT}[path], "max_tokens": 1}
        asking, few = in_thread(lambda: server.post(path, body, headers=headers["few"]))
        wait_until(lambda: sum(map(len, (answers for _, answers in threads))) == 2)
        tokenizer.go_on.set()
        for thread, _ in [*threads, (asking, few)]:
            thread.join()
    assert few[0].status_code == 200
    statuses = [answers[0].status_code for _, answers in threads]
    assert sorted(statuses) == [200] * 3 + [429] * 2
    assert tokenizer.texts[tokenizer.texts.index("held") + 1] != "held"


@pytest.mark.parametrize("path", PATHS)
def test_a_text_that_is_much_too_long_is_refused_by_its_beginning(server, tokenizer, path):
    text = "So it was. " * 100_000
    body = {
        PATHS[0]: {"model": MODEL, "messages": [{"role": "user", "content": text}]},
        PATHS[1]: {"model": MODEL, "prompt": text},
    }[path]
    answer = server.post(path, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == ("messages" if path == PATHS[0] else "prompt")
    assert f"context of {CONTEXT}, got at least " in error["message"]
    assert max(map(len, tokenizer.texts)) <= 8 * CONTEXT


def test_a_long_text_of_few_tokens_is_taken(server, engine, tokenizer):
    text = " computed" * (CONTEXT - 2)
    assert len(text) > 8 * CONTEXT
    assert server.post(PATHS[1], {**TEXT, "prompt": text}).status_code == 200
    assert len(engine.asked[-1].prompt) == CONTEXT - 2


def test_a_prompt_that_is_read_at_the_end_is_answered(server, tokenizer):
    [(reading, held)] = post_held(server, tokenizer)
    server.begin_ending()
    refused = server.post(PATHS[1], TEXT)
    assert refused.json()["error"]["code"] == "shutting_down"
    tokenizer.go_on.set()
    reading.join()
    assert held[0].status_code == 200


def test_a_prompt_that_is_read_for_too_long_at_the_end_is_told(engine, tokenizer, monkeypatch):
    monkeypatch.setattr(run, "_CUT_OFF_S", 0.1)
    with serving(engine, drain_timeout_s=0.1, write_timeout_s=0.1) as server:
        [(reading, held)] = post_held(server, tokenizer)
        server.begin_ending()
        reading.join(20)
        assert held[0].status_code == 503
        assert held[0].json()["error"]["code"] == "shutting_down"


def test_a_body_that_is_incomplete_at_the_end_is_not_accepted(server):
    content = request_bytes(PATHS[1], TEXT)
    with server.connect() as connection:
        connection.sendall(content[:-1])
        server.begin_ending()
        connection.sendall(content[-1:])
        answer = read_all(connection)
    assert b" 503 " in answer.partition(b"\r\n")[0]
    assert b"shutting_down" in answer
