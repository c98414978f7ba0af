"""The Redis tier on many servers: a cluster and Sentinel, and what a failover costs."""

import contextlib
import secrets
import time

import numpy as np
import pytest
from redis_servers import FLAVOURS, Cluster, Sentinels, stopped, wait_until
from redis_tiers import PART, get, make_names, open_tier, put, random_bytes

from prefixstore.errors import TierError, TierPartSilent, TierTimeout, TierUnavailable
from prefixstore.store.breaker import BreakerConfig
from prefixstore.store.guarded_tier import GuardedTier
from prefixstore.tiers.redis.address import Address
from prefixstore.tiers.redis.silent_servers import SilentServers

FLAVOUR = next(iter(FLAVOURS))  # starting six servers of each would take too long


@pytest.fixture(scope="module")
def cluster(server_directory):
    cluster = Cluster(FLAVOURS[FLAVOUR], server_directory)
    yield cluster
    cluster.kill()


@contextlib.contextmanager
def no_failover(cluster):
    """Silent nodes stay primaries inside the block."""
    clients = [node.client() for node in cluster.nodes]
    for client in clients:
        client.config_set("cluster-node-timeout", 60_000)
    try:
        yield
    finally:
        wait_until(lambda: all(map(hears_all, clients)))  # else a silent node is replaced now
        for client in clients:
            client.config_set("cluster-node-timeout", 1000)


def hears_all(client) -> bool:
    """Whether this node waits for no other node's answer."""
    nodes = client.execute_command("CLUSTER NODES").values()
    return all(node["last_ping_sent"] == "0" for node in nodes)


@pytest.fixture
def _no_failover(cluster):
    """No node is replaced because the machine stalls."""
    with no_failover(cluster):
        yield


def put_records(tier, count: int):
    names, records = make_names(count), [random_bytes(3 * PART, seed) for seed in range(count)]
    assert put(tier, names, records) == [None] * count
    return names, records


@pytest.mark.usefixtures("_no_failover")
def test_records_spread_and_their_parts_stay_together(cluster):
    tier = open_tier(cluster.url)
    names, records = put_records(tier, 60)
    assert get(tier, names, 3 * PART) == records
    keys = [node.client().keys(f"{tier._config.prefix}*") for node in cluster.nodes[:3]]
    assert all(len(found) > 20 for found in keys)
    for name in names:
        digest = name.block_hash.hex().encode()
        assert sorted(sum(digest in key for key in found) for found in keys) == [0, 0, 3]
    assert tier.pin_many(names[:2]) == [True, True]
    assert tier.delete_many(names[-1:]) == [True]
    assert tier.stats().num_records >= 59 * 3
    tier.delete_identity(names[0].identity)
    assert tier.contains_many(names) == [False] * 60
    assert tier.sweep().num_orphans == 57 * 3  # two were pinned, one deleted
    tier.close()


@pytest.mark.usefixtures("_no_failover")
def test_follows_slots_that_move(cluster):
    tier = open_tier(cluster.url)
    names, records = put_records(tier, 12)
    source, target = (node.client() for node in cluster.nodes[:2])
    ids = [client.execute_command("CLUSTER", "MYID") for client in (source, target)]
    keys = source.keys(f"{tier._config.prefix}*}}")
    slot = source.execute_command("CLUSTER", "KEYSLOT", keys[0])
    moving = source.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100)
    target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
    source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
    port = cluster.nodes[1].port
    for key in moving[:2]:  # one part, or the manifest, is left behind: ASK for the others
        source.execute_command("MIGRATE", "127.0.0.1", port, key, 0, 5000)
    assert get(tier, names, 3 * PART) == records
    for key in moving[2:]:
        source.execute_command("MIGRATE", "127.0.0.1", port, key, 0, 5000)
    for client in (target, source):
        client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
    assert get(tier, names, 3 * PART) == records  # MOVED
    tier.close()


@pytest.mark.usefixtures("_no_failover")
def test_a_cluster_behind_the_url_of_one_server_is_said(cluster):
    tier = open_tier(cluster.nodes[0].url)
    with pytest.raises(TierUnavailable, match=r"redis\+cluster://"):
        for number in range(30):  # only other nodes' slots show it
            tier.contains_many(make_names(1, bytes([number]) * 16))
    tier.close()


def finds_all(tier, names, records) -> bool:
    try:
        return get(tier, names, 3 * PART) == records
    except TierError:
        return False


def test_a_primary_that_falls_silent_is_replaced_by_its_replica(cluster):
    tier = open_tier(cluster.url, timeout_s=1)
    names, records = put_records(tier, 30)
    assert get(tier, names, 3 * PART) == records  # there are connections to all nodes
    wait_until(cluster.nodes[1].is_replicated)
    with cluster.nodes[1].stopped():
        assert not finds_all(tier, names, records)
        wait_until(lambda: finds_all(tier, names, records))
        assert put(tier, names[:3], records[:3]) == [None] * 3
    tier.close()


