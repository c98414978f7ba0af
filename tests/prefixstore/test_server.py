"""The server as OpenAI's own client sees it."""

import asyncio

import openai
import pytest
from chat_model import chat_tokenizer
from scripted_engine import ScriptedEngine
from serving import MODEL, serving

ANSWER = "The pool keeps blocks, the tiers keep records."
CHAT = [{"role": "user", "content": "What keeps blocks? Say it in a few words, please."}]


@pytest.fixture(scope="module")
def engine():
    engine = ScriptedEngine(chat_tokenizer(), ANSWER)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def test_answers_a_chat(client, engine):
    answer = client.chat.completions.create(model=MODEL, messages=CHAT)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    prompt = engine.asked[-1].prompt
    expected = f"<|start|>user\n{CHAT[0]['content']}<|end|>\n<|start|>assistant\n"
    assert chat_tokenizer().decode(prompt) == expected
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.total_tokens == len(prompt) + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == (len(prompt) - 1) // 16 * 16
    assert answer.usage.kvkernels[0]["request_id"] == answer.id


def test_streams_a_chat(client):
    stream = client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_its_usage_if_asked(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert last.choices == []
    assert last.usage.completion_tokens > 3
    assert last.usage.kvkernels[0]["cached_tokens_by_tier"] == {"device": 32}
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_on_the_wire_ends_with_done(server):
    body = {"model": MODEL, "messages": CHAT, "stream": True}
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_gives_several_answers(client, engine, stream):
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, n=3, seed=(1 << 63) - 2, stream=stream
    )
    if stream:
        texts = ["", "", ""]
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        texts = [choice.message.content for choice in answer.choices]
        assert answer.usage.prompt_tokens == len(engine.asked[-1].prompt)  # counted once
    assert texts == [ANSWER] * 3
    seeds = [handle.sampling.seed for handle in engine.asked[-3:]]
    assert seeds == [(1 << 63) - 2, (1 << 63) - 1, -(1 << 63)]


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [
        ("A block", 1),
        (["A block", "The pool"], 2),
        ([10, 11, 12], 1),
        ([[10, 11, 12], [20, 21]], 2),
    ],
    ids=["text", "texts", "tokens", "lists of tokens"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_completes_prompts_of_every_kind(client, engine, prompt, num_prompts, stream):
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=200, stream=stream, echo=True
    )
    if stream:
        texts = [""] * num_prompts
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        texts = [choice.text for choice in answer.choices]
    asked = engine.asked[-num_prompts:]
    assert texts == [chat_tokenizer().decode(one.prompt) + ANSWER for one in asked]
    if not isinstance(prompt, str) and not isinstance(prompt[0], str):
        nested = prompt if isinstance(prompt[0], list) else [prompt]
        assert [one.prompt for one in asked] == nested


def test_passes_sampling_on(client, engine):
    client.completions.create(
        model=MODEL,
        prompt="A block",
        max_tokens=7,
        temperature=0.5,
        top_p=0.25,
        seed=5,
        stop=["x", "yz"],
        extra_body={"top_k": 3, "ignore_eos": True},
    )
    sampling = engine.asked[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.5, 0.25)
    assert (sampling.top_k, sampling.seed, sampling.stop) == (3, 5, ("x", "yz"))
    assert sampling.ignore_eos


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_bounds_the_answer(client, engine, name):
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, **{name: 2})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


def test_an_answer_may_fill_the_context_by_default(client, engine):
    client.chat.completions.create(model=MODEL, messages=CHAT)
    handle = engine.asked[-1]
    assert handle.sampling.max_tokens == engine.max_model_len - len(handle.prompt)
    client.completions.create(model=MODEL, prompt="A block")
    assert engine.asked[-1].sampling.max_tokens == 16  # as OpenAI's
    client.completions.create(model=MODEL, prompt="A block", max_tokens=10**9)
    handle = engine.asked[-1]
    assert handle.sampling.max_tokens == engine.max_model_len - len(handle.prompt)


def test_an_answer_may_be_no_longer_than_the_server_allows_by_default(engine):
    with serving(engine, max_tokens=8) as server:
        server.client().chat.completions.create(model=MODEL, messages=CHAT)
        server.client().completions.create(model=MODEL, prompt="A block")
    assert [handle.sampling.max_tokens for handle in engine.asked[-2:]] == [8, 8]


def test_joins_the_parts_of_a_message(client, engine):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    client.chat.completions.create(model=MODEL, messages=messages)
    assert chat_tokenizer().decode(engine.asked[-1].prompt) == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\none\ntwo<|end|>\n<|start|>assistant\n"
    )


def test_takes_an_answer_back_as_the_client_holds_it(client):
    answer = client.chat.completions.create(model=MODEL, messages=CHAT)
    messages = [*CHAT, answer.choices[0].message.model_dump(), *CHAT]
    assert client.chat.completions.create(model=MODEL, messages=messages).choices


def test_takes_what_asks_for_nothing(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        frequency_penalty=0.0,
        presence_penalty=0,
        logit_bias={},
        logprobs=False,
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        user="somebody",
        metadata={"a": "b"},
    )
    assert answer.choices[0].message.content == ANSWER


def test_names_its_model(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="expected 'tiny', got 'other'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="A")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="x" * 50_000, prompt="A")
    assert len(caught.value.response.text) < 500


def test_serves_the_async_client_many_at_once(server):
    async def ask_all():
        async with server.async_client() as client:
            return await asyncio.gather(*(ask(client, stream=n % 2 == 1) for n in range(20)))

    async def ask(client, stream):
        answer = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=stream)
        if not stream:
            return answer.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

    assert asyncio.run(ask_all()) == [ANSWER] * 20
