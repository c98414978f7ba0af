"""Fields that the server refuses: with 400 and the field's name, before the engine is asked."""

import json

import pytest
from chat_model import chat_tokenizer
from scripted_engine import ScriptedEngine
from serving import CHAT, PATHS, TEXT, serving


@pytest.fixture(scope="module")
def engine():
    engine = ScriptedEngine(chat_tokenizer())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, max_choices=8, max_tokens=300) as running:
        yield running


HALF = "half of an emoji: \ud83d"  # as JavaScript's slice() leaves it


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
    ({"stop": ["x", HALF]}, "stop"),
    ({"stream": "true"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    *(({name: 5}, name) for name in ("user", "prompt_cache_key", "safety_identifier")),
    ({"metadata": {"a": 5}}, "metadata.a"),
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
    (message(content=HALF), "messages[0].content"),
    (message(content=[{"type": "text", "text": HALF}]), "messages[0].content"),
    (message(name=HALF), "messages[0].name"),
    (message(tool_call_id=HALF), "messages[0].tool_call_id"),
    (message(tool_calls=[{"function": {"arguments": [HALF]}}]), "messages[0].tool_calls"),
    (message(tool_calls=[{HALF: 1}]), "messages[0].tool_calls"),
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
    *(({"prompt": [one], "echo": True}, "prompt") for one in (-1, 384, 1 << 40, 1 << 70)),
    ({"prompt": [[5], [-1]], "echo": True}, "prompt"),
    ({"prompt": HALF}, "prompt"),
    ({"prompt": ["Hello", HALF]}, "prompt"),
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
CASES = [(PATHS[0], CHAT, *case) for case in WRONG_OF_BOTH + WRONG_OF_CHAT]
CASES += [(PATHS[1], TEXT, *case) for case in WRONG_OF_BOTH + WRONG_OF_TEXT]


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


@pytest.mark.parametrize(("path", "body"), [(PATHS[0], CHAT), (PATHS[1], TEXT)])
def test_takes_fields_that_it_has_no_use_for(server, path, body):
    names = ("user", "prompt_cache_key", "safety_identifier")
    unused = {"metadata": {"a": "b"}, **dict.fromkeys(names, "somebody")}
    assert server.post(path, {**body, **unused}).status_code == 200