def put_on_a_node_to_stop(cluster, tier, num_records: int, num_bytes: int):
    """Put one record under many names, spread over the nodes. Returns the names, a node to stop,
    and which names it has. It has neither their identity's generation, on which all depend, nor its
    pins, on which deletions do.
    """
    address_of, ends_at = tier._servers.address_of, time.monotonic() + 60
    primaries = tier._servers.primaries(ends_at)
    others = [node for node in cluster.nodes[1:] if node.address in primaries]  # 0 is to die
    node, record = None, random_bytes(num_bytes)
    while node is None:  # slots are random
        identity = secrets.token_bytes(16)
        names = make_names(num_records, identity)
        assert put(tier, names, [record] * num_records) == [None] * num_records
        generations = tier._caller._generations
        pins = tier._keys.pinned(identity, generations[identity])
        shared = (tier._keys.generation(identity), pins)
        homes = [address_of(key, ends_at) for key in shared]
        node = next((node for node in others if node.address not in homes), None)
    keys = tier._keys.records(enumerate(names), generations)
    is_there = [address_of(keys[i], ends_at) == node.address for i in range(num_records)]
    assert 0 < sum(is_there) < num_records
    return names, record, node, is_there


@pytest.mark.parametrize("num_bytes", [1000, 3 * PART], ids=["one part", "three parts"])
def test_a_silent_node_costs_its_own_records_alone(cluster, num_bytes):
    tier = open_tier(cluster.url, timeout_s=4)  # no longer than opening a connection may take
    tier._servers.silent = SilentServers(pause_s=600)
    names, record, node, is_silent = put_on_a_node_to_stop(cluster, tier, 30, num_bytes)
    with no_failover(cluster), node.stopped():
        found = get(tier, names, num_bytes)
        for got, is_lost in zip(found, is_silent, strict=True):
            assert isinstance(got, TierTimeout) if is_lost else got == record
        for is_there, is_lost in zip(tier.contains_many(names), is_silent, strict=True):
            assert isinstance(is_there, TierPartSilent) if is_lost else is_there is True
        for was_there, is_lost in zip(tier.delete_many(names), is_silent, strict=True):
            assert isinstance(was_there, TierPartSilent) if is_lost else was_there is True
    tier.close()


def test_a_silent_node_is_not_waited_for_again(cluster):
    """Nor does the tier count as failing when calls ask only for that node's records."""
    tier = open_tier(cluster.url)
    tier._servers.silent = SilentServers(pause_s=600)
    guarded = GuardedTier(tier, BreakerConfig(failures=1, pause_s=600))
    names, _, node, is_silent = put_on_a_node_to_stop(cluster, tier, 30, 1000)
    lost = [name for name, is_lost in zip(names, is_silent, strict=True) if is_lost]
    expected = [None if is_lost else True for is_lost in is_silent]
    seconds = []
    with no_failover(cluster), node.stopped():
        for _ in range(5):
            begin = time.monotonic()
            assert guarded.contains_many(names, begin + 5) == expected
            seconds.append(time.monotonic() - begin)
        assert guarded.contains_many(lost) == [None] * len(lost)
        assert seconds[0] > 4 and min(seconds[1:]) < 2
        use = guarded.use()
        assert (use.num_errors, use.num_timeouts) == (5 * len(lost) + 1, len(lost))
        assert not use.is_down
    tier.close()


@pytest.mark.parametrize("num_bytes", [1000, 3 * PART], ids=["one part", "three parts"])
def test_a_tier_is_not_to_blame_for_a_call_on_a_silent_node_alone(cluster, num_bytes):
    tier = open_tier(cluster.url)
    names, _, node, is_silent = put_on_a_node_to_stop(cluster, tier, 30, num_bytes)
    lost = [name for name, is_lost in zip(names, is_silent, strict=True) if is_lost]
    for seconds in (0.5, 5, 20):  # on a stalled machine the others may be late, too
        tier._servers.silent = SilentServers()
        guarded = GuardedTier(tier, BreakerConfig(failures=1, pause_s=600))
        rows = [np.empty(num_bytes, np.uint8) for _ in lost]
        with no_failover(cluster), node.stopped():
            found = guarded.read_many(lost, rows, time.monotonic() + seconds, lambda: None)
        use = guarded.use()
        assert found == [None] * len(lost)
        if not use.is_down:
            break
    assert (use.num_timeouts, use.is_down) == (1, False)
    tier.close()


def test_a_silent_node_that_answers_again_is_found_again(cluster):
    tier = open_tier(cluster.url, timeout_s=4)
    names, record, node, is_silent = put_on_a_node_to_stop(cluster, tier, 30, 1000)
    with no_failover(cluster), node.stopped():
        for is_there, is_lost in zip(tier.contains_many(names), is_silent, strict=True):
            assert isinstance(is_there, TierTimeout) if is_lost else is_there is True
    wait_until(lambda: tier.contains_many(names) == [True] * 30)
    assert get(tier, names, 1000) == [record] * 30
    tier.close()


