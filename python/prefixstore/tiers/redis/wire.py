"""Commands and replies of Redis over one socket, with no copy of what is large.

    send     header | the caller's memory | CRLF     gathered by the kernel
    receive  "$4194336 CRLF" | the caller's memory | CRLF     scattered by the kernel

The bytes are moved and read by the extension (`csrc/resp`), without the interpreter's lock; those
of TLS by Python's sockets, piece by piece. Everything is non-blocking but `take_turn`, which waits
for many channels at once.
"""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

from prefixstore.tiers.redis.address import Address

try:
    from _kvkernels import RespBatch, RespChannel, resp_take_turn
    from _kvkernels import RespStreamError as StreamError
except ImportError as error:
    raise ImportError(
        "prefixstore.tiers.redis needs the compiled extension _kvkernels with RespChannel: install"
        " a wheel, or build it with `pip install -e .`"
    ) from error

Buffer: TypeAlias = "bytes | memoryview"
Word: TypeAlias = "bytes | tuple[Buffer, ...]"
Reply: TypeAlias = "bytes | int | list[Any] | ErrorReply | None"

UNANSWERED: Final = object()

_TLS_PIECE_BYTES = 64 << 10  # given to TLS in one call; it makes records of 16 KiB of it
_RECEIVE_BYTES = 1 << 20  # read from one channel before others have their turn


class ErrorReply(Exception):
    """A server's answer that begins with a minus, such as `OOM command not allowed ...`."""

    @property
    def code(self) -> str:
        """Its first word."""
        return str(self).partition(" ")[0]


@dataclass(eq=False)
class Command:
    """What is sent, and where its reply goes.

    Attributes:
        args: Its words, the key second. One that is a tuple is one word made of several buffers,
            flat; those that are no `bytes` are not copied and must stay as they are until the reply
            is there.
        into: Buffers to be filled, in order, with a reply that is a string, which is then only
            counted. What they have no room for is read and dropped. A reply that is an integer,
            such as `:5`, is those bytes, so that it is no such count.
        address: The server; None for the one that holds the key.
        is_optional: Whether all is well when the server refuses it: its reply is then None.
    """

    args: Sequence[Word]
    into: Sequence[memoryview] | None = None
    address: Address | None = None
    is_optional: bool = False

    @property
    def key(self) -> bytes:
        """What decides in a cluster which server gets it."""
        key = self.args[1]
        assert isinstance(key, bytes)
        return key

    @cached_property
    def num_bytes(self) -> int:
        """About how much it moves, to or fro."""
        sent = sum(sum(map(len, arg)) for arg in self.args if isinstance(arg, tuple))
        return sent + sum(map(len, self.into or ()))


class Channel:
    """One connection: commands queue up, replies come in their order.

    Args:
        sock: Connected and ready for commands, plain or TLS. Its owner closes it.
    """

    def __init__(self, sock: socket.socket | ssl.SSLSocket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.is_tls = isinstance(sock, ssl.SSLSocket)
        self.native = RespChannel(-1 if self.is_tls else sock.fileno(), ErrorReply)
        # TLS must be given the same bytes again after a partial write.
        self._unsent = memoryview(b"")
        self._failure = ""

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def has_output(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._unsent) or self.native.has_output

    @property
    def num_awaited(self) -> int:
        """Commands without their reply."""
        return self.native.num_awaited

    @property
    def awaited_bytes(self) -> int:
        """About what those move."""
        return self.native.awaited_bytes

    @property
    def failure(self) -> str:
        """Why the connection cannot be used any more; empty while it can."""
        return self._failure or self.native.failure

    @property
    def is_late(self) -> bool:
        """Whether it failed because a reply did not come in time."""
        return self.native.is_late

    def push(self, command: Command, ticket: object = None) -> None:
        """Queue a command; `take_turn` sends it. `ticket` comes back with its reply."""
        self.native.push(command.args, command.into, command.num_bytes, ticket)

    def take_answers(self) -> list[tuple[Any, Reply]]:
        """The tickets and replies that have come, each once."""
        return self.native.take_answers()

    def abandon(self) -> list[Any]:
        """The tickets of the commands whose replies will not come."""
        self._unsent = memoryview(b"")
        return self.native.abandon()

    def flush(self) -> None:
        """Send what the socket takes now.

        Raises:
            StreamError: If the connection ended.
        """
        if not self.is_tls:
            self.native.flush()
            return
        try:
            while self.has_output:
                if not self._unsent:
                    self._unsent = memoryview(self.native.take_output(_TLS_PIECE_BYTES))
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError as error:
            raise StreamError(f"while sending: {error}") from error

    @property
    def has_input(self) -> bool:
        """Whether TLS has bytes that came and were not read: polling the socket does not tell."""
        return isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0

    def receive(self) -> None:
        """Read what is there now, for `take_answers`; of much, a part.

        Raises:
            StreamError: If the connection ended or does not speak the protocol.
        """
        if not self.is_tls:
            self.native.receive(_RECEIVE_BYTES)
            return
        latest = self.native.num_received + _RECEIVE_BYTES
        try:
            while num_bytes := self._sock.recv_into(self.native.next_input()):
                self.native.received(num_bytes)
                if self.native.num_received >= latest:
                    return
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError as error:
            raise StreamError(f"while receiving: {error}") from error
        raise StreamError("the server closed the connection")

    def try_to(self, move: Callable[[], None]) -> None:
        """Flush or receive; an error is the channel's failure."""
        try:
            move()
        except StreamError as error:
            self._failure = str(error)


def take_turn(channels: Sequence[Channel], timeout_s: float) -> None:
    """Send and receive on all channels, each of which awaits a reply, until there are enough
    answers to go on with, one has no more to come or has failed, or the time is over.
    """
    if not any(channel.is_tls for channel in channels):
        resp_take_turn([channel.native for channel in channels], timeout_s)
        return
    poll = select.poll()
    for channel in channels:
        channel.try_to(channel.flush)
        poll.register(channel, select.POLLIN | (select.POLLOUT if channel.has_output else 0))
    is_over = any(channel.failure or channel.has_input for channel in channels)
    ready = {fd for fd, _ in poll.poll(0 if is_over else timeout_s * 1e3)}
    for channel in channels:
        if channel.fileno() in ready or channel.has_input:
            channel.try_to(channel.receive)


def open_batch(batch: RespBatch, lanes: Sequence[Sequence[Channel]]) -> None:
    """Give a batch the channels of its lanes, which must be plain, until it is run or closed. One
    that then owes a reply has failed.
    """
    batch.open([[channel.native for channel in lane] for lane in lanes])


def run_batch(batch: RespBatch, timeout_s: float) -> list[Any]:
    """Run an open batch's commands. The replies, or `UNANSWERED`."""
    return batch.run(timeout_s, ErrorReply, UNANSWERED)
