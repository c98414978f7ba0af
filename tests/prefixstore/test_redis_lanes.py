"""Calls of the Redis tier to servers that answer, are silent, reset, or never stop sending."""

import socket
import struct
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

from prefixstore.errors import TierTimeout
from prefixstore.tiers.redis.address import Address
from prefixstore.tiers.redis.batch import CommandBatch
from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.redis.errors import ConnectionLost
from prefixstore.tiers.redis.exchange import Exchange
from prefixstore.tiers.redis.servers import Servers
from prefixstore.tiers.redis.silent_servers import SilentServers
from prefixstore.tiers.redis.wire import Command


def answer(client: socket.socket) -> None:
    client.sendall(b"$2\r\nhi\r\n")


def keep_silent(client: socket.socket) -> None:
    pass


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def begin_to_stream(client: socket.socket) -> None:
    client.sendall(b"$100\r\nhi")


ACTS = {act.__name__.encode(): act for act in (answer, keep_silent, reset, begin_to_stream)}


@contextmanager
def serving(act):
    """A server that greets one client and handles its first command so; yields its address."""

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(1 << 16)
            client.sendall(b"+OK\r\n")
            client.recv(1 << 16)
            act(client)
            is_over.wait(60)

    is_over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)  # no client may connect
        thread.start()
        yield Address("127.0.0.1", listener.getsockname()[1])
        is_over.set()
        thread.join(5)


class Named(Servers):
    """Each key has its own server, which is never replaced."""

    has_one_address = False

    def __init__(self, addresses: dict[bytes, Address]) -> None:
        super().__init__(RedisTierConfig())
        self.addresses = addresses
        self.silent = SilentServers(pause_s=600)

    def address_of(self, key, deadline):
        return self.addresses[key]

    def primaries(self, deadline):
        return [*self.addresses.values()]

    def refresh(self, deadline):
        return False

    def suspect(self, address):
        pass


def run_batch(servers: Named, deadline: float) -> list[object]:
    with CommandBatch(servers, deadline) as batch:
        batch.add([((b"GET", key), None, 0) for key in ACTS])
        return batch.run()


def run_exchange(servers: Named, deadline: float) -> list[object]:
    def get(key):
        (reply,) = yield [Command((b"GET", key))]
        return reply

    return Exchange(servers, deadline).run([get(key) for key in ACTS])


@pytest.mark.parametrize("run", [run_batch, run_exchange])
def test_only_who_sends_nothing_at_all_is_silent(run):
    for seconds in (0.3, 3, 20):  # on a stalled machine others may be late, too
        with ExitStack() as stack:
            addresses = {key: stack.enter_context(serving(act)) for key, act in ACTS.items()}
            servers = Named(addresses)
            outcomes = run(servers, time.monotonic() + seconds)
            may_ask = [servers.silent.may_ask(a, time.monotonic()) for a in addresses.values()]
            servers.close()
        if may_ask == [True, False, True, True] and outcomes[0] == b"hi":
            break
    assert may_ask == [True, False, True, True]
    answered, silent, was_reset, streaming = outcomes
    assert answered == b"hi"
    assert isinstance(silent, TierTimeout) and isinstance(streaming, TierTimeout)
    assert isinstance(was_reset, ConnectionLost)


def test_a_server_is_not_silent_where_this_process_stood_still():
    def answer_second(client: socket.socket) -> None:
        has_begun.wait(60)
        answer(client)
        has_answered.set()

    def get(key: bytes):
        (reply,) = yield [Command((b"GET", key))]
        if key == b"first":
            has_begun.set()
            has_answered.wait(60)
            time.sleep(max(0.05, deadline - time.monotonic()))
        return reply

    acts, expected = {b"first": answer, b"second": answer_second}, ([b"hi", b"hi"], [True, True])
    for seconds in (0.5, 5, 20):  # until the first one answers
        has_begun, has_answered = threading.Event(), threading.Event()
        with ExitStack() as stack:
            addresses = {key: stack.enter_context(serving(act)) for key, act in acts.items()}
            servers, deadline = Named(addresses), time.monotonic() + seconds
            outcomes = Exchange(servers, deadline).run([get(key) for key in acts])
            may_ask = [servers.silent.may_ask(a, time.monotonic()) for a in addresses.values()]
            has_begun.set()
            servers.close()
        if (outcomes, may_ask) == expected:
            break
    assert (outcomes, may_ask) == expected


def test_what_came_while_more_was_prepared_is_read_after_the_deadline():
    def answer_and_tell(client: socket.socket) -> None:
        answer(client)
        has_answered.set()

    for seconds in (0.5, 5, 20):  # for the server to greet
        has_answered = threading.Event()
        with serving(answer_and_tell) as address:
            servers, deadline = Named({b"key": address}), time.monotonic() + seconds
            servers.has_one_address = True
            with CommandBatch(servers, deadline, num_commands=2) as batch:
                batch.add([((b"GET", b"key"), None, 0)])
                is_in_time = has_answered.wait(seconds)
                time.sleep(max(0.05, deadline - time.monotonic()))
                batch.add([((b"GET", b"key"), None, 0)])
                answered, late = batch.run()
            servers.close()
        if is_in_time:
            break
    assert answered == b"hi" and isinstance(late, TierTimeout)