def test_silent_servers_are_tried_again_after_pauses_that_grow():
    now = [0.0]
    servers = SilentServers(pause_s=1, clock=lambda: now[0])
    silent, other = Address("silent", 1), Address("other", 2)

    def may_ask(address=silent) -> bool:
        return servers.may_ask(address, now[0])

    def note(answered, unanswered, asked_at) -> None:
        servers.note_call(dict.fromkeys(answered, asked_at), dict.fromkeys(unanswered, asked_at))

    note([], [silent, other], -1)  # no node answered: no evidence against one
    note([other], [silent], now[0])  # it was given no time
    assert may_ask()
    note([other], [silent], -1)
    for pause in (1, 2, 4, 8, 16, 32, 60, 60):
        note([other], [silent], now[0] - 1)  # calls that were already under way
        note([silent], [], now[0] - 1)
        now[0] += pause - 0.01
        assert not may_ask() and may_ask(other)
        now[0] += 0.02
        assert may_ask()
        assert not may_ask()  # one call at a time
        note([other], [silent], now[0] - 0.5)  # a call that began before the trial
        note([silent], [], now[0] - 0.5)
        now[0] += 0.1
        note([other], [silent], now[0] - 0.1)
    now[0] += 60.01
    assert may_ask()
    now[0] += 60.01
    assert may_ask()  # the trial before had no result
    note([silent], [], now[0])
    assert may_ask() and may_ask()


def test_much_that_waits_for_a_silent_node_does_not_hold_up_the_others(cluster):
    tier = open_tier(cluster.url, timeout_s=1)
    names, record, node, is_silent = put_on_a_node_to_stop(cluster, tier, 60, 3 * PART)
    lost = [name for name, is_lost in zip(names, is_silent, strict=True) if is_lost]
    others = [name for name in names if name not in lost]
    with no_failover(cluster), node.stopped():
        found = get(tier, lost + others, 2 << 20)  # a read moves what the buffers have room for
        assert all(isinstance(got, TierTimeout) for got in found[: len(lost)])
        assert found[len(lost) :] == [record] * len(others)
    tier.close()


def test_a_primary_that_dies_costs_misses_until_its_replica_takes_over(cluster):
    tier = open_tier(cluster.url, timeout_s=2)
    names, records = put_records(tier, 30)
    wait_until(cluster.nodes[0].is_replicated)
    cluster.nodes[0].kill()
    num_right = []

    def is_whole_again() -> bool:
        begin = time.monotonic()
        try:
            found = get(tier, names, 3 * PART)
        except TierError:
            found = []
        assert time.monotonic() - begin < 20  # ten times the call's own timeout
        right = [got == record for got, record in zip(found, records, strict=False)]
        assert all(
            got == record or got is None or isinstance(got, TierError)
            for got, record in zip(found, records, strict=False)
        )
        num_right.append(sum(right))
        return sum(right) == len(records)

    wait_until(is_whole_again)
    assert num_right[0] < len(records)
    assert put(tier, names[:3], records[:3]) == [None] * 3
    tier.close()


def test_sentinels_name_the_primary_after_a_failover(server_directory):
    sentinels = Sentinels(FLAVOURS[FLAVOUR], server_directory)
    try:
        tier = open_tier(sentinels.url)
        names, records = put_records(tier, 6)
        wait_until(sentinels.primary.is_replicated)
        sentinels.watch_closely()
        sentinels.primary.kill()
        assert not finds_all(tier, names, records)
        wait_until(lambda: finds_all(tier, names, records))
        assert put(tier, make_names(1), [b"record"]) == [None]
        tier.close()
    finally:
        sentinels.kill()


def test_sentinels_are_asked_again_when_the_primary_falls_silent(server_directory):
    sentinels = Sentinels(FLAVOURS[FLAVOUR], server_directory)
    try:
        tier = open_tier(sentinels.url, timeout_s=1)
        names, records = put_records(tier, 6)
        wait_until(sentinels.primary.is_replicated)
        sentinels.watch_closely()
        with sentinels.primary.stopped():
            assert not finds_all(tier, names, records)
            wait_until(lambda: finds_all(tier, names, records))
            assert put(tier, make_names(1), [b"record"]) == [None]
        tier.close()
    finally:
        sentinels.kill()


def test_a_silent_sentinel_leaves_time_for_the_others(server_directory):
    sentinels = Sentinels(FLAVOURS[FLAVOUR], server_directory)
    try:
        tier = open_tier(sentinels.url, timeout_s=1)  # no longer than opening a connection may take
        (first, _), (second, _), _ = sentinels.sentinels
        with stopped(first), stopped(second):
            assert tier.contains_many(make_names(1)) == [False]
        tier.close()
    finally:
        sentinels.kill()


def test_sentinels_that_do_not_know_the_name_are_said(server_directory):
    sentinels = Sentinels(FLAVOURS[FLAVOUR], server_directory)
    try:
        tier = open_tier(sentinels.url.replace(sentinels.MASTER, "nobody"))
        with pytest.raises(TierUnavailable, match="knows no 'nobody'"):
            tier.contains_many(make_names(1))
        tier.close()
    finally:
        sentinels.kill()
