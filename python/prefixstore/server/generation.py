"""The answers to one HTTP request: submitted together, read as they come, cancelled together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import Receive

from prefixstore.engine import (
    Engine,
    FinishReason,
    OutputDelta,
    RequestHandle,
    RequestReport,
    SamplingParams,
)
from prefixstore.server.keys import Caller
from prefixstore.server.logprobs import LogprobReader, ShownToken, TokenTexts
from prefixstore.server.metrics import Latencies
from prefixstore.server.prompts import Prompt

T = TypeVar("T")


class Disconnected(Exception):
    """The client has gone; nobody is there to be answered."""


@dataclass(frozen=True)
class Job:
    """One answer to be computed.

    Attributes:
        prompt: To what.
        sampling: How.
        is_first: Whether it is the first answer to its prompt.
    """

    prompt: Prompt
    sampling: SamplingParams
    is_first: bool


@dataclass
class Choice:
    """One answer as far as it has come.

    Attributes:
        job: What was asked.
        reader: Pairs tokens with the text; None unless log-probabilities are asked for.
        shown: The tokens of `text`, if there is a reader.
    """

    job: Job
    reader: LogprobReader | None = None
    shown: list[ShownToken] = field(default_factory=list)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    report: RequestReport | None = None
    error: str | None = None

    def add(self, delta: OutputDelta) -> list[ShownToken]:
        """Take the next piece; returns the tokens of its text."""
        shown = [] if self.reader is None else self.reader.push(delta)
        self.shown += shown
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.finish_reason = delta.finish_reason
        self.report = delta.report
        self.error = delta.error
        return shown


@dataclass(frozen=True)
class Piece:
    """What has come of a choice.

    Attributes:
        index: The number of the choice.
        text: What is new.
        shown: Its tokens, if log-probabilities are asked for.
        finish_reason: In the last piece.
    """

    index: int
    text: str = ""
    shown: Sequence[ShownToken] = ()
    finish_reason: FinishReason | None = None


class Generation:
    """The answers to one HTTP request.

    Attributes:
        choices: One for each job, in order.
    """

    def __init__(
        self, handles: Sequence[RequestHandle], jobs: Sequence[Job], texts: TokenTexts
    ) -> None:
        self._handles = handles
        self.choices = [
            Choice(job, None if job.sampling.logprobs is None else LogprobReader(texts))
            for job in jobs
        ]

    @classmethod
    def submit(
        cls,
        engine: Engine,
        jobs: Sequence[Job],
        caller: Caller,
        request_id: str,
        texts: TokenTexts,
    ) -> Generation:
        """Hand all jobs to the engine, or none.

        Raises:
            ValueError: If the engine refuses a prompt.
            EngineOverloaded: If it has no room for all of them.
            EngineClosed: If it takes nothing new.
        """
        handles: list[RequestHandle] = []
        try:
            for number, job in enumerate(jobs):
                handle = engine.submit(
                    job.prompt.token_ids,
                    job.sampling,
                    tenant=caller.tenant,
                    salt=caller.salt,
                    request_id=request_id if len(jobs) == 1 else f"{request_id}-{number}",
                )
                handles.append(handle)
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return cls(handles, jobs, texts)

    async def pieces(self, latencies: Latencies) -> AsyncIterator[Piece]:
        """Pieces of all answers as they come."""
        clocks = [latencies.clock() for _ in self._handles]
        async for number, delta in _merge(self._handles):
            shown = self.choices[number].add(delta)
            clocks[number].observe(delta)
            yield Piece(number, delta.text, shown, delta.finish_reason)

    def cancel(self) -> None:
        """Let the engine drop what is not finished; answers that are stay as they are."""
        for handle, choice in zip(self._handles, self.choices, strict=True):
            if choice.finish_reason is None:
                handle.cancel()


async def _merge(handles: Sequence[RequestHandle]) -> AsyncIterator[tuple[int, OutputDelta]]:
    if len(handles) == 1:
        async for delta in handles[0]:
            yield 0, delta
        return
    streams = [aiter(handle) for handle in handles]
    waiting = {asyncio.ensure_future(anext(stream)): n for n, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, delta = waiting.pop(task), task.result()
                if delta.finish_reason is None:
                    waiting[asyncio.ensure_future(anext(streams[number]))] = number
                yield number, delta
    finally:
        for task in waiting:
            task.cancel()


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, unless the client goes first.

    Raises:
        Disconnected: If it did; `work` has been cancelled then.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_wait_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Disconnected
    finally:
        working.cancel()
        watching.cancel()


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
