"""Connections of the Redis tier to servers that are slow to resolve, connect or log in."""

import socket
import threading
import time

import pytest
from redis_proxy import Trickle
from redis_servers import FLAVOURS
from redis_tiers import TIGHT, assert_gives_up, make_names, open_tier

from prefixstore.errors import TierError, TierUnavailable
from prefixstore.tiers.redis.address import Address
from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.redis.pool import Pool


@pytest.mark.parametrize(
    ("scheme", "start"),
    [("redis", b"+"), ("rediss", b"\x16\x03\x03\x40\x00")],
    ids=["plain", "tls"],
)
def test_a_server_that_trickles_while_a_connection_opens_costs_the_deadline(scheme, start):
    trickle = Trickle(start)
    try:
        tier = open_tier(f"{scheme}://127.0.0.1:{trickle.port}", timeout_s=TIGHT)
        assert_gives_up(lambda: tier.contains_many(make_names(1)))
        tier.close()
    finally:
        trickle.close()


def test_a_look_up_that_gets_no_answer_costs_the_deadline(monkeypatch):
    look_up, is_over = socket.getaddrinfo, threading.Event()

    def stalls(host, port, *args, flags=0, **options):
        if not flags & socket.AI_NUMERICHOST:
            is_over.wait(3)
        return look_up(host, port, *args, flags=flags, **options)

    monkeypatch.setattr(socket, "getaddrinfo", stalls)
    tier = open_tier("redis://localhost:1", timeout_s=TIGHT)
    assert_gives_up(lambda: tier.contains_many(make_names(1)))
    is_over.set()
    tier.close()


def test_a_name_has_all_its_addresses_tried_in_time(monkeypatch, shared_servers):
    server = shared_servers(next(iter(FLAVOURS)))
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:
        place = deaf.getsockname()
        # its backlog takes one or two connections, never accepted, and no more
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(place)
        places = [place, ("127.0.0.1", server.port)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", one) for one in places]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
        # Half of that each; a machine may stall so long once, but not three times.
        tier = open_tier("redis://two.example", timeout_s=20, connect_timeout_s=2)

        def is_reached() -> bool:
            try:
                return tier.contains_many(make_names(1)) == [False]
            except TierError:
                return False

        assert any(is_reached() for _ in range(3))
        tier.close()
        for one in waiting:
            one.close()


@pytest.mark.parametrize("host", ["cache..example", f"{'x' * 64}.example"], ids=["empty", "long"])
def test_a_host_that_has_no_name_is_unavailable(host):
    pool = Pool(RedisTierConfig(), [])
    with pytest.raises(TierUnavailable, match=host):
        pool.borrow(Address(host, 6379), time.monotonic() + TIGHT)
    pool.close()
