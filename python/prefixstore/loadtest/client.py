"""One request over HTTP, timed piece by piece as its answer streams in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from prefixstore.loadtest.prompts import MakePrompt
from prefixstore.loadtest.workloads import Message

ERROR_CHARS = 300  # of what a server says is kept
DONE = "[DONE]"
_REST_S = 1.0  # for a stream to end after its last event; else its connection is given up


@dataclass(frozen=True)
class Asked:
    """What every request says beside its prompt.

    Attributes:
        model: As the server calls it.
        max_tokens: Of an answer.
        ignore_eos: Ask for all of them, of servers that know `ignore_eos`.
        timeout_s: From sending a request to the end of its answer.
    """

    model: str
    max_tokens: int
    ignore_eos: bool = False
    timeout_s: float = 600.0


@dataclass
class Answer:
    """What became of one request; seconds count from when it was sent.

    Attributes:
        sent_at: On the clock of `time.perf_counter`.
        piece_s: When each piece of text came. A piece may hold several tokens.
        end_s: When the answer was complete, or failed.
        text: All pieces.
        finish_reason: As the server says.
        prompt_tokens: As the server says in `usage`, like the next two; None where it does not.
        cached_tokens: Of them, not computed again.
        output_tokens: Of the answer.
        error: Its kind, or None: "connect", "disconnect", "timeout", "http NUMBER", "server" (an
            error within the stream), "malformed".
        error_text: What the server or the client's library said.
    """

    sent_at: float
    piece_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None
    error_text: str = ""


class _Failed(Exception):
    """The request failed in a way that has a kind."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Client:
    """Sends requests to one server. Belongs to one event loop.

    httpx took 0.13 to 0.27 ms of processor time a token, of 8 streams at once and of one, half of
    it its own; a reader by hand on bare sockets took the other half.
    """

    def __init__(self, url: str, make_prompt: MakePrompt, api_key: str | None = None) -> None:
        """`url` ends with the version: "http://127.0.0.1:8000/v1"."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._make_prompt = make_prompt
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            # The whole answer has a deadline, its parts have none of their own. Proxies of the
            # environment would be measured too.
            timeout=None,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def list_models(self, timeout_s: float) -> list[str]:
        """The names of what the server serves.

        Raises:
            httpx.HTTPError: If it is not there.
            ValueError: If it says something else.
        """
        response = await self._http.get("/models", timeout=timeout_s)
        response.raise_for_status()
        try:
            return [str(one["id"]) for one in response.json()["data"]]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"expected a list of models, got {response.text[:ERROR_CHARS]}") from (
                error
            )

    async def ask(self, messages: list[Message], asked: Asked) -> Answer:
        """Send one request and read its answer; what goes wrong is in the answer."""
        path, body = self._make_prompt(messages)
        body |= {
            "model": asked.model,
            "max_tokens": asked.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if asked.ignore_eos:
            body["ignore_eos"] = True
        answer = Answer(sent_at=time.perf_counter())
        try:
            await asyncio.wait_for(self._read(path, body, answer), asked.timeout_s)
        except asyncio.TimeoutError:
            if not answer.end_s:
                answer.error = "timeout"
                answer.error_text = f"no complete answer within {asked.timeout_s:g} s"
        except _Failed as error:
            answer.error, answer.error_text = error.kind, str(error)[:ERROR_CHARS]
        except httpx.ConnectError as error:
            answer.error, answer.error_text = "connect", str(error)
        except httpx.TransportError as error:
            answer.error, answer.error_text = "disconnect", str(error)
        if not answer.end_s:
            answer.end_s = time.perf_counter() - answer.sent_at
        return answer

    async def _read(self, path: str, body: dict[str, Any], answer: Answer) -> None:
        async with self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise _Failed(f"http {response.status_code}", text)
            events = _events(response)
            async for data in events:
                if data == DONE:
                    answer.end_s = time.perf_counter() - answer.sent_at
                    await _read_rest(events)
                    return
                _note(_parse(data), answer)
            if answer.finish_reason is None:
                raise _Failed("disconnect", "the stream ended before the answer did")


async def _read_rest(events: AsyncIterator[str]) -> None:
    """Read an answer's end that says nothing: only then is its connection of use for another."""

    async def read() -> None:
        async for _ in events:
            pass

    with contextlib.suppress(httpx.TransportError, asyncio.TimeoutError):
        await asyncio.wait_for(read(), _REST_S)


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each server-sent event; in this protocol an event has one line of it.

    Lines end with a line feed alone: `aiter_lines` also splits at U+2028, which may stand in JSON.
    """
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[len(b"data:") :].decode(errors="replace").strip()


def _parse(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except json.JSONDecodeError as error:
        raise _Failed("malformed", f"expected JSON, got {data}") from error
    if not isinstance(chunk, dict):
        raise _Failed("malformed", f"expected an object, got {data}")
    if chunk.get("error"):
        raise _Failed("server", json.dumps(chunk["error"]))
    return chunk


def _note(chunk: dict[str, Any], answer: Answer) -> None:
    """Add to the answer what a chunk says, and when it came."""
    now_s = time.perf_counter() - answer.sent_at
    try:
        for choice in chunk.get("choices") or ():
            # The first chunk of a chat may say whose message it is and nothing else: no token yet.
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
            if text:
                answer.piece_s.append(now_s)
                answer.text += text
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        usage = chunk.get("usage")
        if usage:
            answer.prompt_tokens = usage["prompt_tokens"]
            answer.output_tokens = usage["completion_tokens"]
            answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    except (AttributeError, KeyError, TypeError) as error:
        raise _Failed("malformed", f"expected a chunk of an answer, got {chunk}") from error
