"""Connections whose clients stop halfway or read slowly: none stays open for ever."""

import socket
import sys
import time

import pytest
from chat_model import chat_tokenizer
from scripted_engine import ScriptedEngine
from serving import MODEL, read_all, request_bytes, serving, wait_until

from prefixstore.server import connections

PATH = "/v1/completions"
COMPUTED = 348  # an id whose text has 9 characters
TIMEOUT_S = 0.5
TIMES = {"header_timeout_s": TIMEOUT_S, "idle_timeout_s": TIMEOUT_S, "write_timeout_s": TIMEOUT_S}
HEAD = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n"


@pytest.fixture(scope="module")
def engine():
    engine = ScriptedEngine(chat_tokenizer(), max_model_len=1 << 22)
    yield engine
    engine.close()


@pytest.fixture
def num_held():
    """SO_SNDBUF in bytes, half of what Linux then allows: small."""
    return 8192


@pytest.fixture
def protocols(monkeypatch, num_held):
    """The server's protocol object of each connection, in order."""
    made = []

    class Seen(connections.BoundedProtocol):
        def connection_made(self, transport):
            made.append(self)
            connected = transport.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, num_held)
            super().connection_made(transport)

    monkeypatch.setattr(connections, "BoundedProtocol", Seen)
    return made


def is_over(protocol):
    return protocol not in protocol.connections


def num_unsent(protocol):
    return protocol.transport.get_write_buffer_size()


def read_answer(client):
    received = b""
    while not received.endswith(b'{"status":"ok"}'):
        received += client.recv(65536)
    assert received.startswith(b"HTTP/1.1 200 ")


def ask_for(server, num_characters, *headers):
    """A connection on which an answer of so many characters was requested."""
    prompt = [COMPUTED] * (num_characters // len(" computed"))
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.connect((server.host, server.port))
    body = {"model": MODEL, "prompt": prompt, "echo": True, "max_tokens": 1}
    connection.sendall(request_bytes(PATH, body, *headers))
    return connection


@pytest.mark.parametrize("rest", [b"x", b"0123456789"], ids=["a part", "whole"])
def test_an_early_answer_is_the_last_word_whether_or_not_the_rest_comes(engine, protocols, rest):
    with serving(engine, body_timeout_s=TIMEOUT_S, **TIMES) as server, server.connect() as client:
        client.sendall(HEAD)
        read_answer(client)
        client.sendall(rest)
        begun = time.monotonic()
        assert read_all(client) == b""
        assert time.monotonic() - begun < TIMEOUT_S * 8
        assert is_over(protocols[0])


def test_a_request_may_follow_one_that_was_answered_early(engine, protocols):
    with serving(engine) as server, server.connect() as client:
        for _ in range(3):
            client.sendall(HEAD)
            read_answer(client)
            client.sendall(b"0123456789")


@pytest.mark.parametrize("headers", [[], ["connection: close"]], ids=["kept", "closed"])
def test_a_client_that_stops_before_the_end_of_an_answer_is_cut_off(
    engine, protocols, headers, caplog
):
    # Short enough that on a kept connection the idle timeout comes first.
    times = {**TIMES, "write_timeout_s": 2.0}
    with serving(engine, **times) as server, ask_for(server, 400_000, *headers) as client:
        wait_until(lambda: protocols and num_unsent(protocols[0]) > 100_000)
        while num_unsent(protocols[0]) > 15_000:
            assert client.recv(2048)
        assert num_unsent(protocols[0]) > 0
        wait_until(lambda: is_over(protocols[0]))
        time.sleep(TIMEOUT_S * 2)  # longer than any of its timers
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_client_that_hangs_up_half_and_reads_nothing_is_cut_off(engine, protocols):
    with serving(engine, **TIMES) as server, ask_for(server, 400_000) as client:
        assert client.recv(1)
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: is_over(protocols[0]))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell")
@pytest.mark.parametrize("num_held", [100_000])
def test_a_client_reads_that_takes_what_the_system_still_holds(engine, protocols):
    """It reads from the system's buffers; the server is asked for more only later."""
    with serving(engine) as server, ask_for(server, 600_000) as client:
        wait_until(lambda: protocols and num_unsent(protocols[0]) > 0)
        (protocol,), before = protocols, num_unsent(protocols[0])
        for _ in range(12):  # more than its own buffers hold: the server's system knows of it
            assert client.recv(2048)
        protocol.loop.call_soon_threadsafe(protocol._check_reading)
        server.assert_answers()
        assert not is_over(protocol) and num_unsent(protocol) == before


@pytest.mark.parametrize("headers", [[], ["connection: close"]], ids=["kept", "closed"])
def test_a_client_that_reads_steadily_gets_all(engine, protocols, headers):
    with serving(engine, **TIMES) as server, ask_for(server, 600_000, *headers) as client:
        received = client.recv(4096)
        length = int(received.lower().split(b"content-length: ")[1].split()[0])
        begun = time.monotonic()
        while received.partition(b"\r\n\r\n")[2][length - 1 :] == b"":
            chunk = client.recv(8192)
            assert chunk, "cut off"
            received += chunk
            time.sleep(0.03)
        assert time.monotonic() - begun > TIMEOUT_S * 2
