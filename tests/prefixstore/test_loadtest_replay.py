"""Which request is sent next, and when: order, histories, concurrency and random arrivals."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
from typing import Any

import pytest

pytest.importorskip("httpx")

from scripted_openai import MODEL, MakeReply, Reply, ScriptedOpenAI, serving

from prefixstore.loadtest.client import Asked, Client
from prefixstore.loadtest.plan import Arrival
from prefixstore.loadtest.prompts import make_prompts
from prefixstore.loadtest.replay import Request, replay
from prefixstore.loadtest.workloads import MIN_LIVE, Conversation, Turn


def conversation(name: str, num_turns: int, answer: str | None = "recorded") -> Conversation:
    messages = [({"role": "user", "content": f"{name}.{turn}"},) for turn in range(num_turns)]
    return Conversation(name, tuple(Turn(one, answer) for one in messages))


def run(
    make_reply: MakeReply,
    conversations: list[Conversation],
    arrival: Arrival,
) -> tuple[list[Request], ScriptedOpenAI, int]:
    """Replay; returns the requests, the server, and the number of progress reports."""
    told = itertools.count()

    async def run_replay(url: str) -> list[Request]:
        client = Client(url, make_prompts("chat"))
        try:
            return await replay(
                client, Asked(MODEL, 3), conversations, MIN_LIVE, arrival, lambda: next(told)
            )
        finally:
            await client.close()

    with serving(make_reply) as server:
        requests = asyncio.run(run_replay(server.url))
    return requests, server, next(told)


def quickly(_: dict[str, Any]) -> Reply:
    return Reply()


def last_messages(server: ScriptedOpenAI) -> list[str]:
    return [seen.body["messages"][-1]["content"] for seen in server.seen]


def test_conversations_take_turns() -> None:
    conversations = [conversation(f"c{number}", 2) for number in range(3)]
    requests, server, told = run(quickly, conversations, Arrival(concurrency=1))
    assert last_messages(server) == ["c0.0", "c1.0", "c2.0", "c0.1", "c1.1", "c2.1"]
    assert [(one.conversation, one.turn) for one in requests][:4] == [
        ("c0", 0),
        ("c1", 0),
        ("c2", 0),
        ("c0", 1),
    ]
    assert told == 6
    assert all(one.answer.error is None for one in requests)
    assert [one.sent_s for one in requests] == sorted(one.sent_s for one in requests)


def test_a_new_conversation_begins_when_one_is_over() -> None:
    conversations = [conversation(f"c{number}", 2) for number in range(MIN_LIVE + 1)]
    _, server, _ = run(quickly, conversations, Arrival(concurrency=1))
    firsts = [f"c{number}.0" for number in range(MIN_LIVE)]
    seconds = [f"c{number}.1" for number in range(MIN_LIVE)]
    assert last_messages(server)[: MIN_LIVE + 1] == [*firsts, "c0.1"]
    assert last_messages(server)[MIN_LIVE + 1] == f"c{MIN_LIVE}.0"
    assert sorted(last_messages(server)) == sorted(
        [*firsts, *seconds, f"c{MIN_LIVE}.0", f"c{MIN_LIVE}.1"]
    )


@pytest.mark.parametrize(("recorded", "said"), [("recorded", "recorded"), (None, "one two three")])
def test_the_history_is_what_was_recorded_or_else_answered(recorded: str | None, said: str) -> None:
    _, server, _ = run(quickly, [conversation("c", 3, recorded)], Arrival())
    assert server.seen[2].body["messages"] == [
        {"role": "user", "content": "c.0"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "c.1"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "c.2"},
    ]


@pytest.mark.parametrize(("recorded", "num_sent"), [("recorded", 3), (None, 1)])
def test_after_a_failure_goes_on_where_there_is_a_recording(
    recorded: str | None, num_sent: int
) -> None:
    requests, _, _ = run(
        lambda body: Reply(status=500), [conversation("c", 3, recorded)], Arrival()
    )
    assert [one.answer.error for one in requests] == ["http 500"] * num_sent


@pytest.mark.parametrize("concurrency", [1, 3])
def test_asks_so_many_at_once(concurrency: int) -> None:
    conversations = [conversation(f"c{number}", 3) for number in range(4)]
    slowly = Reply(first_s=0.05)
    requests, server, _ = run(lambda body: slowly, conversations, Arrival(concurrency))
    assert len(requests) == 12
    assert server.most_running == concurrency


def test_never_asks_a_conversation_twice_at_once() -> None:
    slowly = Reply(first_s=0.05)
    requests, server, _ = run(lambda body: slowly, [conversation("c", 4)], Arrival(concurrency=8))
    assert server.most_running == 1
    assert [one.turn for one in requests] == [0, 1, 2, 3]


@pytest.mark.parametrize("arrival", [Arrival(concurrency=4), Arrival(rate=200.0)], ids=str)
def test_sends_every_request_once(arrival: Arrival) -> None:
    conversations = [conversation(f"c{number}", 2) for number in range(10)]
    requests, server, told = run(quickly, conversations, arrival)
    assert len(requests) == told == 20
    assert sorted(last_messages(server)) == sorted(
        f"c{number}.{turn}" for number in range(10) for turn in range(2)
    )


def test_an_open_loop_sends_at_random_times_whether_answered_or_not() -> None:
    rate, num_requests = 40.0, 60
    conversations = [conversation(f"c{number}", 1) for number in range(num_requests)]
    slowly = Reply(first_s=0.5)
    requests, server, _ = run(lambda body: slowly, conversations, Arrival(rate=rate, seed=1))
    draw = random.Random(1).expovariate  # as random arrivals are, the gaps are
    times_s = itertools.accumulate(draw(rate) for _ in range(num_requests))
    in_order = sorted(requests, key=lambda one: int(one.conversation[1:]))
    after_s = [one.sent_s - one.late_s - at for one, at in zip(in_order, times_s, strict=True)]
    # Requests record how late they were sent, but not when their task then ran.
    assert min(after_s) > -1e-6
    assert statistics.median(after_s) < 0.1
    assert server.most_running > 10
    assert all(one.late_s >= 0 for one in requests)


def test_an_open_loop_tells_how_late_a_request_was_for_want_of_an_answer() -> None:
    slowly = Reply(first_s=0.2)
    requests, server, _ = run(lambda body: slowly, [conversation("c", 4)], Arrival(rate=100.0))
    assert server.most_running == 1
    late_s = [one.late_s for one in requests]
    assert late_s == sorted(late_s)
    assert late_s[-1] > 0.4
