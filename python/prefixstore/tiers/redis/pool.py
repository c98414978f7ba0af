"""Connections to servers, opened when needed and kept while they are in step."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Sequence

from prefixstore.errors import TierError, TierTimeout, TierUnavailable
from prefixstore.tiers.redis.address import Address
from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.redis.errors import (
    ConnectionLost,
    PassingTrouble,
    ServerSilent,
    tier_error,
)
from prefixstore.tiers.redis.sockets import open_socket
from prefixstore.tiers.redis.wire import (
    Channel,
    Command,
    ErrorReply,
    Reply,
    StreamError,
    take_turn,
)

MAX_IDLE = 16  # to each server: more threads than this at once open connections anew

_LOGIN_ERRORS = ("NOAUTH", "NOPERM", "WRONGPASS")


class PooledChannel(Channel):
    """A channel, and its socket, which it closes."""

    def __init__(self, sock: socket.socket | ssl.SSLSocket, address: Address) -> None:
        super().__init__(sock)
        self.address = address
        self._pid = os.getpid()
        self._received_before = 0

    def lend(self) -> PooledChannel:
        """Itself, to whoever borrows it."""
        self._received_before = self.native.num_received
        return self

    @property
    def has_received(self) -> bool:
        """Whether anything has come since it was lent, be it a part of a reply."""
        return self.native.num_received > self._received_before

    def close(self) -> None:
        if os.getpid() == self._pid:  # a forked process closes its own descriptor alone
            with contextlib.suppress(OSError):  # it has ended
                self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def is_quiet(self) -> bool:
        """Whether it is as it was left: a server that has gone shows as something to read."""
        poll = select.poll()
        poll.register(self, select.POLLIN)
        return not self.has_input and not poll.poll(0)


class Pool:
    """Connections that are open and unused, by server. Thread-safe and fork-safe.

    Args:
        config: The tier's.
        login: What a server is told first.
    """

    def __init__(self, config: RedisTierConfig, login: Sequence[Command]) -> None:
        self._config = config
        self._name = config.name
        self._login = login
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
            TierTimeout: If there is no time left; `ServerSilent` if it does not answer in time.
        """
        self.check_open()
        if time.monotonic() >= deadline:
            raise TierTimeout(f"{self._name}: {address}: no time left to ask")
        while (channel := self._take_idle(address)) is not None:
            if channel.is_quiet():
                return channel.lend()
            channel.close()
        latest = time.monotonic() + self._config.connect_timeout_s
        try:
            return self._open(address, min(deadline, latest)).lend()
        except (OSError, UnicodeError, StreamError, ErrorReply) as error:
            raise self._translated(error, address) from error

    def has_idle(self, address: Address) -> bool:
        """Whether a connection to a server is at hand."""
        return bool(self._idle.get(address))

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
            (reply,) = _exchange(channel, [Command(args)], deadline)
        except ErrorReply as error:
            raise tier_error(self._name, error) from None
        except StreamError as error:
            raise ConnectionLost(f"{self._name}: {address}: {error}") from error
        except TimeoutError:
            raise TierTimeout(f"{self._name}: {address}: no answer in time") from None
        finally:
            self.give_back(channel)
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

    def _open(self, address: Address, deadline: float) -> PooledChannel:
        channel = PooledChannel(open_socket(address, self._config.tls, deadline), address)
        try:
            _exchange(channel, self._login, deadline)
        except BaseException:
            channel.close()
            raise
        return channel

    def _translated(self, error: Exception, address: Address) -> TierError:
        """What it means that a connection could not be opened."""
        message = f"{self._name}: {address}: {error}"
        if isinstance(error, ErrorReply):
            if error.code in _LOGIN_ERRORS:
                hint = "user and password are in the URL or environment"
                return TierUnavailable(f"{message} ({hint})")
            return tier_error(self._name, error)
        if isinstance(error, TimeoutError):
            return ServerSilent(message)
        if isinstance(error, (StreamError, ConnectionResetError, BrokenPipeError)):
            return ConnectionLost(message)
        return PassingTrouble(message) if isinstance(error, OSError) else TierUnavailable(message)


def _exchange(channel: Channel, commands: Sequence[Command], deadline: float) -> list[Reply]:
    """Send commands, and wait for their replies.

    Raises:
        ErrorReply: The first one.
        StreamError: If the connection ended.
        TimeoutError: If a reply is missing at the deadline.
    """
    replies: list[Reply] = []
    for command in commands:
        channel.push(command)
    while True:
        for _, reply in channel.take_answers():
            if isinstance(reply, ErrorReply):
                raise reply
            replies.append(reply)
        if len(replies) == len(commands):
            return replies
        if channel.failure:
            raise StreamError(channel.failure)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("no answer in time")
        take_turn([channel], remaining)


def data_login(config: RedisTierConfig) -> list[Command]:
    """What the servers that hold the records are told first."""
    username, password = config.credentials
    login = sentinel_login(config)
    if username is not None:  # of an ACL, perhaps without a password
        login.insert(0, Command((b"AUTH", username.encode(), (password or "").encode())))
    elif password is not None:
        login.insert(0, Command((b"AUTH", password.encode())))
    if config.db:
        login.append(Command((b"SELECT", b"%d" % config.db)))
    return login


def sentinel_login(config: RedisTierConfig) -> list[Command]:
    """What sentinels are told first, which know neither our user nor databases."""
    return [Command((b"CLIENT", b"SETNAME", f"kvkernels-{config.name}".encode()))]
