"""The replayed workloads, compared with their source data."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("transformers")

from demo_stand_ins import byte_tokenizer

from prefixstore.demo.prompts import load_questions
from prefixstore.errors import ConfigError
from prefixstore.loadtest.plan import Arrival, Plan, take_first
from prefixstore.loadtest.prompts import make_prompts, render_chatml
from prefixstore.loadtest.workloads import (
    WORKLOADS,
    Conversation,
    Shape,
    Turn,
    build_agent_loop,
    build_chats,
    build_episodes,
    load_chats,
    load_episodes,
    mark,
)

ENDLESS = Shape(context_tokens=1_000_000)
ROLES = {"system", "user", "assistant"}


def words(text: str) -> int:
    return len(text.split())


def quarters(text: str) -> int:
    return len(text) // 4


def test_replays_every_episode_turn_by_turn() -> None:
    episodes = {f"episode {row['task_id']}": row["traj"] for row in load_episodes()}
    conversations = build_episodes(ENDLESS, seed=0)
    assert {one.name for one in conversations} == set(episodes)
    for conversation in conversations:
        recorded = episodes[conversation.name]
        replayed: list[tuple[str, str]] = []
        for turn in conversation.turns:
            assert {one["role"] for one in turn.messages} <= {"system", "user"}
            replayed += [(one["role"], one["content"]) for one in turn.messages]
            assert turn.answer is not None
            replayed.append(("assistant", turn.answer))
        # The last message is the user's goodbye where the recording ends with one.
        assert len(recorded) - len(replayed) in (0, 1)
        for (role, content), message in zip(replayed, recorded, strict=False):
            assert role == ("user" if message["role"] == "tool" else message["role"])
            assert (message["content"] or "") in content


def test_calls_and_results_of_tools_are_text() -> None:
    conversations = build_episodes(ENDLESS, seed=0)
    recorded = [message for row in load_episodes() for message in row["traj"]]
    answers = [turn.answer for one in conversations for turn in one.turns]
    calls = [answer for answer in answers if answer and answer.startswith("<tool_call>")]
    assert len(calls) == sum(m["content"] is None for m in recorded)
    call = json.loads(calls[0].removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert set(call) == {"name", "arguments"}
    assert isinstance(call["arguments"], dict)


def test_cuts_an_episode_before_the_turn_that_does_not_fit() -> None:
    shape = Shape(context_tokens=1500, max_tokens=32, count_tokens=words)
    whole = {one.name: one for one in build_episodes(ENDLESS, seed=0)}
    num_cut = 0
    for conversation in build_episodes(shape, seed=0):
        turns = whole[conversation.name].turns
        assert conversation.turns == turns[: len(conversation.turns)]
        history: list[dict[str, str]] = []
        for turn in conversation.turns:
            history += turn.messages
            assert sum(words(one["content"]) for one in history) + 32 <= 1500
            history.append({"role": "assistant", "content": str(turn.answer)})
        if len(conversation.turns) < len(turns):
            num_cut += 1
            history += turns[len(conversation.turns)].messages
            # 6 for each message's template, 12 for the mark and the answer's beginning.
            tokens = sum(words(one["content"]) + 6 for one in history) + 12
            assert tokens + 32 > 1500
    assert num_cut > 5


def test_refuses_a_context_that_no_episode_fits() -> None:
    with pytest.raises(ConfigError, match=r"context-tokens: expected room .* got 300"):
        build_episodes(Shape(context_tokens=300), seed=0)


def test_the_agent_loop_shares_all_but_the_question() -> None:
    conversations = build_agent_loop(Shape(prefix_tokens=1500, count_tokens=quarters), seed=0)
    assert len(conversations) == len(load_questions()) == 100
    assert {len(one.turns) for one in conversations} == {1}
    systems = {one.turns[0].messages[0]["content"] for one in conversations}
    questions = [one.turns[0].messages[1]["content"] for one in conversations]
    assert len(systems) == 1
    assert 1450 <= quarters(systems.pop()) <= 1500
    assert sorted(questions) == sorted(question.text for question in load_questions())


def test_reckons_lengths_by_characters_without_a_tokenizer() -> None:
    (system, _) = build_agent_loop(Shape(prefix_tokens=2000), seed=0)[0].turns[0].messages
    assert len(system["content"]) / 3.67 == pytest.approx(2000, rel=0.02)


def test_refuses_a_prefix_that_leaves_no_room() -> None:
    with pytest.raises(ConfigError, match=r"prefix-tokens: expected at most 8060 .* got 8100"):
        build_agent_loop(Shape(prefix_tokens=8100), seed=0)


def test_chats_follow_on_the_answers_of_the_server() -> None:
    conversations = {one.name: one for one in build_chats(Shape(), seed=0)}
    assert len(conversations) == len(load_chats()) == 80
    for row in load_chats():
        turns = conversations[f"chat {row['question_id']}"].turns
        assert [turn.messages[0]["content"] for turn in turns] == row["turns"]
        assert [turn.answer for turn in turns] == [None, None]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_seed_decides_what_is_replayed(workload: str) -> None:
    build = WORKLOADS[workload]
    assert build(Shape(), 3) == build(Shape(), 3)
    assert build(Shape(), 3) != build(Shape(), 4)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_mark_makes_prompts_differ_from_their_first_words_on(workload: str) -> None:
    built = WORKLOADS[workload](Shape(), 0)
    first, again, other = (mark(built, key) for key in ("0/0", "0/0", "0/1"))
    assert first == again
    for one, another, plain in zip(first, other, built, strict=True):
        texts = [render_chatml(list(it.turns[0].messages)) for it in (one, another)]
        same = next(at for at, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
        assert same < len("<|im_start|>system\nConversations 012345678901")
        assert one.turns[1:] == plain.turns[1:]
        assert one.turns[0].messages[-1] == plain.turns[0].messages[-1]


def test_refuses_more_requests_than_there_are() -> None:
    plan = Plan("chats", Shape(), num_requests=161, arrival=Arrival())
    with pytest.raises(ConfigError, match=r"requests: expected at most 160 .* got 161"):
        plan.conversations(0)


@pytest.mark.parametrize("concurrency", [1, 30])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_plan_has_the_first_requests_of_conversations_that_take_turns(
    workload: str, concurrency: int
) -> None:
    plan = Plan(workload, Shape(), num_requests=70, arrival=Arrival(concurrency))
    conversations = plan.conversations(0)
    assert sum(len(one.turns) for one in conversations) == 70
    whole = {one.name: one for one in mark(WORKLOADS[workload](Shape(), 0), "0/0")}
    for one in conversations:
        assert one.turns == whole[one.name].turns[: len(one.turns)]
    unfinished = sum(len(one.turns) < len(whole[one.name].turns) for one in conversations)
    assert unfinished <= plan.num_live


def test_conversations_take_turns_until_there_are_enough() -> None:
    turns = tuple(Turn(({"role": "user", "content": str(n)},), None) for n in range(3))
    conversations = [Conversation(name, turns) for name in "abcd"]
    # a b, a b, a b, then c d
    taken = take_first(conversations, num_live=2, num_requests=7)
    assert [(one.name, len(one.turns)) for one in taken] == [("a", 3), ("b", 3), ("c", 1)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def test_sends_the_same_prompt_as_text_or_token_ids(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert make_prompts("chat")(messages) == ("/chat/completions", {"messages": messages})
    assert make_prompts("completions", tokenizer)(messages) == ("/completions", {"prompt": text})
    path, body = make_prompts("token-ids", tokenizer)(messages)
    assert path == "/completions"
    assert tokenizer.decode(body["prompt"]) == text


def test_token_ids_need_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="endpoint: expected --tokenizer"):
        make_prompts("token-ids")
