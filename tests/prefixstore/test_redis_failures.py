"""The Redis tier with failing servers: stopped, dead, full, slow or refusing."""

import time

import pytest
from redis_proxy import Proxy
from redis_servers import FLAVOURS, Server
from redis_tiers import (
    PART,
    TIGHT,
    assert_gives_up,
    assert_in_time,
    get,
    make_names,
    open_tier,
    put,
    random_bytes,
)
from sample_blocks import load_block, make_keys, make_payload

from prefixstore.errors import TierError, TierFull, TierTimeout, TierUnavailable
from prefixstore.store import Store
from prefixstore.store.block_sources import HostBlock


@pytest.fixture
def make_server(server_directory):
    """Starts a server for one test, by default of every flavour in turn."""
    servers = []

    def make(flavour: str, **options: str) -> Server:
        settings = {name.replace("_", "-"): value for name, value in options.items()}
        servers.append(Server(FLAVOURS[flavour], server_directory, settings))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


@pytest.fixture(params=FLAVOURS)
def flavour(request) -> str:
    return request.param


@pytest.fixture
def proxy(shared_servers):
    proxy = Proxy(shared_servers(next(iter(FLAVOURS))).port)
    yield proxy
    proxy.close()


@pytest.fixture
def proxied(proxy):
    tier = open_tier(proxy.url)
    yield tier
    tier.close()


def test_a_server_that_restarts_is_empty_and_serves_again(make_server, flavour):
    server = make_server(flavour)
    tier = open_tier(server.url)
    names, record = make_names(2), random_bytes(2 * PART)
    put(tier, names, [record] * 2)
    server.kill()
    begin = time.monotonic()
    for call in (
        lambda: get(tier, names, 2 * PART),
        lambda: put(tier, names, [record] * 2),
        lambda: tier.contains_many(names),
        lambda: tier.delete_many(names),
        lambda: tier.pin_many(names),
        lambda: tier.delete_identity(names[0].identity),
        tier.stats,
        tier.sweep,
        tier.check,
    ):
        with pytest.raises(TierUnavailable):
            call()
    assert_in_time(begin, 10)  # waiting would take a minute
    server.start()
    assert get(tier, names, 2 * PART) == [None, None]
    assert put(tier, names, [record] * 2) == [None, None]
    assert get(tier, names, 2 * PART) == [record, record]
    tier.close()


def test_a_store_goes_on_without_its_server(make_server, flavour):
    server = make_server(flavour)
    keys = make_keys(2)
    payloads = [make_payload(key) for key in keys]
    out = bytearray(keys[0].layout.block_bytes)
    with Store([open_tier(server.url)]) as store:
        assert store.save(keys[0], HostBlock(payloads[0])) and store.flush(30)
        assert load_block(store, keys[0], out) == "redis" and out == payloads[0].tobytes()
        server.kill()
        assert load_block(store, keys[0], out) is None
        assert store.save(keys[1], HostBlock(payloads[1])) and store.flush(30)
        server.start()
        assert load_block(store, keys[1], out) is None
        assert store.save(keys[1], HostBlock(payloads[1])) and store.flush(30)
        assert load_block(store, keys[1], out) == "redis" and out == payloads[1].tobytes()
        assert store.stats().tiers[0].num_errors == 2


def test_opens_without_a_server(make_server, flavour):
    server = make_server(flavour)
    server.kill()
    tier = open_tier(server.url)
    names = make_names(1)
    with pytest.raises(TierUnavailable, match="refused"):
        tier.contains_many(names)
    server.start()
    assert tier.contains_many(names) == [False]
    tier.close()


def test_a_stopped_server_costs_the_deadline_and_no_more(make_server, flavour):
    server = make_server(flavour)
    tier = open_tier(server.url, timeout_s=TIGHT)
    names, records = make_names(3), [random_bytes(2 * PART, seed) for seed in range(3)]
    put(tier, names, records)
    with server.stopped():
        assert_gives_up(lambda: get(tier, names, 2 * PART))
        assert_gives_up(lambda: get(tier, names, 2 * PART, deadline=time.monotonic() + 0.1), 0.1)
        more_than_sockets_hold = bytes(64 << 20)
        for call in (
            lambda: put(tier, make_names(1), [more_than_sockets_hold]),
            lambda: tier.contains_many(names),
            lambda: tier.delete_identity(names[0].identity),
            tier.stats,
        ):
            assert_gives_up(call)
    # a late reply must not be taken for the reply to another command
    assert get(tier, names, 2 * PART) in (records, [None] * 3)  # the deletion may have arrived
    tier.close()


def test_a_slow_server_costs_the_deadline_and_what_is_complete_is_a_hit(proxy, proxied):
    names = make_names(3)
    records = [b"short", random_bytes(3 * PART), b"also short"]
    put(proxied, names, records)
    proxy.bytes_per_s = 5000  # 40 s for the long one
    for seconds in (2 * TIGHT, 5, 15):  # on a stalled machine the short one may be late
        begin = time.monotonic()
        outcomes = get(proxied, names, 3 * PART, deadline=begin + seconds)
        assert_in_time(begin, seconds + 10)
        assert isinstance(outcomes[1], TierTimeout)
        if outcomes[0] == b"short":
            break
    assert outcomes[0] == b"short"
    proxy.bytes_per_s = None
    assert get(proxied, names, 3 * PART) == records


def test_a_connection_cut_within_a_reply_is_tried_again(proxy, proxied):
    names = make_names(6)
    records = [random_bytes(3 * PART, seed) for seed in range(6)]
    put(proxied, names, records)
    for cut_at in (1, 300, PART, 5 * PART):
        proxy.cut_replies_at = cut_at
        num_before = proxy.num_connections
        assert get(proxied, names, 3 * PART) == records
        assert proxy.cut_replies_at is None and proxy.num_connections > num_before


