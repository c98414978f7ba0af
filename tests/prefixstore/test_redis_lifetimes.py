"""How long records in a real Redis server last: time to live, pins, deleted identities, sweeps."""

import threading
from contextlib import closing, suppress
from functools import partial

import pytest
from redis_proxy import Proxy
from redis_servers import wait_until
from redis_tiers import PART, get, make_names, open_tier, part_keys, put, random_bytes, record_key

from prefixstore.errors import TierTimeout, TierUnavailable
from prefixstore.settings import MAX_SECONDS
from prefixstore.tiers.base import Swept
from prefixstore.tiers.redis import calls
from prefixstore.tiers.redis.records import MANIFEST_BYTES


def test_records_expire_and_a_hit_begins_their_time_anew(redis_tier, redis_server, redis_client):
    names, record = make_names(2), random_bytes(2 * PART)
    put(redis_tier, names, [record] * 2)
    keys = [record_key(redis_client, names[0]), *part_keys(redis_client, names[0])]
    assert all(86390 <= redis_client.ttl(key) <= 86400 for key in keys)
    for key in keys:
        redis_client.expire(key, 100)
    redis_tier.contains_many(names)
    assert all(redis_client.ttl(key) <= 100 for key in keys)
    get(redis_tier, names, 2 * PART)
    assert all(redis_client.ttl(key) > 86390 for key in keys)
    quiet = open_tier(
        redis_server.url, prefix=redis_tier._config.prefix, refresh_ttl=False, ttl_s=1
    )
    redis_client.expire(keys[0], 100)
    assert get(quiet, names[:1], 2 * PART) == [record]
    assert redis_client.ttl(keys[0]) <= 100
    short = make_names(1)
    put(quiet, short, [record])
    wait_until(lambda: not quiet.contains_many(short)[0])
    quiet.close()


def test_a_server_takes_the_longest_time_there_is(redis_server, redis_client):
    with closing(open_tier(redis_server.url, ttl_s=MAX_SECONDS)) as tier:
        (name,), record = make_names(1), random_bytes(2 * PART)
        assert put(tier, [name], [record]) == [None]
        assert get(tier, [name], 2 * PART) == [record]
        assert tier.pin_many([name]) == tier.pin_many([name], is_pinned=False) == [True]
        assert redis_client.ttl(record_key(redis_client, name)) > MAX_SECONDS - 100


def test_pins_keep_from_expiry_and_hits_do_not_undo_them(redis_tier, redis_client):
    (name,), record = make_names(1), random_bytes(2 * PART)
    assert redis_tier.pin_many([name]) == [False]
    put(redis_tier, [name], [record])
    keys = [record_key(redis_client, name), *part_keys(redis_client, name)]
    assert redis_tier.pin_many([name]) == [True]
    assert [redis_client.ttl(key) for key in keys] == [-1, -1]
    assert get(redis_tier, [name], 2 * PART) == [record]
    assert [redis_client.ttl(key) for key in keys] == [-1, -1]
    assert redis_tier.pin_many([name], is_pinned=False) == [True]
    assert all(86390 <= redis_client.ttl(key) <= 86400 for key in keys)
    assert redis_client.keys("*pinned") == []


def test_a_deleted_identity_is_gone_for_everybody(redis_tier, redis_server, redis_client):
    other = open_tier(redis_server.url, prefix=redis_tier._config.prefix)
    names, kept = make_names(6), make_names(2, b"k" * 16)
    records = [random_bytes(2 * PART, seed) for seed in range(8)]
    put(redis_tier, names + kept, records)
    assert get(other, names, 2 * PART) == records[:6]  # so it knows the generation
    redis_tier.pin_many(names[:2])
    redis_tier.delete_identity(names[0].identity)
    for one in (other, redis_tier):
        assert get(one, names + kept, 2 * PART) == [None] * 6 + records[6:]
        assert one.contains_many(names) == [False] * 6
        assert one.pin_many(names[:1]) == [False]
        assert one.delete_many(names[:1]) == [False]
    assert redis_client.keys(f"*{names[0].block_hash.hex()}*") == []  # nothing stays, pinned or not
    put(other, names, records[:6])
    assert get(redis_tier, names, 2 * PART) == records[:6]
    other.close()


