"""Commands and replies of Redis over one socket, with no copy of what is large.

    send     header | the caller's memory | CRLF     gathered by the kernel (sendmsg)
    receive  "$4194336 CRLF" | the caller's memory | CRLF     scattered by recv_into

Everything is non-blocking: whoever has several channels waits for all of them at once, and since a
channel is read whenever there is something to read, no amount of commands under way can make both
sides wait for each other.
"""

from __future__ import annotations

import socket
import ssl
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeAlias

from prefixstore.tiers.redis.config import Address

Buffer: TypeAlias = "bytes | memoryview"
Reply: TypeAlias = "bytes | int | list[Any] | ErrorReply | None"
_Parsing: TypeAlias = "Generator[_Told, None, Any]"
_Told: TypeAlias = "tuple[Command, Reply] | None"  # None: the socket has nothing more for now

_INPUT_BYTES = 64 << 10
_LINE_BYTES = 512  # read before a reply that goes elsewhere: what comes along is copied once more
_DISCARD_BYTES = 256 << 10
_MAX_BULK_BYTES = 512 << 20  # proto-max-bulk-len
_MAX_ELEMENTS = 1 << 20
_MAX_DEPTH = 8
_MAX_PIECES = 64  # of one sendmsg; the kernel takes 1,024
_SMALL_BYTES = 16 << 10  # smaller ones leave together where there is no sendmsg


