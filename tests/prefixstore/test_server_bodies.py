"""Large bodies: refused at the first error, and parsed outside the event loop."""

import asyncio
import json
import threading

import pytest
from chat_model import chat_tokenizer
from fastapi.testclient import TestClient
from pydantic import ValidationError
from scripted_engine import ScriptedEngine
from serving import CHAT, PATHS, TEXT, serving

from prefixstore.server.app import create_app
from prefixstore.server.bodies import read_body
from prefixstore.server.errors import ApiError
from prefixstore.server.schema import MAX_MESSAGES, ChatRequest, CompletionRequest
from prefixstore.server.worker import Worker

MANY = {f"x{number}": 0 for number in range(1000)}
MESSAGE = CHAT["messages"][0]
CALLS = {"role": "assistant", "tool_calls": [0] * 1000}


@pytest.mark.parametrize(
    ("kind", "body", "place"),
    [
        (ChatRequest, {**CHAT, "messages": [0] * 1000}, ("messages", 0)),
        (ChatRequest, {**CHAT, "messages": [{}] * 1000}, ("messages", 0, "role")),
        (ChatRequest, {**CHAT, "messages": [MESSAGE] * (MAX_MESSAGES + 1)}, ("messages",)),
        (ChatRequest, {**CHAT, "messages": [{**MESSAGE, **MANY}]}, ("messages", 0, "x0")),
        (ChatRequest, {**CHAT, "messages": [CALLS]}, ("messages", 0, "tool_calls", 0)),
        (ChatRequest, {**CHAT, **MANY}, ("x0",)),
        (ChatRequest, {**CHAT, "metadata": MANY}, ("metadata", "x0")),
        (ChatRequest, {**CHAT, "stream": True, "stream_options": MANY}, ("stream_options", "x0")),
        (CompletionRequest, {**TEXT, **MANY}, ("x0",)),
        (CompletionRequest, {**TEXT, "stop": [0] * 1000}, ("stop",)),
    ],
    ids=lambda value: json.dumps(value, default=str)[-40:],
)
def test_stops_at_the_first_of_many_errors(kind, body, place):
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert [error["loc"] for error in refused.value.errors()] == [place]


@pytest.fixture(scope="module")
def engine():
    engine = ScriptedEngine(chat_tokenizer(), max_model_len=1 << 20)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine) as running:
        yield running


def test_takes_as_many_messages_as_it_may(server):
    body = {**CHAT, "messages": [MESSAGE] * MAX_MESSAGES, "max_tokens": 1}
    assert server.post(PATHS[0], body).status_code == 200


@pytest.mark.parametrize("field", [{}, {"metadata": None}], ids=["body", "metadata"])
@pytest.mark.parametrize("name", ["x" * 100_000, "\ud800"], ids=["long", "half a character"])
def test_shows_no_more_of_a_made_up_name_than_can_be_read(server, field, name):
    wrong = {"metadata": {name: 5}} if field else {name: 5}
    content = json.dumps({**CHAT, **wrong})
    headers = {"content-type": "application/json"}
    answer = server.post(PATHS[0], None, content=content, headers=headers)
    assert answer.status_code == 400
    assert len(answer.content) < 500


def test_only_a_large_body_waits_for_the_thread():
    async def read_both():
        worker, is_over = Worker("test", max_waiting=3, retry_after_s=7), threading.Event()
        blocking = asyncio.create_task(worker.run("a", 1, is_over.wait))
        small = await read_body(ChatRequest, json.dumps(CHAT).encode(), worker, "a")
        content = json.dumps({**CHAT, "messages": [MESSAGE] * 1000}).encode()
        reading = [
            asyncio.create_task(read_body(ChatRequest, content, worker, "a")) for _ in range(2)
        ]
        done, _ = await asyncio.wait([blocking, *reading], timeout=0.1)
        with pytest.raises(ApiError) as refused:
            await read_body(ChatRequest, content, worker, "a")
        is_over.set()
        return small, done, refused.value, await reading[0]

    small, done, refused, large = asyncio.run(read_both())
    assert (len(small.messages), len(large.messages)) == (1, 1000)
    assert not done
    assert (refused.status, refused.headers) == (429, {"retry-after": "7"})


def test_its_description_says_what_a_body_is(engine):
    description = TestClient(create_app(engine), base_url="http://localhost").get("/openapi.json")
    document = description.json()
    for path in PATHS:
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert {"model", "max_tokens"} <= set(body["schema"]["properties"])
    place = document["paths"][PATHS[0]]["post"]["requestBody"]["content"]["application/json"]
    reference = place["schema"]["properties"]["messages"]["items"]["$ref"]
    found = document
    for part in reference.removeprefix("#/").split("/"):
        found = found[part.replace("~1", "/")]
    assert "role" in found["properties"]
