"""Log-probabilities as OpenAI's own client reads them, compared with the engine's."""

import math

import pytest
from chat_model import chat_model, chat_tokenizer
from serving import MODEL, serving

from prefixstore.engine import Engine, SamplingParams

PROMPT = "A block is sixteen tokens of all layers. The pool keeps blocks."
CHAT = [{"role": "user", "content": PROMPT}]
NUM_NEW = 40
GREEDY = {"model": MODEL, "max_tokens": NUM_NEW, "temperature": 0}
WAYS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture(scope="module")
def server():
    with Engine.open(
        chat_model(), chat_tokenizer(), block_size=16, pool_tokens=4096, memory_bytes=0
    ) as engine:
        with serving(engine) as running:
            yield running
        assert engine.check() == []


def complete(server, stream=False, **options):
    """Text, log-probabilities and finish reason of a completion, joined from a stream's pieces."""
    answer = server.client().completions.create(
        **{**GREEDY, "prompt": PROMPT, "stream": stream, **options}
    )
    if not stream:
        (choice,) = answer.choices
        return choice.text, choice.logprobs.model_dump(), choice.finish_reason
    text, logprobs, reason = "", {}, None
    for chunk in answer:
        (choice,) = chunk.choices
        text, reason = text + choice.text, choice.finish_reason
        for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
            logprobs.setdefault(name, []).extend(values)
    return text, logprobs, reason


def chat(server, stream=False, **options):
    """Text and log-probabilities of a chat's answer, joined from a stream's pieces."""
    answer = server.client().chat.completions.create(
        **{**GREEDY, "messages": CHAT, "stream": stream, "logprobs": True, **options}
    )
    if not stream:
        (choice,) = answer.choices
        assert choice.logprobs.refusal is None
        return choice.message.content, choice.logprobs.content
    text, content = "", []
    for chunk in answer:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        content += choice.logprobs.content if choice.logprobs else []
    return text, content


def expect(server, prompt, num_top, **settings):
    """The engine's own answer."""
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0, logprobs=num_top, **settings)
    (output,) = server.engine.generate([prompt], sampling)
    return output


@WAYS
def test_a_completion_has_the_engines_log_probabilities(server, stream):
    text, logprobs, reason = complete(server, stream, logprobs=3)
    expected = expect(server, PROMPT, 3)
    assert (text, reason) == (expected.text, "length")
    assert logprobs["token_logprobs"] == [one.logprob for one in expected.logprobs]
    assert len(logprobs["tokens"]) == NUM_NEW
    for table, token, one in zip(
        logprobs["top_logprobs"], logprobs["tokens"], expected.logprobs, strict=True
    ):
        # The model has more ids than the tokenizer: the others all have empty text.
        by_text = {min(token_id, len(chat_tokenizer())): value for token_id, value in one.top[::-1]}
        assert sorted(table.values()) == sorted(by_text.values())
        assert table[token] == one.logprob  # greedy: it is the most likely


@WAYS
def test_a_chat_has_the_engines_log_probabilities(server, stream):
    rendered = chat_tokenizer().apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    expected = expect(server, chat_tokenizer()(rendered).input_ids, 20)
    text, content = chat(server, stream, top_logprobs=20)
    assert text == expected.text
    assert [one.logprob for one in content] == [one.logprob for one in expected.logprobs]
    for got, one in zip(content, expected.logprobs, strict=True):
        assert [other.logprob for other in got.top_logprobs] == [value for _, value in one.top]
        first = got.top_logprobs[0]
        assert (first.token, first.bytes, first.logprob) == (got.token, got.bytes, got.logprob)


@WAYS
def test_none_of_others_are_told_unless_asked(server, stream):
    _, content = chat(server, stream)
    assert len(content) == NUM_NEW
    assert all(one.top_logprobs == [] for one in content)
    _, logprobs, _ = complete(server, stream, logprobs=0)
    own = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    assert logprobs["top_logprobs"] == [{token: logprob} for token, logprob in own]


@WAYS
def test_a_sampled_token_stands_beside_the_most_likely(server, stream):
    _, logprobs, _ = complete(server, stream, logprobs=2, temperature=2, seed=1)
    sizes = set()
    for table, token, own in zip(
        logprobs["top_logprobs"], logprobs["tokens"], logprobs["token_logprobs"], strict=True
    ):
        assert own <= max(table.values()) and token in table
        sizes.add(len(table))
    assert 3 in sizes


@WAYS
def test_bytes_make_the_text(server, stream):
    """Random weights generate parts of characters, which decode as U+FFFD."""
    text, content = chat(server, stream, max_tokens=200, extra_body={"ignore_eos": True})
    specials = set(chat_tokenizer().all_special_tokens)
    data = b"".join(bytes(one.bytes) for one in content if one.token not in specials)
    assert data.decode(errors="replace") == text
    assert "\ufffd" in text
    for one in content:
        if one.token.startswith("bytes:"):
            assert one.token == "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.bytes)
        else:
            assert one.token.encode() == bytes(one.bytes)


@WAYS
def test_offsets_lead_to_the_tokens(server, stream):
    text, logprobs, _ = complete(server, stream, logprobs=0)
    whole = 0
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:") and token not in chat_tokenizer().all_special_tokens:
            assert text[offset : offset + len(token)] == token
            whole += 1
    assert whole > NUM_NEW // 2
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


@WAYS
def test_tells_no_tokens_of_a_stop_string(server, stream):
    text, logprobs, _ = complete(server, logprobs=0)
    at = logprobs["text_offset"][12]
    stop = text[at : at + 5]
    shown, of_shown, reason = complete(server, stream, logprobs=0, stop=[stop])
    assert (shown, reason) == (text[: text.index(stop)], "stop")
    num_shown = sum(offset < len(shown) for offset in logprobs["text_offset"])
    assert 0 < num_shown < NUM_NEW
    assert of_shown["tokens"] == logprobs["tokens"][:num_shown]


def test_without_the_wish_there_are_none(server):
    client = server.client()
    for asked in ({}, {"logprobs": False, "top_logprobs": 0}):
        answer = client.chat.completions.create(**GREEDY, messages=CHAT, **asked)
        assert answer.choices[0].logprobs is None
        stream = client.chat.completions.create(**GREEDY, messages=CHAT, stream=True, **asked)
        assert all(chunk.choices[0].logprobs is None for chunk in stream)
    assert client.completions.create(**GREEDY, prompt=PROMPT).choices[0].logprobs is None


def test_each_of_several_answers_has_its_own(server):
    answer = server.client().completions.create(
        **{**GREEDY, "temperature": 1, "prompt": [PROMPT, "The tiers"]},
        n=2,
        seed=4,
        logprobs=1,
        extra_body={"ignore_eos": True},
    )
    assert len(answer.choices) == 4
    for choice in answer.choices:
        assert NUM_NEW // 2 < len(choice.logprobs.tokens) <= NUM_NEW
        assert choice.logprobs.text_offset[0] == 0
        assert all(-math.inf < value <= 0 for value in choice.logprobs.token_logprobs)
    assert len({tuple(choice.logprobs.tokens) for choice in answer.choices}) == 4