def leftovers(client) -> list[bytes]:
    """All keys except the generations."""
    return [key for key in client.keys("*") if not key.endswith(b":generation")]


def test_pinned_records_go_with_their_identity_however_many(redis_tier, redis_server, redis_client):
    """Deleting them takes longer than one call may take."""
    names = make_names(2000)
    put(redis_tier, names, [b"x"] * len(names))
    assert all(redis_tier.pin_many(names))
    hasty = open_tier(redis_server.url, prefix=redis_tier._config.prefix, timeout_s=0.05)
    for _ in range(100):  # on a busy machine even the first step may be late
        with suppress(TierTimeout):
            hasty.delete_identity(names[0].identity)
            break
    assert leftovers(redis_client) == []
    hasty.close()


def test_a_deletion_that_is_cut_short_is_finished_by_the_next(
    redis_tier, redis_server, redis_client
):
    """The connection is cut at each command in turn; the server still gets that command."""
    names, record = make_names(3), random_bytes(2 * PART)
    with (
        closing(Proxy(redis_server.port)) as proxy,
        closing(open_tier(proxy.url, prefix=redis_tier._config.prefix)) as far,
    ):
        for cut_at in range(1, 1200, 60):
            put(far, names, [record] * 3)
            assert far.pin_many(names) == [True] * 3
            proxy.cut_commands_at = cut_at
            for _ in range(3):
                with suppress(TierUnavailable):
                    far.delete_identity(names[0].identity)
                    break
            assert leftovers(redis_client) == [], cut_at
            proxy.cut_commands_at = None


def test_a_deletion_that_never_came_to_it_costs_no_pins(redis_tier, redis_client):
    """A client announces the generation that it will end, and dies before ending it."""
    (name,) = make_names(1)
    put(redis_tier, [name], [b"x"])
    assert redis_tier.pin_many([name]) == [True]
    keys = redis_tier._keys
    generation = redis_client.get(keys.generation(name.identity))
    redis_client.sadd(keys.ended(name.identity), generation)
    redis_tier._sweeper().drop_ended(name.identity)
    assert get(redis_tier, [name], 1) == [b"x"]
    assert redis_client.ttl(record_key(redis_client, name)) == -1
    redis_tier.delete_identity(name.identity)
    assert leftovers(redis_client) == []


def test_nothing_written_before_a_deletion_is_found_after_it(redis_tier, redis_server):
    """A writer never stops; what it wrote before a deletion began is not found afterwards."""
    other = open_tier(redis_server.url, prefix=redis_tier._config.prefix)
    names, is_over = make_names(4), threading.Event()
    counts = [0, 0]  # begun, done

    def write() -> None:
        while not is_over.is_set():
            number = counts[0] = counts[0] + 1
            record = number.to_bytes(8, "little")
            assert put(other, [names[number % 4]], [record]) == [None]
            counts[1] = number

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(30):
        wait_until(partial(lambda least: counts[1] >= least, counts[1] + 5))
        num_done = counts[1]
        redis_tier.delete_identity(names[0].identity)
        for record in get(redis_tier, names, 8):
            assert record is None or int.from_bytes(record, "little") > num_done
    is_over.set()
    writer.join()
    other.close()


def test_a_lost_generation_brings_back_nothing(redis_tier, redis_client):
    names, record = make_names(2), random_bytes(100)
    put(redis_tier, names, [record] * 2)
    redis_client.delete(*redis_client.keys("*generation"))  # as an eviction might
    assert get(redis_tier, names, 100) == [None, None]
    put(redis_tier, names[:1], [record])
    assert get(redis_tier, names, 100) == [record, None]


def put_list(client, key: bytes) -> None:
    client.delete(key)
    client.rpush(key, b"a list")


SPOILERS = {
    "list": put_list,
    "number": lambda client, key: client.set(key, b"1"),
    "no text": lambda client, key: client.set(key, b"\xff\xfe"),
    "long": lambda client, key: client.set(key, b"0" * 70_000),
}