class StreamError(Exception):
    """The connection ended, or what came is not the protocol: it cannot be used any more."""


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
            counted. What they have no room for is read and dropped.
        address: The server; None for the one that holds the key.
        is_optional: Whether all is well when the server refuses it: its reply is then None.
    """

    args: Sequence[bytes | tuple[Buffer, ...]]
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

    def encode(self) -> list[Buffer]:
        """The bytes on the wire, in pieces."""
        pieces: list[Buffer] = []
        text = [b"*%d\r\n" % len(self.args)]
        for arg in self.args:
            if isinstance(arg, bytes):
                text.append(b"$%d\r\n%b\r\n" % (len(arg), arg))
                continue
            text.append(b"$%d\r\n" % sum(map(len, arg)))
            for piece in arg:
                if isinstance(piece, bytes):  # a manifest: short
                    text.append(piece)
                elif len(piece):
                    pieces += [b"".join(text), piece]
                    text = []
            text.append(b"\r\n")
        pieces.append(b"".join(text))
        return pieces


class Channel:
    """One connection: commands queue up, replies come in their order.

    Args:
        sock: Connected and ready for commands, plain or TLS. Its owner closes it.
    """

    def __init__(self, sock: socket.socket | ssl.SSLSocket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._outgoing: deque[memoryview] = deque()
        self._awaiting: deque[Command] = deque()
        self._input = bytearray(_INPUT_BYTES)
        self._start = self._end = 0  # of what was read and not yet used
        self._is_drained = False
        self._parser = self._parse()
        self._awaited_bytes = 0

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def has_output(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._outgoing)

    @property
    def num_awaited(self) -> int:
        """Commands without their reply."""
        return len(self._awaiting)

    @property
    def awaited_bytes(self) -> int:
        """About what those move."""
        return self._awaited_bytes

    def abandon(self) -> list[Command]:
        """The commands whose replies will not come."""
        commands = list(self._awaiting)
        self._awaiting.clear()
        self._awaited_bytes = 0
        self._outgoing.clear()
        return commands

    def push(self, command: Command) -> None:
        """Queue a command; `flush` sends it."""
        self._outgoing.extend(map(memoryview, command.encode()))
        self._awaiting.append(command)
        self._awaited_bytes += command.num_bytes

    def flush(self) -> None:
        """Send what the socket takes now.

        Raises:
            StreamError: If the connection ended.
        """
        outgoing = self._outgoing
        try:
            while outgoing:
                num_sent = self._send()
                while outgoing and num_sent >= len(outgoing[0]):
                    num_sent -= len(outgoing.popleft())
                if num_sent:  # the socket is full: another try would be in vain
                    outgoing[0] = outgoing[0][num_sent:]
                    return
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError as error:
            raise StreamError(f"while sending: {error}") from error

    def _send(self) -> int:
        outgoing = self._outgoing
        if not isinstance(self._sock, ssl.SSLSocket):
            return self._sock.sendmsg(list(islice(outgoing, _MAX_PIECES)))
        # A TLS record for each small piece would cost more than the copy. A send that was refused
        # must be repeated with the same bytes, which therefore become the queue's first piece.
        if len(outgoing[0]) < _SMALL_BYTES and len(outgoing) > 1:
            joined = bytearray()
            while outgoing and len(joined) + len(outgoing[0]) <= _SMALL_BYTES:
                joined += outgoing.popleft()
            outgoing.appendleft(memoryview(joined))
        return self._sock.send(outgoing[0])

    def receive(self) -> Iterator[tuple[Command, Reply]]:
        """The replies that are there now, each with its command.

        Raises:
            StreamError: If the connection ended or does not speak the protocol.
        """
        self._is_drained = False
        for told in self._parser:
            if told is None:
                return
            yield told

    # ---- the parser: yields None where the socket has nothing more -----------------------------

    def _parse(self) -> Generator[_Told, None, None]:
        while True:
            reply = yield from self._read_reply(0)
            if not self._awaiting:
                raise StreamError(f"a reply that nobody asked for: {reply!r:.100}")
            command = self._awaiting.popleft()
            self._awaited_bytes -= command.num_bytes
            yield command, reply

    def _into(self) -> Sequence[memoryview] | None:
        """Where the next reply goes. To be asked when it begins: until then nobody may wait."""
        return self._awaiting[0].into if self._awaiting else None

    def _read_reply(self, depth: int) -> _Parsing:
        line = yield from self._read_line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return ErrorReply(rest.decode(errors="replace"))
        try:
            number = int(rest)
        except ValueError:
            raise StreamError(f"expected a reply, got {line!r:.100}") from None
        if kind == b":":
            return number
        if kind == b"$" and -1 <= number <= _MAX_BULK_BYTES:
            into = self._into() if depth == 0 else None
            return None if number < 0 else (yield from self._read_bulk(number, into))
        if kind == b"*" and -1 <= number <= _MAX_ELEMENTS and depth < _MAX_DEPTH:
            replies: list[Reply] = []
            while len(replies) < number:
                element = yield from self._read_reply(depth + 1)
                replies.append(element)
            return None if number < 0 else replies
        raise StreamError(f"expected a reply, got {line!r:.100}")

    def _read_bulk(self, num_bytes: int, into: Sequence[memoryview] | None) -> _Parsing:
        if into is None:
            content = bytearray(num_bytes)
            yield from self._read_into(memoryview(content))
        else:
            num_left = num_bytes
            for view in into:
                part = view[: min(len(view), num_left)]
                yield from self._read_into(part)
                num_left -= len(part)
            if num_left:
                dropped = memoryview(bytearray(min(num_left, _DISCARD_BYTES)))
                while num_left:
                    part = dropped[: min(len(dropped), num_left)]
                    yield from self._read_into(part)
                    num_left -= len(part)
        if (yield from self._read_line()) != b"":
            raise StreamError("expected a string to end where it said")
        return num_bytes if into is not None else bytes(content)

    def _read_into(self, view: memoryview) -> _Parsing:
        num_read = min(len(view), self._end - self._start)
        if num_read:
            view[:num_read] = memoryview(self._input)[self._start : self._start + num_read]
            self._start += num_read
        while num_read < len(view):
            received = self._receive_into(view[num_read:])
            if received:
                num_read += received
            else:
                yield None

    def _read_line(self) -> _Parsing:
        """Up to the next CRLF."""
        while (stop := self._input.find(b"\r\n", self._start, self._end)) < 0:
            if self._start == self._end:
                self._start = self._end = 0
            elif self._start:
                rest = self._input[self._start : self._end]
                self._input[: len(rest)] = rest
                self._start, self._end = 0, len(rest)
            if self._end == _INPUT_BYTES:
                raise StreamError(f"expected a line of at most {_INPUT_BYTES} bytes")
            limit = _INPUT_BYTES if self._into() is None else _LINE_BYTES
            free = memoryview(self._input)[self._end : self._end + limit]
            received = self._receive_into(free)
            if received:
                self._end += received
            else:
                yield None
        line = bytes(memoryview(self._input)[self._start : stop])
        self._start = stop + 2
        return line

    def _receive_into(self, view: memoryview) -> int:
        """Bytes read; 0 where there are none for now."""
        if self._is_drained:
            return 0
        try:
            received = self._sock.recv_into(view)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError as error:
            raise StreamError(f"while receiving: {error}") from error
        if received == 0:
            raise StreamError("the server closed the connection")
        # Less than there was room for is all there was: asking again would be a call in vain. TLS
        # gives a record at a time, and may have more.
        self._is_drained = received < len(view) and not isinstance(self._sock, ssl.SSLSocket)
        return received
