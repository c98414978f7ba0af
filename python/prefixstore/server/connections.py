"""Connections whose clients are slow, silent or many: uvicorn's HTTP/1.1, with deadlines."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefixstore.server.config import ServerConfig
from prefixstore.server.errors import error_body

if sys.platform == "linux":
    from fcntl import ioctl
    from termios import TIOCOUTQ

_LINGER_S = 1.0  # for a refused client to read why


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with a bound on how long a client may take to ask, and to read its answer.

    uvicorn itself ends connections that are idle between requests. Subclassed here, for it offers
    no other place; `limits` is set by `bound_protocol`.
    """

    limits: ServerConfig

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._app, self.app = self.app, self._run_app
        self._asking: asyncio.TimerHandle | None = None  # running while a request is incomplete
        self._writing: asyncio.TimerHandle | None = None  # running while the client has to read
        self._num_unread = 0  # bytes, when it was last looked whether the client reads
        self._lingering: asyncio.TimerHandle | None = None  # running once the client was refused
        self._was_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, "too many connections")
            return
        self._asking = self.loop.call_later(self.limits.header_timeout_s, self._give_up_asking)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_asking()
        self._stop_writing()
        self._unset_keepalive_if_required()
        if self._lingering is not None:
            self._lingering.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._was_refused:
            return
        was_answered_early = self._is_answered_early
        super().data_received(data)
        if self._is_answered_early:
            return
        if self.conn.their_state is not h11.IDLE or was_answered_early:
            self._stop_asking()
        if (
            self.conn.their_state is h11.IDLE
            and self._asking is None
            and not self._was_refused
            and not self.transport.is_closing()
        ):
            if self.conn.trailing_data[0]:  # the first bytes of one more request
                wait_s = self.limits.header_timeout_s
                self._asking = self.loop.call_later(wait_s, self._give_up_asking)
            else:  # the rest of one that has its answer: the connection is idle, as uvicorn has it
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

    def eof_received(self) -> None:
        super().eof_received()
        self._watch_reading()  # closed next, once all is read

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_answered_early and not self.transport.is_closing():
            # uvicorn would wait for ever for the rest of what was asked.
            self._stop_asking()
            self._asking = self.loop.call_later(self.limits.body_timeout_s, self._give_up_asking)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_closing()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch_closing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    async def _run_app(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            self.loop.call_soon(self._watch_closing)  # after uvicorn, which may close it now

    @property
    def _is_answered_early(self) -> bool:
        """Whether the client is still to send the rest of a request that has its answer."""
        is_answered = self.cycle is not None and self.cycle.response_complete
        return is_answered and self.conn.their_state is h11.SEND_BODY

    def _give_up_asking(self) -> None:
        self._asking = None
        self._refuse(408, f"expected a request within {self.limits.header_timeout_s:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Answer what never became a request, or cut off what has an answer on its way."""
        self._stop_asking()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # whoever reads the body, or answers, is told to stop
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        content = json.dumps(error_body(status, message)).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(content))),
            ("connection", "close"),
        ]
        response = h11.Response(status_code=status, headers=headers)
        for event in (response, h11.Data(content), h11.EndOfMessage()):
            sent = self.conn.send(event)
            if sent:
                self.transport.write(sent)
        # Closing while the client still sends would take back what it has not yet read.
        self._was_refused = True
        self.transport.write_eof()
        self._lingering = self.loop.call_later(_LINGER_S, self.transport.abort)

    def _watch_closing(self) -> None:
        """Closing waits until the last answer has been read: not for ever."""
        if self.transport.is_closing() and self in self.connections:
            self._watch_reading()

    def _watch_reading(self) -> None:
        """Cut the client off once it has read nothing for so long; closing waits for it too."""
        self._stop_writing()
        self._num_unread = self._count_unread()
        self._writing = self.loop.call_later(self.limits.write_timeout_s, self._check_reading)

    def _check_reading(self) -> None:
        if self._count_unread() < self._num_unread:
            self._watch_reading()
        else:
            self.transport.abort()

    def _count_unread(self) -> int:
        """Bytes that the client has not taken, as far as is known here."""
        num_unread: int = self.transport.get_write_buffer_size()
        if sys.platform == "linux":
            # The system holds megabytes, and asks for more only once a third of them is gone.
            held = ioctl(self.transport.get_extra_info("socket").fileno(), TIOCOUTQ, bytes(4))
            num_unread += int.from_bytes(held, sys.byteorder)
        return num_unread

    def _stop_asking(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None


def bound_protocol(config: ServerConfig) -> type[BoundedProtocol]:
    """The protocol with the limits of `config`, as uvicorn takes it."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": config})
