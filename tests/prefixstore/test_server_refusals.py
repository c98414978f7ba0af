"""What the server refuses, and how it says so."""

import json
from hashlib import sha256

import httpx
import pytest
from chat_model import chat_tokenizer
from scripted_engine import ScriptedEngine
from serving import MODEL, serving, wait_until

from prefixstore.errors import ConfigError
from prefixstore.server.keys import ApiKeys

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"model": MODEL, "prompt": "Hello"}
BOTH = ("/v1/chat/completions", "/v1/completions")


@pytest.fixture(scope="module")
def engine():
    engine = ScriptedEngine(chat_tokenizer())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, max_body_bytes=100_000, max_choices=8, max_tokens=300) as running:
        yield running


def message(**fields):
    return {"messages": [{"role": "user", "content": "Hello", **fields}]}


# A field with a wrong value, and the name the error has to give; the fields of both endpoints...
WRONG_OF_BOTH = [
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"model": ""}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 301}, "max_tokens"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_p": "half"}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": "2"}, "n"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 1 << 63}, "seed"),
    ({"seed": "5"}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x", ""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stream": "true"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"user": 5}, "user"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": 1}, "presence_penalty"),
    ({"tempertaure": 1}, "tempertaure"),
]
# ... of chats ...
WRONG_OF_CHAT = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": {"role": "user", "content": "Hello"}}, "messages"),
    ({"messages": ["Hello"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
    (message(role="wizard"), "messages[0].role"),
    (message(role=5), "messages[0].role"),
    (message(role="tool"), "messages"),  # the template's own refusal
    (message(content=5), "messages[0].content"),
    (message(content={"text": "Hello"}), "messages[0].content"),
    (message(content=["Hello"]), "messages[0].content"),
    (message(content=[{"type": "text"}]), "messages[0].content"),
    (message(content=[{"type": "text", "text": 5}]), "messages[0].content"),
    (message(content=[{"type": "image_url", "image_url": {}}]), "messages[0].content"),
    (message(mood="good"), "messages[0].mood"),
    (message(tool_calls="none"), "messages[0].tool_calls"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 301}, "max_completion_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    *(({"logprobs": value}, "logprobs") for value in (0, 1, 1.0, "true", [True], {})),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
    *(
        ({"logprobs": True, "top_logprobs": value}, "top_logprobs")
        for value in (-1, 21, 1 << 70, 1.5, True, "5", [5], float("nan"))
    ),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {}}, "audio"),
    ({"store": True}, "store"),
    ({"metadata": {"a": 5}}, "metadata.a"),
    ({"prompt": "Hello"}, "prompt"),
    (message(content="Hello " * 1000), "messages"),  # longer than the context
]
# ... and of completions.
WRONG_OF_TEXT = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1, [2]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a"] * 9}, "prompt"),
    ({"prompt": [5] * 512}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1 << 40]}, "prompt"),
    ({"prompt": [1 << 70]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    *(
        ({"logprobs": value}, "logprobs")
        for value in (-1, 21, 1 << 70, 1.5, True, False, "5", [5], float("nan"))
    ),
    ({"logprobs": 0, "echo": True}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"echo": "yes"}, "echo"),
    ({"messages": []}, "messages"),
]
CASES = [(BOTH[0], CHAT, *case) for case in WRONG_OF_BOTH + WRONG_OF_CHAT]
CASES += [(BOTH[1], TEXT, *case) for case in WRONG_OF_BOTH + WRONG_OF_TEXT]