def test_a_connection_cut_within_a_command_is_tried_again(proxy, proxied):
    for cut_at in (1, 300, PART, 5 * PART):
        names = make_names(4)
        records = [random_bytes(3 * PART, seed) for seed in range(4)]
        proxy.cut_commands_at = cut_at
        assert put(proxied, names, records) == [None] * 4
        assert proxy.cut_commands_at is None
        assert get(proxied, names, 3 * PART) == records


def test_a_full_server_refuses_and_keeps_what_it_has(make_server, flavour):
    server = make_server(flavour, maxmemory="24mb", maxmemory_policy="noeviction")
    tier = open_tier(server.url)
    names, records = make_names(60), [random_bytes(1 << 20, seed) for seed in range(60)]
    outcomes = put(tier, names, records)
    num_kept = outcomes.count(None)
    assert 5 < num_kept < 30
    full = [outcome for outcome in outcomes if outcome is not None]
    assert all(isinstance(outcome, TierFull) and "maxmemory" in str(outcome) for outcome in full)
    found = get(tier, names, 1 << 20)
    for outcome, record, kept in zip(outcomes, found, records, strict=True):
        assert record == (kept if outcome is None else None)
    with server.client() as client:  # nothing is left of refused ones: 17 keys per record
        assert client.dbsize() <= 1 + num_kept * 16
    assert tier.stats().capacity_bytes == 24 << 20
    tier.close()


@pytest.mark.parametrize("policy", ["volatile-lru", "allkeys-lru"])
def test_a_server_that_evicts_only_forgets(make_server, flavour, policy):
    server = make_server(flavour, maxmemory="24mb", maxmemory_policy=policy)
    tier = open_tier(server.url, part_bytes=1 << 18)
    names, records = make_names(60), [random_bytes(1 << 20, seed) for seed in range(60)]
    for name, record in zip(names, records, strict=True):
        assert put(tier, [name], [record]) == [None]
    found = get(tier, names, 1 << 20)
    assert all(got in (None, record) for got, record in zip(found, records, strict=True))
    assert found.count(None) > 0
    if policy == "volatile-lru":  # never evicts the generation
        assert found.count(None) < 60
    # replies take memory, so reads evict as well
    for is_there, record in zip(tier.contains_many(names), found, strict=True):
        assert record is not None or not is_there
    assert tier.stats().num_evictions > 0
    tier.close()


def test_wrong_passwords_are_said_and_never_shown(make_server, flavour, caplog):
    server = make_server(flavour, requirepass="right-one")
    for url, message in (
        (server.url, "(?i)auth"),
        (server.url.replace("//", "//:wrong-one@"), "(?i)password"),
    ):
        tier = open_tier(url)
        with pytest.raises(TierUnavailable, match=message) as caught:
            tier.contains_many(make_names(1))
        told = f"{caught.value} {caught.value.__cause__} {tier._config!r} {caplog.text}"
        assert "wrong-one" not in told and "right-one" not in told
        tier.close()
    tier = open_tier(server.url.replace("//", "//:right-one@"))
    assert tier.contains_many(make_names(1)) == [False]
    tier.close()


def test_a_user_of_an_acl(make_server, flavour, monkeypatch):
    server = make_server(flavour)
    with server.client() as client:
        rights = ["~kvk:*", "+@read", "+@write", "+@connection", "-@dangerous"]
        rights += ["+info", "+cluster|slots"]
        for user, extra in (("cache", []), ("reader", ["-@write"])):
            client.execute_command("ACL", "SETUSER", user, "on", ">p@ss", *rights, *extra)
    names = make_names(1)
    tier = open_tier(server.url.replace("//", "//cache:p%40ss@"), prefix="kvk")
    assert put(tier, names, [b"record"]) == [None]
    assert tier.pin_many(names) == [True]
    assert tier.check(fix=True) == [] and tier.stats().num_puts == 1
    monkeypatch.setenv("KVKERNELS_REDIS_USERNAME", "reader")
    monkeypatch.setenv("KVKERNELS_REDIS_PASSWORD", "p@ss")
    reader = open_tier(server.url, prefix="kvk")
    assert get(reader, names, 10) == [b"record"]
    with pytest.raises(TierUnavailable, match="NOPERM"):
        put(reader, make_names(1), [b"record"])
    stranger = open_tier(server.url, prefix="other")
    with pytest.raises(TierUnavailable, match="NOPERM"):
        stranger.contains_many(names)
    for one in (tier, reader, stranger):
        one.close()


def test_a_unix_socket_and_a_database(make_server, flavour):
    server = make_server(flavour)
    names, record = make_names(1), random_bytes(3 * PART)
    by_socket = open_tier(f"unix://{server.socket_path}?db=3&prefix=u", prefix="u")
    by_port = open_tier(f"{server.url}/3", prefix="u")
    other_db = open_tier(server.url, prefix="u")
    assert put(by_socket, names, [record]) == [None]
    assert get(by_port, names, 3 * PART) == [record]
    assert get(other_db, names, 3 * PART) == [None]
    for tier in (by_socket, by_port, other_db):
        tier.close()


def test_a_server_that_is_loading_or_a_replica_is_unavailable(make_server, flavour):
    server, replica = make_server(flavour), make_server(flavour)
    with replica.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", str(server.port))
    tier = open_tier(replica.url)
    with pytest.raises(TierError, match="READONLY"):
        put(tier, make_names(1), [b"record"])
    tier.close()
