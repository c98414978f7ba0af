"""Connections to servers, opened when needed and kept while they are in step."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from prefixstore.errors import TierError, TierTimeout, TierUnavailable
from prefixstore.tiers.redis.config import Address, RedisTierConfig
from prefixstore.tiers.redis.errors import ConnectionLost, PassingTrouble, tier_error
from prefixstore.tiers.redis.wire import (
    Channel,
    Command,
    ErrorReply,
    Reply,
    StreamError,
    take_turn,
)

MAX_IDLE = 16  # to each server: more threads than this at once open connections anew

_UNIX_SEND_BYTES = 4 << 20  # the kernel gives what it allows

Connect = Callable[[Address, float], AbstractConnection]


class PooledChannel(Channel):
    """A channel and the connection of redis-py whose socket it uses."""

    def __init__(self, connection: AbstractConnection, address: Address) -> None:
        super().__init__(_socket_of(connection))
        self.address = address
        self._connection = connection

    def close(self) -> None:
        self._connection.disconnect()  # in a forked process it only closes its own descriptor

    def is_quiet(self) -> bool:
        """Whether it is as it was left: a server that has gone shows as something to read."""
        poll = select.poll()
        poll.register(self, select.POLLIN)
        return not poll.poll(0)


class Pool:
    """Connections that are open and unused, by server. Thread-safe and fork-safe.

    Args:
        name: Of the tier, in messages.
        connect: Opens one within so many seconds.
    """

    def __init__(self, name: str, connect: Connect) -> None:
        self._name = name
        self._connect = connect
        self._is_closed = False
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._idle: dict[Address, list[PooledChannel]] = defaultdict(list)

    def borrow(self, address: Address, deadline: float) -> PooledChannel:
        """A connection for this thread alone, to be given back or dropped.

        Raises:
            TierUnavailable: If the server refuses, or the pool is closed.
            TierTimeout: If it does not answer in time.
        """
        while (channel := self._take_idle(address)) is not None:
            if channel.is_quiet():
                return channel
            channel.close()
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TierTimeout(f"{self._name}: {address}: no time left to connect")
        try:
            return PooledChannel(self._connect(address, remaining), address)
        except redis.RedisError as error:
            raise self._translated(error, address) from error

    def give_back(self, channel: PooledChannel) -> None:
        """One that is whole and awaits no reply; any other is closed."""
        is_in_step = channel.num_awaited == 0 and not channel.has_output and not channel.failure
        with self._lock:
            idle = self._idle[channel.address]
            if is_in_step and len(idle) < MAX_IDLE and not self._is_closed:
                idle.append(channel)
                return
        channel.close()

    def ask(self, address: Address, args: Sequence[bytes], deadline: float) -> Reply:
        """One command, one reply.

        Raises:
            TierError: If the server cannot be asked, or answers with an error.
        """
        channel = self.borrow(address, deadline)
        try:
            reply = _exchange(channel, Command(args), deadline)
        except StreamError as error:
            raise ConnectionLost(f"{self._name}: {address}: {error}") from error
        except TimeoutError:
            raise TierTimeout(f"{self._name}: {address}: no answer in time") from None
        finally:
            self.give_back(channel)
        if isinstance(reply, ErrorReply):
            raise tier_error(self._name, reply)
        return reply

    def check_open(self) -> None:
        """Raise `TierUnavailable` if it is closed."""
        if self._is_closed:
            raise TierUnavailable(f"{self._name}: expected an open tier, got a closed one")

    def close(self) -> None:
        """Close what is unused; what is in use is closed when it is given back."""
        with self._lock:
            self._is_closed = True
            channels = [channel for idle in self._idle.values() for channel in idle]
            self._idle.clear()
        for channel in channels:
            channel.close()

    def _take_idle(self, address: Address) -> PooledChannel | None:
        if self._pid != os.getpid():  # the parent's connections, and a lock as it was just then
            parents = [channel for idle in self._idle.values() for channel in idle]
            self._reset()
            for channel in parents:
                channel.close()
        with self._lock:
            self.check_open()
            idle = self._idle[address]
            return idle.pop() if idle else None

    def _translated(self, error: redis.RedisError, address: Address) -> TierError:
        message = f"{self._name}: {address}: {error}"
        if isinstance(error, redis.TimeoutError):
            return TierTimeout(message)
        if isinstance(error, (redis.AuthenticationError, NoPermissionError)):
            return TierUnavailable(f"{message} (user and password are in the URL or environment)")
        if isinstance(error, redis.ConnectionError) and not isinstance(
            error, redis.BusyLoadingError
        ):
            was_cut = isinstance(error.__context__, (ConnectionResetError, BrokenPipeError))
            if was_cut or "closed" in str(error):
                return ConnectionLost(message)
            return PassingTrouble(message)
        return TierUnavailable(message)


def _exchange(channel: Channel, command: Command, deadline: float) -> Reply:
    channel.push(command)
    while True:
        for _, reply in channel.take_answers():
            return reply
        if channel.failure:
            raise StreamError(channel.failure)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        take_turn([channel], remaining)


def data_connect(config: RedisTierConfig) -> Connect:
    """Opens connections to the servers that hold the records."""
    username, password = config.credentials
    if username is not None and password is None:
        password = ""  # a user of ACL without a password
    return partial(_connect, config, username=username, password=password, db=config.db)


def sentinel_connect(config: RedisTierConfig) -> Connect:
    """Opens connections to sentinels, which know neither our user nor databases."""
    return partial(_connect, config, username=None, password=None, db=0)


def _connect(
    config: RedisTierConfig,
    address: Address,
    timeout_s: float,
    username: str | None,
    password: str | None,
    db: int,
) -> AbstractConnection:
    timeout_s = min(timeout_s, config.connect_timeout_s)
    common: dict[str, Any] = {
        "username": username,
        "password": password,
        "db": db,
        "client_name": f"kvkernels-{config.name}",
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    connection: AbstractConnection
    if address.port == 0:
        connection = redis.UnixDomainSocketConnection(  # type: ignore[abstract]
            path=address.host, **common
        )
    elif config.tls is None:
        connection = redis.Connection(host=address.host, port=address.port, **common)
    else:
        tls = config.tls
        connection = redis.SSLConnection(
            host=address.host,
            port=address.port,
            ssl_ca_certs=None if tls.ca_file is None else str(tls.ca_file),
            ssl_certfile=None if tls.cert_file is None else str(tls.cert_file),
            ssl_keyfile=None if tls.key_file is None else str(tls.key_file),
            ssl_cert_reqs="required" if tls.verify else "none",
            ssl_check_hostname=tls.verify,
            **common,
        )
    connection.connect()
    if address.port == 0:  # those of TCP grow by themselves
        _socket_of(connection).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BYTES)
    return connection


def _socket_of(connection: AbstractConnection) -> socket.socket:
    """The socket that redis-py connected and authenticated."""
    return cast(Any, connection)._sock
