"""Connections whose clients are slow, silent or many: uvicorn's HTTP/1.1, with deadlines."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefixstore.server.config import ServerConfig
from prefixstore.server.errors import error_body

_LINGER_S = 1.0  # for a refused client to read why


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with a bound on how long a client may take to ask, and to read its answer.

    uvicorn itself ends connections that are idle between requests. Subclassed here, for it offers
    no other place; `limits` is set by `bound_protocol`.
    """

    limits: ServerConfig

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._asking: asyncio.TimerHandle | None = None  # running while a request is incomplete
        self._writing: asyncio.TimerHandle | None = None  # running while the client takes nothing
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
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._was_refused:
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_asking()
        elif self._asking is None and not self._was_refused and not self.transport.is_closing():
            # The first bytes of one more request on this connection.
            self._asking = self.loop.call_later(self.limits.header_timeout_s, self._give_up_asking)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_writing()
        self._writing = self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_writing()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # Closing waits until the last answer has been read.
        self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

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
        self.loop.call_later(_LINGER_S, self.transport.abort)

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
