"""Serve an application until a signal, then end in order: finish, flush, close."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from prefixstore.engine import Engine
from prefixstore.errors import ConfigError
from prefixstore.server.config import ServerConfig
from prefixstore.server.connections import bound_protocol
from prefixstore.server.lifecycle import Lifecycle

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_GRACE_S = 0.3  # requests that arrive this soon after shutdown began are answered with 503
_CUT_OFF_S = 5.0  # time to tell clients that their requests were cut off


def bind_address(config: ServerConfig) -> socket.socket:
    """A socket at the address that `config` says; nobody can connect before it is served, nor have
    the address meanwhile.

    Raises:
        ConfigError: If the address cannot be had, or others could reach it and nothing asks them
            for a key.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:  # the second if no host can have that name
        raise ConfigError(f"host: expected an address, got {config.host!r}: {error}") from error
    is_local = ipaddress.ip_address(address[0]).is_loopback
    if not is_local and config.api_keys_file is None and not config.allow_anonymous:
        raise ConfigError(
            f"host: expected a loopback address where there are no API keys, got {config.host!r};"
            " give --api-keys FILE, or --allow-anonymous to answer anyone"
        )
    # With its protocol named, not 0 as `socket.create_server` has it: only then does asyncio set
    # TCP_NODELAY, without which the second packet of each answer waits 40 ms for the client.
    listener = socket.socket(family, kind, protocol)
    try:
        _bind(listener, address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(config, error) from error
    return listener


def _bind(listener: socket.socket, address: Any) -> None:
    """Have an address that no other socket has, be it one that does not listen yet: two that
    allow it may bind one, and the second to listen would find that out after its model is loaded.
    """
    try:
        listener.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # Maybe by connections of a server before this one, which have ended.
        _allow_reuse(listener, True)
        listener.bind(address)
        _allow_reuse(listener, False)


def _allow_reuse(listener: socket.socket, is_allowed: bool) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, is_allowed)


def serve_until_signal(
    app: FastAPI, engine: Engine, config: ServerConfig, listener: socket.socket
) -> None:
    """Serve `app` until SIGTERM or SIGINT, then finish what was accepted, flush and close.

    Once it listens it prints a line of JSON: `{"event": "ready", "url": ..., "pid": ...}`.
    A second signal ends the process at once.

    Raises:
        ConfigError: If another process listens at the address by now, which some systems allow.
    """
    server = DrainingServer(app, engine, config, listener)
    try:
        try:
            # With it the connections that are left in the end are in no next server's way.
            _allow_reuse(listener, True)
            listener.listen(_BACKLOG)
        except OSError as error:
            raise _cannot_listen(config, error) from error
        server.run(sockets=[listener])
    finally:
        logger.info("flushing the cache")
        if not engine.cache.flush(config.flush_timeout_s):
            logger.warning("not everything was written within %g s", config.flush_timeout_s)
        engine.close()


class DrainingServer(uvicorn.Server):
    """uvicorn, that drains the engine before it stops listening."""

    def __init__(
        self, app: FastAPI, engine: Engine, config: ServerConfig, listener: socket.socket
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                backlog=_BACKLOG,
                http=bound_protocol(config),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="on",
                timeout_keep_alive=config.idle_timeout_s,  # type: ignore[arg-type]
                timeout_graceful_shutdown=config.write_timeout_s,  # type: ignore[arg-type]
            )
        )
        self._engine = engine
        self._config = config
        self._url = _url(listener)
        self._lifecycle: Lifecycle = app.state.lifecycle
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        print(json.dumps({"event": "ready", "url": self._url, "pid": os.getpid()}), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the door, then answer those who stand inside before the connections are closed."""
        for _ in range(2):  # two turns of the event loop accept connections in the backlog
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        await asyncio.sleep(_GRACE_S)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In place of uvicorn's, which stops listening before requests are finished."""
        if self._lifecycle.is_draining or self._loop is None:
            try:
                sys.stderr.flush()  # raises if the signal interrupted a write to it
            finally:
                os._exit(128 + sig)
        self._lifecycle.is_draining = True
        self._loop.call_soon_threadsafe(self._begin_draining, signal.Signals(sig).name)

    def _begin_draining(self, signal_name: str) -> None:
        logger.info("%s: finishing what was accepted", signal_name)
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        timeout_s = self._config.drain_timeout_s
        loop, lifecycle = asyncio.get_running_loop(), self._lifecycle
        deadline = loop.time() + timeout_s
        try:
            # Requests still being read are not in the engine yet, so it is drained only after them.
            is_idle = await lifecycle.wait_idle(timeout_s)
            left_s = max(0.0, deadline - loop.time())
            if not await asyncio.to_thread(self._engine.drain, left_s) or not is_idle:
                num_left = lifecycle.cut_off()
                logger.warning("cut off %d requests after %g s", num_left, timeout_s)
                await asyncio.to_thread(self._engine.drain, _CUT_OFF_S)
                await lifecycle.wait_idle(_CUT_OFF_S)
        finally:
            self.should_exit = True


def _cannot_listen(config: ServerConfig, error: OSError) -> ConfigError:
    where = f"{config.host} port {config.port}"
    return ConfigError(f"host, port: cannot listen on {where}: {error.strerror}")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
