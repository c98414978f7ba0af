"""The reader and writer of the Redis protocol, against a socket of this test."""

import socket
import threading

import numpy as np
import pytest

from prefixstore.tiers.redis.wire import Channel, Command, ErrorReply, StreamError

GET = (b"GET", b"key")


@pytest.fixture
def ends():
    """A channel and the other end of its connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


def receive_all(channel: Channel, count: int) -> list:
    replies = []
    while len(replies) < count:
        replies += [reply for _, reply in channel.receive()]
    return replies


def same(reply: object) -> object:
    return str(reply) if isinstance(reply, ErrorReply) else reply


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"+OK\r\n", b"OK"),
        (b"-OOM no room\r\n", "OOM no room"),
        (b":-7\r\n", -7),
        (b"$-1\r\n", None),
        (b"$0\r\n\r\n", b""),
        (b"$6\r\na\r\nb\r\n\r\n", b"a\r\nb\r\n"),
        (b"*-1\r\n", None),
        (b"*0\r\n", []),
        (b"*3\r\n$1\r\n0\r\n*2\r\n$1\r\na\r\n$-1\r\n:5\r\n", [b"0", [b"a", None], 5]),
        (b"+" + b"x" * 6_000 + b"\r\n", b"x" * 6_000),
    ],
    ids=lambda value: repr(value)[:20],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_reads_replies_in_whatever_pieces(ends, sent, expected, step):
    channel, other = ends
    channel.push(Command(GET))
    channel.push(Command(GET))
    channel.flush()
    replies = []
    both = sent + b":1\r\n"
    for begin in range(0, len(both), step):
        other.sendall(both[begin : begin + step])
        replies += [same(reply) for _, reply in channel.receive()]
    assert replies == [expected, 1]
    assert channel.num_awaited == 0


@pytest.mark.parametrize("num_bytes", [0, 1, 9, 10, 11, 700_000])
def test_fills_buffers_and_drops_what_has_no_room(ends, num_bytes):
    channel, other = ends
    head, rest = bytearray(3), bytearray(6)
    channel.push(Command(GET, [memoryview(head), memoryview(rest)]))
    channel.push(Command(GET))
    value = np.random.default_rng(0).bytes(num_bytes)
    wire = b"$%d\r\n%b\r\n+next\r\n" % (num_bytes, value)
    sender = threading.Thread(target=other.sendall, args=(wire,))
    sender.start()
    assert receive_all(channel, 2) == [num_bytes, b"next"]
    sender.join()
    filled = min(num_bytes, 9)
    assert (head + rest)[:filled] == value[:filled]
    assert (head + rest)[filled:] == bytes(9 - filled)


def test_sends_several_buffers_as_one_word_and_nothing_is_copied(ends):
    channel, other = ends
    large = memoryview(np.random.default_rng(1).bytes(3 << 20))
    command = Command((b"SET", b"key", (b"head", large, b""), b"NX"))
    assert any(piece is large for piece in command.encode())
    channel.push(command)
    received = bytearray()
    expected = b"*4\r\n$3\r\nSET\r\n$3\r\nkey\r\n$%d\r\nhead%b\r\n$2\r\nNX\r\n"
    expected %= (4 + len(large), large)
    while channel.has_output:
        channel.flush()
        received += other.recv(1 << 20)
    while len(received) < len(expected):
        received += other.recv(1 << 20)
    assert received == expected


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"$x\r\n",
        b"$-2\r\n",
        b"$999999999999\r\n",
        b"*9999999\r\n",
        b"*1\r\n" * 20,
        b"$1\r\nabcd\r\n",
        b"+" + b"x" * 70_000,
        b"+OK\r\n+unasked\r\n",
    ],
    ids=lambda sent: repr(sent)[:20],
)
def test_refuses_what_is_not_the_protocol(ends, sent):
    channel, other = ends
    channel.push(Command(GET))
    channel.flush()
    other.sendall(sent)
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(StreamError, match=r"expected|asked"):
        for _ in range(3):
            list(channel.receive())


def test_says_when_the_other_side_is_gone(ends):
    channel, other = ends
    channel.push(Command(GET))
    channel.flush()
    assert other.recv(100)  # or closing would be a reset
    other.sendall(b"$10\r\nabc")
    other.close()
    with pytest.raises(StreamError, match="closed the connection"):
        for _ in range(3):
            list(channel.receive())
    assert len(channel.abandon()) == 1 and channel.num_awaited == 0
    channel.push(Command((b"SET", b"key", (bytes(1 << 20),))))
    with pytest.raises(StreamError, match="while sending"):
        channel.flush()
