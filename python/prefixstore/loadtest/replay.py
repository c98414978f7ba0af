"""Replaying conversations against one server: who is asked next, and when."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from prefixstore.loadtest.client import Answer, Asked, Client
from prefixstore.loadtest.plan import Arrival
from prefixstore.loadtest.workloads import Conversation, Message


@dataclass(frozen=True)
class Request:
    """One request of a conversation, and what became of it.

    Attributes:
        conversation: Its name.
        turn: From 0.
        sent_s: From the beginning of the replay.
        late_s: Open loop: how long after its time it was sent, for want of a conversation whose
            last answer was there.
        answer: See `Answer`.
    """

    conversation: str
    turn: int
    sent_s: float
    late_s: float
    answer: Answer


@dataclass
class LiveConversation:
    """A conversation under way.

    Attributes:
        conversation: What is asked.
        num_asked: Turns that were answered.
        history: Their messages and answers.
    """

    conversation: Conversation
    num_asked: int = 0
    history: list[Message] = field(default_factory=list)


class Conversations:
    """Conversations that take turns: each live one has its next request sent, then the next one.

    ::

        fresh -> ready -> asked -> ready -> ... -> over
                 `---- live, about num_live ----'
    """

    def __init__(self, conversations: list[Conversation], num_live: int) -> None:
        """About `num_live` of `conversations` at once."""
        self._fresh = deque(conversations)
        self._ready: deque[LiveConversation] = deque()
        self._num_live = num_live
        self._num_asked = 0  # conversations whose answer is awaited
        self._changed = asyncio.Condition()

    async def take(self) -> LiveConversation | None:
        """The conversation to ask next, waiting for one if need be; None when all is asked."""
        async with self._changed:
            await self._changed.wait_for(self._can_tell)
            if not (self._fresh or self._ready):
                return None
            self._num_asked += 1
            is_short = len(self._ready) + self._num_asked <= self._num_live
            if self._fresh and (is_short or not self._ready):
                return LiveConversation(self._fresh.popleft())
            return self._ready.popleft()

    async def give_back(self, live: LiveConversation, answer: Answer) -> None:
        """Go on with a conversation whose request was answered, if there is a next one."""
        turn = live.conversation.turns[live.num_asked]
        text = turn.answer
        if text is None and answer.error is None:
            text = answer.text
        live.num_asked += 1
        async with self._changed:
            self._num_asked -= 1
            # Without an answer there is nothing for the next question to follow on.
            if text is not None and live.num_asked < len(live.conversation.turns):
                live.history += [*turn.messages, {"role": "assistant", "content": text}]
                self._ready.append(live)
            self._changed.notify_all()

    def _can_tell(self) -> bool:
        return bool(self._fresh or self._ready or self._num_asked == 0)


async def replay(
    client: Client,
    asked: Asked,
    conversations: list[Conversation],
    num_live: int,
    arrival: Arrival,
    advance: Callable[[], None],
) -> list[Request]:
    """Send all requests of the conversations, and wait for the answers.

    Args:
        client: Of the server.
        asked: What each request says beside its prompt.
        conversations: In the order in which they begin.
        num_live: About so many take turns.
        arrival: When they are sent.
        advance: Called after each answer.

    Returns:
        The requests in the order in which they were answered.
    """
    queue = Conversations(conversations, num_live)
    began_at = time.perf_counter()
    done: list[Request] = []

    async def ask(live: LiveConversation, late_s: float) -> None:
        turn = live.conversation.turns[live.num_asked]
        answer = await client.ask([*live.history, *turn.messages], asked)
        done.append(
            Request(
                live.conversation.name, live.num_asked, answer.sent_at - began_at, late_s, answer
            )
        )
        advance()
        await queue.give_back(live, answer)

    async def work() -> None:
        while (live := await queue.take()) is not None:
            await ask(live, 0.0)

    if arrival.rate is None:
        await asyncio.gather(*(work() for _ in range(arrival.concurrency)))
        return done
    random_times = random.Random(arrival.seed)
    due_s = 0.0
    running: list[asyncio.Task[None]] = []
    while (live := await queue.take()) is not None:
        due_s += random_times.expovariate(arrival.rate)
        await asyncio.sleep(max(0.0, due_s - (time.perf_counter() - began_at)))
        late_s = time.perf_counter() - began_at - due_s
        running.append(asyncio.create_task(ask(live, late_s)))
    await asyncio.gather(*running)
    return done