@pytest.fixture(params=SPOILERS.values(), ids=SPOILERS)
def spoil_generation(request):
    """Puts something else under the key of the only identity's generation."""

    def spoil(client) -> None:
        (key,) = client.keys("*:generation")
        request.param(client, key)

    return spoil


@pytest.mark.parametrize("size", [100, 3 * PART])
@pytest.mark.parametrize("is_remembered", [True, False])
def test_what_is_no_generation_is_none_and_the_next_writer_mends_it(
    redis_tier, redis_client, size, is_remembered, spoil_generation
):
    names, record = make_names(3), random_bytes(size)
    for reads_first in (True, False):
        put(redis_tier, names, [record] * 3)
        spoil_generation(redis_client)
        if not is_remembered:
            redis_tier._caller.forget(names[0].identity)
        if reads_first:
            assert get(redis_tier, names, size) == [None] * 3
            assert redis_tier.contains_many(names) == [False] * 3
            assert redis_tier.delete_many(names) == [False] * 3
            assert redis_tier.pin_many(names) == [False] * 3
        assert put(redis_tier, names, [record] * 3) == [None] * 3
        assert get(redis_tier, names, size) == [record] * 3


USES = {
    "delete_identity": lambda tier, name: tier.delete_identity(name.identity),
    "sweep": lambda tier, name: tier.sweep(),
    "check": lambda tier, name: tier.check(fix=True),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_is_no_generation_is_in_nobodys_way(redis_tier, redis_client, use, spoil_generation):
    (name,) = make_names(1)
    put(redis_tier, [name], [bytes(100)])
    spoil_generation(redis_client)
    use(redis_tier, name)
    put(redis_tier, [name], [bytes(10)])
    assert get(redis_tier, [name], 100) == [bytes(10)]


def test_nothing_is_waited_for_where_a_server_lost_all(redis_tier, redis_client, monkeypatch):
    """Its new generation is known at once; only for temporary trouble the tier waits."""
    names, records = make_names(3), [bytes([i]) * 100 for i in range(3)]
    put(redis_tier, names, records)
    redis_client.flushall()

    def fail(pause_s: float, deadline: float) -> None:
        raise AssertionError(f"paused for {pause_s} s")

    monkeypatch.setattr(calls, "_pause", fail)
    assert redis_tier.contains_many(names) == [False] * 3
    put(redis_tier, names, records)
    assert get(redis_tier, names, 100) == records


def test_sweep_finds_orphans_and_ended_generations(redis_tier, redis_client):
    names, record = make_names(3), random_bytes(3 * PART)
    put(redis_tier, names, [record] * 3)
    old_part, new_part = (part_keys(redis_client, name)[0] for name in names[:2])
    for name in names[:2]:
        redis_client.delete(record_key(redis_client, name))
    assert redis_tier.sweep() == Swept()  # too young: such parts may still be written
    for key in redis_client.keys(f"*{names[0].block_hash.hex()}*"):
        redis_client.expire(key, 60)
    assert redis_tier.sweep() == Swept(num_orphans=2, num_bytes=2 * PART)
    assert not redis_client.exists(old_part) and redis_client.exists(new_part)
    redis_tier.delete_identity(names[0].identity)
    swept = redis_tier.sweep()
    assert swept == Swept(num_orphans=5, num_bytes=5 * PART + MANIFEST_BYTES)
    assert leftovers(redis_client) == []


def test_check_finds_and_drops_what_is_not_whole(redis_tier, redis_client):
    names, record = make_names(3), random_bytes(2 * PART)
    put(redis_tier, names, [record] * 3)
    redis_client.delete(*part_keys(redis_client, names[1]))
    (problem,) = redis_tier.check()
    assert names[1].block_hash.hex() in problem and "not whole" in problem
    assert redis_tier.check(fix=True) == [problem]
    assert redis_tier.check() == []
    assert get(redis_tier, names, 2 * PART) == [record, None, record]
