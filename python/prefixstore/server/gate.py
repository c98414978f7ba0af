"""What every request passes first: its id, its key, and its body within bounds; last, its log line.

A plain ASGI middleware: it sees a body before anything parses it, and leaves streams alone.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import logging
import re
import time
import uuid
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefixstore.server.config import ServerConfig
from prefixstore.server.errors import ApiError, internal_error, shutting_down
from prefixstore.server.generation import Disconnected
from prefixstore.server.keys import ANONYMOUS, ApiKeys, Caller
from prefixstore.server.lifecycle import Lifecycle
from prefixstore.server.request_log import log_request

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
API = "/v1/"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Of too large a body, this many times the limit is read and dropped: most clients read the answer
# only once they have sent everything.
_DROPPED_BODIES = 4


class Gate:
    """Lets requests through to `app` that have a key and a body of acceptable size."""

    def __init__(
        self, app: ASGIApp, config: ServerConfig, keys: ApiKeys | None, lifecycle: Lifecycle
    ) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passage = _Passage(scope, send, self._lifecycle)
        try:
            receive = await self._admit(scope, receive)
            if isinstance(receive, _Replay):
                with self._lifecycle.accepted():
                    await self._app(scope, receive, passage.send)
            else:
                await self._app(scope, receive, passage.send)
        except ApiError as error:
            await error.response()(scope, receive, passage.send)
        except Disconnected:
            passage.status = 499
        except asyncio.CancelledError:
            # uvicorn cancels what is still running at its end.
            if passage.status is not None or not self._lifecycle.is_draining:
                raise
            await shutting_down().response()(scope, receive, passage.send)
        except Exception:
            # The outermost place where an error of ours can still be answered.
            logger.exception("request %s failed", passage.request_id)
            if passage.status is not None:
                raise  # mid-answer: the connection is cut, so that the client notices
            await internal_error().response()(scope, receive, passage.send)
        finally:
            passage.log()

    async def _admit(self, scope: Scope, receive: Receive) -> Receive:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN_PATHS:
            return receive
        headers = Headers(scope=scope)
        if self._keys is None and not self._config.allow_anonymous:
            _check_host(headers)
        is_api = path.startswith(API)
        scope["state"]["caller"] = self._authenticate(headers, is_api)
        if not is_api or scope["method"] != "POST":
            return receive
        self._check_open()
        _check_content_type(headers)
        try:
            body = await asyncio.wait_for(
                _read_body(receive, headers, self._config.max_body_bytes),
                self._config.body_timeout_s,
            )
        except asyncio.TimeoutError:
            message = f"body: expected within {self._config.body_timeout_s:g} s"
            raise ApiError(408, message, headers={"connection": "close"}) from None
        self._check_open()
        return _Replay(body, receive)

    def _check_open(self) -> None:
        if self._lifecycle.is_draining:
            raise shutting_down()

    def _authenticate(self, headers: Headers, is_api: bool) -> Caller:
        if self._keys is None:
            return ANONYMOUS
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        key = credentials.strip() if scheme.lower() == "bearer" else ""
        if scheme.lower() == "basic" and not is_api:
            key = _password(credentials)
        caller = self._keys.find(key) if key else None
        if caller is None or not (is_api or caller.is_operator):
            # "Basic" makes browsers ask for a password: right for the pages, wrong for the API.
            challenge = "Bearer" if is_api else 'Basic realm="an operator\'s key as password"'
            what = "an API key" if is_api else "an operator's API key"
            raise ApiError(
                401,
                f"authorization: expected {what}, got {'another' if key else 'none'}",
                code="invalid_api_key",
                headers={"www-authenticate": challenge},
            )
        return caller


class _Passage:
    """One request on its way through: its id, what was answered, and its log line."""

    def __init__(self, scope: Scope, send: Send, lifecycle: Lifecycle) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.status: int | None = None
        self._scope = scope
        self._send = send
        self._lifecycle = lifecycle
        self._started = time.perf_counter()
        self._fields: dict[str, Any] = {}
        state = scope.setdefault("state", {})
        state["request_id"] = self.request_id
        state["log_fields"] = self._fields

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            if self._lifecycle.is_draining:
                headers["connection"] = "close"
        await self._send(message)

    def log(self) -> None:
        path = self._scope["path"].removeprefix(self._scope.get("root_path", ""))
        if not path.startswith(API):
            return
        caller = self._scope["state"].get("caller")
        log_request(
            request_id=self.request_id,
            method=self._scope["method"],
            path=path[:128],
            status=499 if self.status is None else self.status,
            tenant=caller.tenant if caller else None,
            duration_s=round(time.perf_counter() - self._started, 6),
            **self._fields,
        )


class _Replay:
    """The `receive` of a request whose body was read: gives it once, then what comes after it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _read_body(receive: Receive, headers: Headers, max_bytes: int) -> bytes:
    declared = headers.get("content-length", "")
    is_too_large = declared.isdecimal() and int(declared) > max_bytes
    if is_too_large and headers.get("expect", "").lower() == "100-continue":
        raise _too_large(max_bytes)  # the client has not sent the body yet
    chunks: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            is_too_large = True
        if is_too_large:
            chunks.clear()
            if num_bytes > _DROPPED_BODIES * max_bytes:
                raise _too_large(max_bytes)
        else:
            chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    if is_too_large:
        raise _too_large(max_bytes)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> ApiError:
    message = f"body: expected at most {max_bytes} bytes, got more"
    headers = {"connection": "close"}
    return ApiError(413, message, code="body_too_large", headers=headers)


def _check_host(headers: Headers) -> None:
    # DNS rebinding: another site may point its own name at 127.0.0.1, so that its pages can ask
    # this server through a visitor's browser. The Host header gives it away.
    given = headers.get("host", "")
    try:
        name = urlsplit(f"//{given}").hostname or ""
        is_local = name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        is_local = False
    if not is_local:
        message = f"host: expected localhost or its address where there are no keys, got {given!r}"
        raise ApiError(403, message, code="host_not_allowed")


def _check_content_type(headers: Headers) -> None:
    # Also keeps pages of other sites out: browsers ask the server's permission before they send
    # this type across sites, and it is never given.
    given = headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"content-type: expected application/json, got {given!r}")


def _password(credentials: str) -> str:
    try:
        text = base64.b64decode(credentials, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return text.partition(":")[2]
