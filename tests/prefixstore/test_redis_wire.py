"""The reader and writer of the Redis protocol, on a socket pair."""

import socket
import ssl
import threading
import time

import numpy as np
import pytest
from certificates import make_certificates

from prefixstore.tiers.redis.address import Address
from prefixstore.tiers.redis.pool import PooledChannel
from prefixstore.tiers.redis.wire import (
    UNANSWERED,
    Channel,
    Command,
    ErrorReply,
    RespBatch,
    StreamError,
    open_batch,
    run_batch,
    take_turn,
)

GET = (b"GET", b"key")


@pytest.fixture
def ends():
    """A channel, and the other end of its connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


@pytest.fixture
def tls_ends(tmp_path):
    """The same over TLS."""
    files = make_certificates(tmp_path)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files["right"])
    client = ssl.create_default_context(cafile=files["ca"])
    ours, theirs = socket.socketpair()
    wrapped = []
    accepting = threading.Thread(
        target=lambda: wrapped.append(server.wrap_socket(theirs, server_side=True))
    )
    accepting.start()
    with client.wrap_socket(ours, server_hostname="127.0.0.1") as own:
        accepting.join()
        with wrapped[0] as other:
            yield PooledChannel(own, Address("127.0.0.1", 6379)), other


def receive(channel: Channel) -> list:
    channel.receive()
    return [reply for _, reply in channel.take_answers()]


def receive_all(channel: Channel, count: int) -> list:
    replies = []
    while len(replies) < count:
        take_turn([channel], 10)
        assert not channel.failure
        replies += [reply for _, reply in channel.take_answers()]
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
        replies += map(same, receive(channel))
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


def test_a_number_in_the_place_of_a_string_is_no_count_of_what_was_filled(ends):
    channel, other = ends
    into = bytearray(9)
    channel.push(Command(GET, [memoryview(into)]))
    channel.push(Command(GET, [memoryview(into)]))
    channel.push(Command(GET))
    other.sendall(b":9\r\n*1\r\n:9\r\n:9\r\n")
    assert receive_all(channel, 3) == [b":9", [9], 9]
    assert into == bytes(9)


def test_a_server_that_sends_without_end_has_its_turn_like_any_other(tls_ends):
    """Whoever reads looks at the clock in between, and loses nothing of what it leaves."""
    channel, other = tls_ends
    num_bytes, into = 32 << 20, bytearray(9)
    channel.push(Command(GET, [memoryview(into)]))
    channel.push(Command(GET))
    wire = b"$%d\r\n%b\r\n+next\r\n" % (num_bytes, bytes(num_bytes))
    sender = threading.Thread(target=other.sendall, args=(wire,))
    sender.start()
    replies, most = [], 0
    while len(replies) < 2:
        before = channel.native.num_received
        take_turn([channel], 10)
        most = max(most, channel.native.num_received - before)
        replies += [reply for _, reply in channel.take_answers()]
    sender.join()
    assert replies == [num_bytes, b"next"] and not channel.failure
    assert most < 2 << 20


def test_what_tls_has_left_is_seen_though_the_socket_has_nothing(tls_ends):
    channel, other = tls_ends
    channel.push(Command(GET))
    other.sendall(b"+zero\r\n")
    assert receive_all(channel, 1) == [b"zero"]  # and what TLS itself says at the beginning
    channel.push(Command(GET))
    assert channel.is_quiet()
    other.sendall(b"+one\r\n+two\r\n")
    channel._sock.setblocking(True)
    part = channel._sock.recv(4)
    channel._sock.setblocking(False)
    assert not channel.is_quiet()
    channel.native.next_input()[:4] = part
    channel.native.received(4)
    channel.push(Command(GET))
    assert receive_all(channel, 2) == [b"one", b"two"]
    assert channel.is_quiet()


def test_sends_several_buffers_as_one_word_and_nothing_is_copied(ends):
    channel, other = ends
    large = bytearray(np.random.default_rng(1).bytes(3 << 20))
    channel.push(Command((b"SET", b"key", (b"head", memoryview(large), b""), b"NX")))
    large[0] ^= 1
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
            channel.receive()


def test_says_when_the_other_side_is_gone(ends):
    channel, other = ends
    channel.push(Command(GET))
    channel.flush()
    assert other.recv(100)  # else closing would be a reset
    other.sendall(b"$10\r\nabc")
    other.close()
    with pytest.raises(StreamError, match="closed the connection"):
        for _ in range(3):
            channel.receive()
    assert len(channel.abandon()) == 1 and channel.num_awaited == 0
    channel.push(Command((b"SET", b"key", (bytes(1 << 20),))))
    with pytest.raises(StreamError, match="while sending"):
        channel.flush()


def test_tickets_come_back_with_their_replies(ends):
    channel, other = ends
    tickets = [object() for _ in range(3)]
    for ticket in tickets:
        channel.push(Command(GET), ticket)
    other.sendall(b":1\r\n-ERR\r\n$-1\r\n")
    take_turn([channel], 10)
    assert [(ticket, same(reply)) for ticket, reply in channel.take_answers()] == [
        (tickets[0], 1),
        (tickets[1], "ERR"),
        (tickets[2], None),
    ]
    assert channel.take_answers() == []


def batch_of(num_commands: int, num_lanes: int = 1) -> tuple[RespBatch, list[bytearray]]:
    batch, outs = RespBatch(), [bytearray(4) for _ in range(num_commands)]
    for i, out in enumerate(outs):
        batch.add(i % num_lanes, [(GET, [memoryview(out)], len(out))])
    return batch, outs


def run_all(batch: RespBatch, lanes: list[list[Channel]], timeout_s: float) -> list[object]:
    open_batch(batch, lanes)
    return run_batch(batch, timeout_s)


def test_runs_a_batch_on_several_lanes():
    pairs = [socket.socketpair() for _ in range(2)]
    channels = [Channel(ours) for ours, _ in pairs]
    batch, outs = batch_of(5, num_lanes=2)
    for i, (_, theirs) in enumerate(pairs):
        theirs.sendall(b"".join(b"$4\r\nab%d%d\r\n" % (i, k) for k in range(3 - i)))
    assert run_all(batch, [[channel] for channel in channels], 10) == [4] * 5
    assert outs == [b"ab00", b"ab10", b"ab01", b"ab11", b"ab02"]
    assert not any(channel.failure or channel.num_awaited for channel in channels)
    for pair in pairs:
        for end in pair:
            end.close()


@pytest.mark.parametrize("ending", ["closed", "silent", "not the protocol"])
def test_a_batch_says_what_was_not_answered_and_lets_go_of_the_buffers(ends, ending):
    channel, other = ends
    batch, outs = batch_of(3)
    other.sendall(b"$4\r\nabcd\r\n$4\r\nxy")
    if ending == "closed":
        other.shutdown(socket.SHUT_WR)
    elif ending == "not the protocol":
        other.sendall(b"zz, it seems\r\n")
    begin = time.monotonic()
    assert run_all(batch, [[channel]], 0.2) == [4, UNANSWERED, UNANSWERED]
    assert time.monotonic() - begin < 5
    assert channel.failure and channel.num_awaited == 0
    assert channel.is_late == (ending == "silent")
    del batch
    for out in outs:
        out.append(0)  # raises BufferError while the buffer may still be written


def test_a_lane_without_channels_has_no_answers(ends):
    channel, other = ends
    other.sendall(b"$4\r\nabcd\r\n" * 2)
    batch, _ = batch_of(4, num_lanes=2)
    assert run_all(batch, [[channel], []], 10) == [4, UNANSWERED, 4, UNANSWERED]
    assert not channel.failure


def test_sends_what_a_batch_has_while_more_is_added(ends):
    channel, other = ends
    batch, outs = batch_of(1)
    open_batch(batch, [[channel]])
    batch.advance()
    assert other.recv(100) == b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n"
    out = bytearray(4)
    batch.add(0, [(GET, [memoryview(out)], len(out))])
    other.sendall(b"$4\r\nabcd\r\n$4\r\nefgh\r\n")
    assert run_batch(batch, 10) == [4, 4]
    assert [*outs, out] == [b"abcd", b"efgh"]
    assert not channel.failure and channel.num_awaited == 0


def test_a_batch_that_is_closed_half_way_leaves_no_channel_to_others(ends):
    channel, _ = ends
    batch, (out,) = batch_of(1)
    with pytest.raises(ValueError, match="expected open ones"):
        run_batch(batch, 10)
    open_batch(batch, [[channel]])
    batch.close()  # nothing was sent
    assert not channel.failure
    open_batch(batch, [[channel]])
    batch.advance()
    batch.close()
    assert channel.failure and channel.num_awaited == 0
    del batch
    out.append(0)  # raises BufferError while the buffer may still be written


def test_refuses_words_that_are_no_buffers_and_queues_nothing(ends):
    channel, _ = ends
    for words in [(b"GET", "key"), (b"SET", b"key", (b"a", 5))]:
        with pytest.raises((TypeError, RuntimeError)):
            channel.push(Command(words))
    with pytest.raises(BufferError):
        channel.push(Command(GET, [memoryview(b"read only")]))
    assert channel.num_awaited == 0 and not channel.has_output
