"""A scripted server with OpenAI's protocol: known delays, and known failures.

Runs in a thread of a test (`serving`), or as a process: `python scripted_openai.py PORT` reports
prompts that it has seen before as cached, until the process ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MODEL = "scripted"


@dataclass(frozen=True)
class Reply:
    """How a request is answered.

    Attributes:
        pieces: Texts, each sent as a chunk.
        first_s: Seconds before the first piece.
        gap_s: Seconds before each later one.
        usage: The `usage` of the last chunk; None to leave it out.
        status: HTTP status; if not 200, only an error is sent.
        extra: Events sent in place of the end of the stream; None for the proper end.
        is_cut: Whether the connection is cut after `extra`; otherwise the stream ends properly.
    """

    pieces: tuple[str, ...] = ("one", " two", " three")
    first_s: float = 0.0
    gap_s: float = 0.0
    usage: dict[str, Any] | None = field(
        default_factory=lambda: {"prompt_tokens": 10, "completion_tokens": 3}
    )
    status: int = 200
    extra: tuple[str, ...] | None = None
    is_cut: bool = True


@dataclass
class Seen:
    """A request, and when the pieces of its answer were written (perf_counter)."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    came_at: float
    written_at: list[float] = field(default_factory=list)


MakeReply = Callable[[dict[str, Any]], Reply]


class ScriptedOpenAI:
    """The server; `make_reply` makes the reply from each request's body."""

    def __init__(self, make_reply: MakeReply) -> None:
        self._make_reply = make_reply
        self.port = 0
        self.seen: list[Seen] = []
        self.num_connections = 0  # so far
        self.num_running = 0
        self.most_running = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, port: int, started: Callable[[], None]) -> None:
        """Answer on loopback until cancelled; port 0 lets the kernel choose."""
        server = await asyncio.start_server(self._handle, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        started()
        async with server:
            await server.serve_forever()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                seen = await _read_request(reader)
                if seen.path == "/v1/models":
                    _write_json(writer, 200, {"data": [{"id": MODEL}]})
                elif not await self._answer(seen, writer):
                    return
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client has gone
        finally:
            writer.close()

    async def _answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        """Stream the scripted answer; False if the connection is to be cut."""
        reply = self._make_reply(seen.body)
        self.seen.append(seen)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            if reply.status != 200:
                _write_json(writer, reply.status, {"error": {"message": "as scripted"}})
                return True
            await self._stream(seen, reply, writer)
        finally:
            self.num_running -= 1
        return reply.extra is None or not reply.is_cut

    async def _stream(self, seen: Seen, reply: Reply, writer: asyncio.StreamWriter) -> None:
        is_chat = seen.path.endswith("/chat/completions")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        if is_chat:
            _write_event(writer, _chunk({"delta": {"role": "assistant", "content": ""}}))
        for number, piece in enumerate(reply.pieces):
            await asyncio.sleep(reply.gap_s if number else reply.first_s)
            choice = {"delta": {"content": piece}} if is_chat else {"text": piece}
            seen.written_at.append(time.perf_counter())
            _write_event(writer, _chunk(choice))
            await writer.drain()
        if reply.extra is not None:
            for line in reply.extra:
                _write_event(writer, line)
            if not reply.is_cut:
                writer.write(b"0\r\n\r\n")
            await writer.drain()
            return
        _write_event(writer, _chunk({"delta": {}, "finish_reason": "length"}))
        if reply.usage is not None:
            _write_event(writer, json.dumps({"choices": [], "usage": reply.usage}))
        _write_event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")


@contextmanager
def serving(make_reply: MakeReply) -> Iterator[ScriptedOpenAI]:
    """A scripted server in a thread of its own."""
    server = ScriptedOpenAI(make_reply)
    is_up = threading.Event()
    loop = asyncio.new_event_loop()
    task = loop.create_task(server.serve(0, is_up.set))

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            for other in asyncio.all_tasks(loop):
                other.cancel()
            loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert is_up.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)


def remember_prompts() -> MakeReply:
    """Replies of a server with a cache: prompts seen before are answered at once."""
    prompts: set[str] = set()

    def make_reply(body: dict[str, Any]) -> Reply:
        prompt = json.dumps(body.get("messages") or body.get("prompt"))
        is_cached = prompt in prompts
        prompts.add(prompt)
        details = {"cached_tokens": 64 if is_cached else 0}
        usage = {
            "prompt_tokens": 100,
            "completion_tokens": 3,
            "prompt_tokens_details": details,
        }
        return Reply(first_s=0.001 if is_cached else 0.1, gap_s=0.001, usage=usage)

    return make_reply


async def _read_request(reader: asyncio.StreamReader) -> Seen:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    came_at = time.perf_counter()
    first, *lines = head.split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    content = await reader.readexactly(int(headers.get("content-length", "0")))
    return Seen(first.split()[1], headers, json.loads(content or b"{}"), came_at)


def _chunk(choice: dict[str, Any]) -> str:
    chunk = {"choices": [{"index": 0, "finish_reason": None, **choice}]}
    return json.dumps(chunk, ensure_ascii=False)


def _write_event(writer: asyncio.StreamWriter, data: str) -> None:
    event = f"data: {data}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(event), event))


def _write_json(writer: asyncio.StreamWriter, status: int, value: Any) -> None:
    body = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)


if __name__ == "__main__":
    asyncio.run(ScriptedOpenAI(remember_prompts()).serve(int(sys.argv[1]), lambda: None))