@pytest.mark.parametrize(
    ("path", "body", "wrong", "param"), CASES, ids=lambda value: json.dumps(value)[:60]
)
def test_names_the_wrong_field(server, engine, path, body, wrong, param):
    num_asked = len(engine.asked)
    content = json.dumps({**body, **wrong})
    headers = {"content-type": "application/json"}
    answer = server.post(path, None, content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert error["type"] == "invalid_request_error"
    assert len(engine.asked) == num_asked


@pytest.mark.parametrize("path", BOTH)
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
    answer = server.post(BOTH[0], None, content=json.dumps(CHAT), headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"]["message"].startswith("content-type: expected application/json")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/nothing", 404),
        ("GET", BOTH[0], 405),
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
            answer = server.post(BOTH[0], CHAT)
            assert answer.status_code == 400
            assert "use /v1/completions" in answer.json()["error"]["message"]
    finally:
        tokenizer.chat_template = template
        engine.close()


def test_an_overloaded_engine_is_429_and_takes_nothing_of_the_request():
    engine = ScriptedEngine(chat_tokenizer(), max_running=1, max_queued=2, step_s=0.01)
    with serving(engine, retry_after_s=7) as server:
        answer = server.post(BOTH[0], {**CHAT, "n": 8})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "7"
        assert answer.json()["error"]["code"] == "engine_overloaded"
        wait_until(lambda: not engine.queued and not engine.running)
        assert engine.asked and all(handle.is_cancelled for handle in engine.asked)
        server.assert_answers()
    engine.close()


@pytest.mark.parametrize("error_after", [0, 2])
def test_an_engine_that_fails_is_500_and_says_nothing_of_why(error_after):
    engine = ScriptedEngine(chat_tokenizer(), error="disk /secret", error_after=error_after)
    with serving(engine) as server:
        answer = server.post(BOTH[0], CHAT)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        stream = server.post(BOTH[0], {**CHAT, "stream": True})
        last = stream.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
        assert "secret" not in answer.text + stream.text
    engine.close()


HOSTS = ("127.0.0.1", "localhost:80", "[::1]:80", "127.8.8.8", "LOCALHOST")
OTHER_HOSTS = ("evil.example", "localhost.evil.example:80", "10.0.0.1", "[::2]", "[", "", "a b")


@pytest.mark.parametrize("host", [*HOSTS, *OTHER_HOSTS])
def test_a_page_of_another_site_cannot_ask_through_a_browser(server, host):
    answer = server.get("/v1/models", headers={"host": host})
    if host in HOSTS:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "host_not_allowed"


def test_any_host_name_will_do_where_anyone_may_ask(engine):
    with serving(engine, allow_anonymous=True) as server:
        answer = server.get("/v1/models", headers={"host": "models.example"})
        assert answer.status_code == 200


KEYS = """
[[keys]]
tenant = "research"
key = "kvk-of-research-1"
[[keys]]
tenant = "research"
sha256 = "{digest}"
[[keys]]
tenant = "operations"
salt = "other"
key = "kvk-of-operations"
is_operator = true
"""


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(KEYS.format(digest=sha256(b"kvk-of-research-2").hexdigest()))
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def locked_server(engine, key_file):
    with serving(engine, api_keys_file=key_file) as running:
        yield running


@pytest.mark.parametrize(
    ("key", "tenant", "salt"),
    [
        ("kvk-of-research-1", "research", "research"),
        ("kvk-of-research-2", "research", "research"),
        ("kvk-of-operations", "operations", "other"),
    ],
)
def test_a_key_decides_tenant_and_salt(engine, locked_server, key, tenant, salt):
    locked_server.client(key).completions.create(model=MODEL, prompt="Hello")
    assert (engine.asked[-1].tenant, engine.asked[-1].salt) == (tenant, salt)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "Bearer",
        "Bearer wrong",
        "Basic a3ZrLW9mLXJlc2VhcmNoLTE=",
        "kvk-of-research-1",
        "Bearer kvk-of-research-1x",
        "Bearer " + "x" * 20_000,
        "Bearer \xe9\xff",
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing", BOTH[0], BOTH[1]])
def test_without_its_key_nothing_is_answered(engine, locked_server, authorization, path):
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    num_asked = len(engine.asked)
    for answer in (
        locked_server.get(path, headers=headers),
        locked_server.post(path, CHAT, headers=headers),
    ):
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert len(engine.asked) == num_asked


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/metrics"])
def test_health_and_metrics_need_no_key(locked_server, path):
    assert locked_server.get(path).status_code == 200


def test_pages_are_for_operators(locked_server):
    page = "/openapi.json"
    assert locked_server.get(page).headers["www-authenticate"].startswith("Basic ")
    for key, status in [("kvk-of-research-1", 401), ("kvk-of-operations", 200)]:
        assert locked_server.get(page, auth=("anyone", key)).status_code == status
        headers = {"authorization": f"Bearer {key}"}
        assert locked_server.get(page, headers=headers).status_code == status
    assert locked_server.get(page, headers={"authorization": "Basic ?"}).status_code == 401


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"expected one \[\[keys\]\] or more"),
        ("keys = ['secret-secret-secret']", r"keys\[0\]: expected a table"),
        ("[[keys]]\nkey = 'secret-secret-secret'", r"keys\[0\].tenant: expected 1 to 64"),
        ("[[keys]]\ntenant = 'a'", "expected either key or sha256"),
        ("[[keys]]\ntenant = 'a'\nkey = 'secret'", "expected 16 characters or more"),
        ("[[keys]]\ntenant = 'a'\nsha256 = 'secret'", "expected 64 hexadecimal digits"),
        ("[[keys]]\ntenant = 'a'\nsha256 = 5", "expected 64 hexadecimal digits"),
        ("[[keys]]\ntenant = 'a'\nkey = 'secret-secret-secret'\nsalt = ''", "salt: expected"),
        ("[[keys]]\ntenant = 'a'\nkey = 'secret-secret-secret'\nsalts = 'a'", "did you mean salt"),
        ("[[keys]]\ntenant = 'a'\nkey = 'secret-secret-secret'\nis_operator = 1", "is_operator"),
        ("[[key]]", "did you mean keys"),
        (
            "[[keys]]\ntenant = 'a'\nkey = 'secret-secret-secret'\n"
            "[[keys]]\ntenant = 'b'\nkey = 'secret-secret-public'\nsalt = 'a'",
            r"keys\[1\].salt: expected one of its own for tenant 'b', got that of 'a'",
        ),
        (
            "[[keys]]\ntenant = 'a'\nkey = 'secret-secret-secret'\n"
            "[[keys]]\ntenant = 'b'\nkey = 'secret-secret-secret'",
            "expected a key of its own",
        ),
    ],
)
def test_refuses_a_wrong_key_file_without_showing_keys(tmp_path, content, message):
    path = tmp_path / "keys.toml"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys.from_file(path)
    assert "secret" not in str(caught.value)


def test_refuses_a_key_file_that_others_may_read(key_file):
    key_file.chmod(0o640)
    with pytest.raises(ConfigError, match=r"only its owner may read.*got mode 640"):
        ApiKeys.from_file(key_file)
