"""Slow, silent, vanished, many and hostile clients; after each the server still answers."""

import asyncio
import json
import os
import socket
import time
from pathlib import Path

import httpx
import pytest
from chat_model import chat_tokenizer
from scripted_engine import ScriptedEngine
from serving import MODEL, read_all, request_bytes, serving, wait_until

from prefixstore.engine import SamplingParams

TEXT = {"model": MODEL, "prompt": "Hello", "max_tokens": 4}
PATH = "/v1/completions"
TIMEOUT_S = 0.5
WAITS = ("header_timeout_s", "body_timeout_s", "write_timeout_s")


@pytest.fixture(scope="module")
def engine():
    """An engine whose answers end only when cancelled or at their last token."""
    engine = ScriptedEngine(
        chat_tokenizer(), is_endless=True, max_model_len=1 << 22, max_queued=1000, max_running=256
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine):
    bounds = {"max_body_bytes": 10_000, "max_connections": 300}
    with serving(engine, **bounds, **dict.fromkeys(WAITS, 30), idle_timeout_s=TIMEOUT_S) as running:
        yield running


@pytest.fixture(scope="module")
def hasty_server(engine):
    """A server with short timeouts, only for tests of these: a busy machine exceeds them, too."""
    with serving(engine, **dict.fromkeys(WAITS, TIMEOUT_S), idle_timeout_s=TIMEOUT_S) as running:
        yield running


@pytest.fixture(autouse=True)
def _still_answers(server, engine):
    yield
    server.assert_answers()
    wait_until(lambda: not engine.running and not engine.queued)


def exchange(server, content):
    """Send some bytes; returns all that the server sends before it closes."""
    with server.connect() as connection:
        connection.sendall(content)
        return read_all(connection)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def status_of(answer):
    assert answer.startswith(b"HTTP/1.1 "), answer[:80]
    return int(answer.split()[1])


def error_of(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n", 400),
        (b"GET / HTTP/one\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no host
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nbad header\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"x" * 1_000_000 + b"\r\n\r\n", 400),
        (b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1e3\r\n\r\n", 400),
        (
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n"
            b"content-length: 6\r\n\r\n",
            400,
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_refuses_what_is_no_http(server, content, status):
    answer = exchange(server, content)
    assert status_of(answer) == status
    assert error_of(answer)["type"] == "invalid_request_error"


def test_many_headers_are_no_more_than_long_ones(server):
    headers = b"".join(b"x-%d: y\r\n" % number for number in range(20_000))
    answer = exchange(server, b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + headers + b"\r\n")
    assert status_of(answer) == 400


CHUNKED = b"\r\n".join(
    [
        b"POST /v1/completions HTTP/1.1",
        b"host: localhost",
        b"content-type: application/json",
        b"transfer-encoding: chunked",
        b"connection: close",
        b"",
        b"",
    ]
)


def chunk(content):
    return b"%x\r\n%s\r\n" % (len(content), content)


def test_takes_a_body_in_chunks(server):
    content = json.dumps(TEXT).encode()
    answer = exchange(
        server,
        CHUNKED + b"".join(chunk(content[n : n + 1]) for n in range(len(content))) + b"0\r\n\r\n",
    )
    assert status_of(answer) == 200


@pytest.mark.parametrize("garbage", [b"zz\r\nxx\r\n", b"-5\r\n", b"5\r\nabcdefgh\r\n", b"\0\r\n"])
def test_refuses_chunks_that_are_none(server, garbage, caplog):
    answer = exchange(server, CHUNKED + chunk(b'{"model": ') + garbage)
    assert status_of(answer) == 400
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("num_bytes", [10_001, 30_000, 1_000_000])
def test_refuses_a_body_that_is_too_large(server, num_bytes):
    body = {**TEXT, "prompt": "x" * num_bytes}
    answer = server.post(PATH, body)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_refuses_a_body_of_unknown_length_once_it_is_too_large(server):
    def content():
        for _ in range(12):
            yield b" " * 1000

    answer = httpx.post(
        server.url + PATH, content=content(), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


def test_does_not_read_on_for_ever(server):
    sent = 0
    with server.connect() as connection:
        connection.sendall(CHUNKED)
        with pytest.raises(OSError):
            while sent < 100_000_000:
                connection.sendall(chunk(b" " * 60_000))
                sent += 60_000
    assert sent < 50_000_000  # the sockets' buffers, and a little more


def test_tells_a_client_that_waits_before_it_sends(server):
    head = request_bytes(PATH, b"", "expect: 100-continue").replace(
        b"content-length: 0", b"content-length: 99999"
    )
    assert status_of(exchange(server, head)) == 413


@pytest.mark.parametrize("start", [b"", b"GET", b"GET / HTTP/1.1\r\nhost: localhost\r\n"], ids=repr)
def test_a_client_that_asks_nothing_is_cut_off(hasty_server, start):
    begun = time.monotonic()
    answer = exchange(hasty_server, start)
    assert status_of(answer) == 408
    assert TIMEOUT_S * 0.9 < time.monotonic() - begun < TIMEOUT_S * 60


def test_headers_that_trickle_in_do_not_buy_time(hasty_server):
    begun = time.monotonic()
    with hasty_server.connect() as connection, pytest.raises(OSError):
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        while time.monotonic() - begun < TIMEOUT_S * 60:
            connection.sendall(b"x: y\r\n")
            time.sleep(0.02)


def test_a_body_that_trickles_in_is_cut_off(hasty_server):
    content = request_bytes(PATH, TEXT)
    with hasty_server.connect() as connection:
        connection.sendall(content[:-10])
        answer = read_all(connection)
    assert status_of(answer) == 408
    assert error_of(answer)["message"].startswith("body: expected within")


def test_a_second_request_has_its_own_deadline(hasty_server):
    with hasty_server.connect() as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        received = b""
        while b"ok" not in received:
            received += connection.recv(65536)
        connection.sendall(b"GET /health/live")
        assert status_of(read_all(connection)) == 408


def test_an_idle_connection_is_closed(server):
    assert exchange(server, b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n").endswith(
        b'{"status":"ok"}'
    )


def test_answers_pipelined_requests_in_order(server):
    requests = [request_bytes(PATH, {**TEXT, "max_tokens": n + 1}) for n in range(8)]
    answer = exchange(server, b"".join(requests))
    assert answer.count(b"HTTP/1.1 200") == 8
    counts = [
        json.loads(part.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"]
        for part in answer.split(b"HTTP/1.1 200")[1:]
    ]
    assert counts == list(range(1, 9))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_is_cancelled(server, engine, stream):
    num_asked = len(engine.asked)
    with server.connect() as connection:
        connection.sendall(request_bytes(PATH, {**TEXT, "max_tokens": 4_000_000, "stream": stream}))
        wait_until(lambda: len(engine.asked) > num_asked and engine.asked[-1].num_sent > 2)
        assert not engine.asked[-1].is_cancelled
    wait_until(lambda: engine.asked[-1].is_cancelled)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_while_it_waits_in_the_queue_is_cancelled(stream, n):
    engine = ScriptedEngine(chat_tokenizer(), is_endless=True, max_running=1, step_s=0.001)
    with serving(engine) as server:
        blocker = engine.submit([5], SamplingParams(max_tokens=100_000))
        wait_until(lambda: engine.running)
        with server.connect() as connection:
            connection.sendall(request_bytes(PATH, {**TEXT, "stream": stream, "n": n}))
            wait_until(lambda: len(engine.asked) == 1 + n)
        wait_until(lambda: all(handle.is_cancelled for handle in engine.asked[1:]))
        assert [handle.num_sent for handle in engine.asked[1:]] == [0] * n
        blocker.cancel()
    engine.close()


def test_a_client_that_does_not_read_is_cut_off_and_blocks_nobody(hasty_server, engine):
    num_asked = len(engine.asked)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((hasty_server.host, hasty_server.port))
    with connection:
        connection.sendall(request_bytes(PATH, {**TEXT, "max_tokens": 4_000_000, "stream": True}))
        wait_until(lambda: len(engine.asked) > num_asked)
        slow = engine.asked[-1]
        while not slow.is_cancelled:
            hasty_server.assert_answers()
    # Only the sockets' buffers were filled: the rest of the answer was never generated.
    assert slow.num_sent < 3_000_000


def test_serves_200_connections_at_once(engine):
    async def ask(client, url, number):
        body = {**TEXT, "max_tokens": 5, "stream": number % 2 == 0}
        return (await client.post(url, json=body, timeout=60)).status_code

    async def ask_all(url):
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=200)) as client:
            return await asyncio.gather(*(ask(client, url, number) for number in range(200)))

    with serving(engine) as patient_server:
        assert asyncio.run(ask_all(patient_server.url + PATH)) == [200] * 200


def test_tells_one_connection_too_many(server):
    connections = [server.connect() for _ in range(300)]
    try:
        answer = exchange(server, b"")
        assert status_of(answer) == 503
        assert error_of(answer)["message"] == "too many connections"
    finally:
        for connection in connections:
            connection.close()
    wait_until(
        lambda: (
            b"200 OK"
            in exchange(
                server, b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
            )
        )
    )


def test_hostile_clients_leave_no_memory_behind(server):
    def attack():
        body = {**TEXT, "prompt": "x" * 100_000}
        for _ in range(20):
            assert server.post(PATH, body).status_code == 413
            exchange(server, CHUNKED + b"zz\r\n")

    attack()
    before = resident_bytes()
    attack()
    assert resident_bytes() - before < 20 << 20
