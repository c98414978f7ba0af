"""Records in a real server: parts, pins, time to live, deletion of identities, threads, forks."""

import os
import threading
from functools import partial

import pytest
from redis_servers import FLAVOURS, Server, wait_until
from redis_tiers import PART, get, make_names, open_tier, put, random_bytes

from prefixstore.block_key import RecordName
from prefixstore.errors import BlockCorrupted
from prefixstore.tiers.base import Swept
from prefixstore.tiers.redis.records import MANIFEST_BYTES

SIZES = [0, 1, PART - 1, PART, PART + 1, 2 * PART, 5 * PART + 77]


@pytest.fixture(params=FLAVOURS)
def server(request, shared_servers) -> Server:
    return shared_servers(request.param)


@pytest.fixture
def tier(server):
    with server.client() as client:
        client.flushall()
    tier = open_tier(server.url)
    yield tier
    assert tier.check() == []
    tier.close()


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


def part_keys(client, name: RecordName) -> list[bytes]:
    return sorted(client.keys(f"*{{{name.block_hash.hex()}}}:*"))


def record_key(client, name: RecordName) -> bytes:
    (key,) = client.keys(f"*{{{name.block_hash.hex()}}}")
    return key


def test_keeps_records_of_every_length(tier):
    names, records = make_names(len(SIZES)), [random_bytes(size, size) for size in SIZES]
    assert put(tier, names, records) == [None] * len(SIZES)
    assert get(tier, names, max(SIZES)) == records
    outs = [bytearray(size) for size in SIZES]
    assert tier.get_many(names, [memoryview(out) for out in outs]) == SIZES
    assert outs == records
    assert tier.contains_many(names) == [True] * len(SIZES)


def test_a_server_has_the_first_records_before_the_last_are_looked_at(tier, client):
    names, records = make_names(100), [random_bytes(PART, seed) for seed in range(100)]
    stored = []

    class Looking(list):
        """Of records: sees what is stored when the last one is asked for."""

        def __getitem__(self, index):
            if index == 99:
                wait_until(lambda: client.dbsize() > 1)  # more than the generation
                stored.append(client.dbsize())
            return super().__getitem__(index)

    views = Looking(memoryview(record) for record in records)
    assert tier.put_many(names, views) == [None] * 100
    assert 1 < stored[0] < 100
    assert get(tier, names, PART) == records


def test_what_fails_half_way_keeps_what_was_sent_and_no_connection(tier):
    names, records = make_names(100), [random_bytes(PART, seed) for seed in range(100)]
    views = [memoryview(record) for record in records]
    views[60] = memoryview(bytes(2 * PART))[::2]
    with pytest.raises(TypeError, match="contiguous"):
        tier.put_many(names, views)
    found = get(tier, names, PART)
    assert all(one in (None, record) for one, record in zip(found, records, strict=True))
    views[60] = memoryview(records[60])
    assert tier.put_many(names, views) == [None] * 100
    assert get(tier, names, PART) == records


def test_splits_what_is_longer_than_a_part(tier, client):
    names = make_names(3)
    put(tier, names, [bytes(size) for size in (PART, PART + 1, 5 * PART)])
    assert [len(part_keys(client, name)) for name in names] == [0, 1, 4]
    lengths = [client.strlen(key) for name in names for key in part_keys(client, name)]
    assert lengths == [PART // 2, PART, PART, PART, PART]


def test_reads_parts_of_records(tier):
    (name,), record = make_names(1), random_bytes(4 * PART + 100)
    put(tier, [name], [record])
    ranges = [(0, 10), (PART - 5, 10), (10, 3 * PART), (4 * PART, 100), (4 * PART + 99, 1), (7, 0)]
    outs = [bytearray(length) for _, length in ranges]
    views, offsets = [memoryview(out) for out in outs], [begin for begin, _ in ranges]
    outcomes = tier.get_many([name] * len(ranges), views, offsets=offsets)
    assert outcomes == [length for _, length in ranges]
    assert outs == [record[begin : begin + length] for begin, length in ranges]
    beyond = [memoryview(bytearray(50)) for _ in range(2)]
    assert tier.get_many([name] * 2, beyond, offsets=[4 * PART + 90, 5 * PART]) == [10, 0]


SMALL = [1, 300, PART - 50, PART]  # records of one part, and so of one command each


def test_reads_many_small_records_and_misses_at_once(tier):
    names, absent = make_names(200), make_names(100)
    records = [random_bytes(SMALL[i % 4], i) for i in range(200)]
    assert put(tier, names, records) == [None] * 200
    mixed = [name for pair in zip(names, absent * 2, strict=True) for name in pair]
    expected = [found for record in records for found in (record, None)]
    assert get(tier, mixed, PART) == expected
    assert tier.contains_many(mixed) == [found is not None for found in expected]
    assert put(tier, names, records) == [None] * 200  # they are there


@pytest.mark.parametrize("begin", [0, 1, 299, 300, PART - 60])
def test_reads_a_range_of_many_small_records(tier, begin):
    names, absent = make_names(4), make_names(1)
    records = [random_bytes(size, size) for size in SMALL]
    put(tier, names, records)
    expected = [record[begin : begin + 50] for record in records]
    assert get(tier, [*names, *absent], 50, offsets=[begin] * 5) == [*expected, None]


def test_small_reads_find_records_that_others_wrote_in_parts(tier, server, client):
    (name,), record = make_names(1), random_bytes(3 * PART + 5)
    put(tier, [name], [record])
    large = open_tier(server.url, prefix=tier._config.prefix, part_bytes=16 * PART)
    keys = [record_key(client, name), *part_keys(client, name)]
    for read in [{}, {"offsets": [2 * PART]}]:
        for key in keys:
            client.expire(key, 100)
        large._renewed.clear()
        begin = read.get("offsets", [0])[0]
        assert get(large, [name], len(record), **read) == [record[begin:]]
        assert all(client.ttl(key) > 86390 for key in keys)
    assert large.contains_many([name]) == [True]
    large.close()


@pytest.mark.parametrize("damage", [b"", b"KVR", b"x" * 40])
def test_small_reads_say_what_is_no_record(tier, client, damage):
    (name,) = make_names(1)
    put(tier, [name], [bytes(100)])
    client.set(record_key(client, name), damage)
    for read in [{}, {"offsets": [10]}]:
        outcome = tier.get_many([name], [memoryview(bytearray(50))], **read)[0]
        assert outcome is None if damage == b"" else isinstance(outcome, BlockCorrupted)
    put(tier, [name], [bytes(100)])
    assert get(tier, [name], 100) == [bytes(100)]


def test_a_record_longer_than_the_memory_for_it_is_refused(tier):
    (name,) = make_names(1)
    put(tier, [name], [bytes(100)])
    (outcome,) = tier.get_many([name], [memoryview(bytearray(99))])
    assert isinstance(outcome, BlockCorrupted)


def test_writes_from_memory_of_any_type_and_reads_into_it(tier):
    (name,) = make_names(1)
    words = memoryview(random_bytes(2 * PART)).cast("I")
    assert tier.put_many([name], [words]) == [None]
    out = memoryview(bytearray(2 * PART)).cast("I")
    assert tier.get_many([name], [out]) == [2 * PART]
    assert out == words


def test_a_part_that_is_gone_makes_a_miss_and_a_new_record_mends_it(tier, client):
    names, record = make_names(2), random_bytes(3 * PART)
    put(tier, names, [record, record])
    client.delete(part_keys(client, names[0])[1])
    assert get(tier, names, len(record)) == [None, record]
    assert tier.contains_many(names) == [False, True]
    assert get(tier, names[:1], PART, offsets=[PART + PART // 2]) == [None]
    put(tier, names, [record, record])
    assert get(tier, names, len(record)) == [record, record]


def test_parts_of_two_writers_never_mix(tier, server, client):
    """Both write the same names at once; whoever reads gets the whole of one of them."""
    other = open_tier(server.url, prefix=tier._config.prefix)
    names = make_names(8)
    versions = [random_bytes(3 * PART + 1, seed) for seed in range(2)]
    barrier = threading.Barrier(2)

    def write(writer, record: bytes) -> None:
        barrier.wait()
        assert put(writer, names, [record] * len(names)) == [None] * len(names)

    threads = [
        threading.Thread(target=write, args=pair)
        for pair in zip((tier, other), versions, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(record in versions for record in get(tier, names, 4 * PART))
    assert sum(len(part_keys(client, name)) for name in names) == 3 * len(names)
    other.close()


def test_what_is_not_ours_is_corrupted_and_not_a_hit(tier, client):
    names, record = make_names(3), random_bytes(100)
    put(tier, names, [record] * 3)
    client.set(record_key(client, names[0]), b"something else, longer than a manifest is")
    client.setrange(record_key(client, names[1]), MANIFEST_BYTES + 100, b"more")
    key = record_key(client, names[2])
    client.delete(key)
    client.rpush(key, b"a list")
    outcomes = get(tier, names, 200)
    assert all(isinstance(outcome, BlockCorrupted) for outcome in outcomes)
    assert tier.delete_many(names[:2]) == [True, True]
    assert len(tier.check(fix=True)) == 1  # the list
    assert tier.check() == []


def test_records_expire_and_a_hit_begins_their_time_anew(tier, server, client):
    names, record = make_names(2), random_bytes(2 * PART)
    put(tier, names, [record] * 2)
    keys = [record_key(client, names[0]), *part_keys(client, names[0])]
    assert all(86390 <= client.ttl(key) <= 86400 for key in keys)
    for key in keys:
        client.expire(key, 100)
    tier.contains_many(names)
    assert all(client.ttl(key) <= 100 for key in keys)
    get(tier, names, 2 * PART)
    assert all(client.ttl(key) > 86390 for key in keys)
    quiet = open_tier(server.url, prefix=tier._config.prefix, refresh_ttl=False, ttl_s=1)
    client.expire(keys[0], 100)
    assert get(quiet, names[:1], 2 * PART) == [record]
    assert client.ttl(keys[0]) <= 100
    short = make_names(1)
    put(quiet, short, [record])
    wait_until(lambda: not quiet.contains_many(short)[0], 3)
    quiet.close()


def test_pins_keep_from_expiry_and_hits_do_not_undo_them(tier, client):
    (name,), record = make_names(1), random_bytes(2 * PART)
    assert tier.pin_many([name]) == [False]
    put(tier, [name], [record])
    keys = [record_key(client, name), *part_keys(client, name)]
    assert tier.pin_many([name]) == [True]
    assert [client.ttl(key) for key in keys] == [-1, -1]
    assert get(tier, [name], 2 * PART) == [record]
    assert [client.ttl(key) for key in keys] == [-1, -1]
    assert tier.pin_many([name], is_pinned=False) == [True]
    assert all(86390 <= client.ttl(key) <= 86400 for key in keys)
    assert client.keys("*pinned") == []


def test_a_deleted_identity_is_gone_for_everybody(tier, server, client):
    other = open_tier(server.url, prefix=tier._config.prefix)
    names, kept = make_names(6), make_names(2, b"k" * 16)
    records = [random_bytes(2 * PART, seed) for seed in range(8)]
    put(tier, names + kept, records)
    assert get(other, names, 2 * PART) == records[:6]  # it knows the generation now
    tier.pin_many(names[:2])
    tier.delete_identity(names[0].identity)
    for one in (other, tier):
        assert get(one, names + kept, 2 * PART) == [None] * 6 + records[6:]
        assert one.contains_many(names) == [False] * 6
        assert one.pin_many(names[:1]) == [False]
        assert one.delete_many(names[:1]) == [False]
    assert client.keys(f"*{names[0].block_hash.hex()}*") == []  # it was pinned: nothing stays
    put(other, names, records[:6])
    assert get(tier, names, 2 * PART) == records[:6]
    other.close()


def test_nothing_written_before_a_deletion_is_found_after_it(tier, server):
    """One writes all the time; what it wrote before a deletion began is never found after."""
    other = open_tier(server.url, prefix=tier._config.prefix)
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
        tier.delete_identity(names[0].identity)
        for record in get(tier, names, 8):
            assert record is None or int.from_bytes(record, "little") > num_done
    is_over.set()
    writer.join()
    other.close()


def test_a_lost_generation_brings_back_nothing(tier, client):
    names, record = make_names(2), random_bytes(100)
    put(tier, names, [record] * 2)
    client.delete(*client.keys("*generation"))  # as an eviction would
    assert get(tier, names, 100) == [None, None]
    put(tier, names[:1], [record])
    assert get(tier, names, 100) == [record, None]


def test_sweep_finds_orphans_and_ended_generations(tier, client):
    names, record = make_names(3), random_bytes(3 * PART)
    put(tier, names, [record] * 3)
    old_part, new_part = (part_keys(client, name)[0] for name in names[:2])
    for name in names[:2]:
        client.delete(record_key(client, name))
    assert tier.sweep() == Swept()  # as young as parts that are being written
    for key in client.keys(f"*{names[0].block_hash.hex()}*"):
        client.expire(key, 60)
    assert tier.sweep() == Swept(num_orphans=2, num_bytes=2 * PART)
    assert not client.exists(old_part) and client.exists(new_part)
    tier.delete_identity(names[0].identity)
    swept = tier.sweep()
    assert swept == Swept(num_orphans=5, num_bytes=5 * PART + MANIFEST_BYTES)
    assert [key for key in client.keys("*") if not key.endswith(b":generation")] == []


def test_check_finds_and_drops_what_is_not_whole(tier, client):
    names, record = make_names(3), random_bytes(2 * PART)
    put(tier, names, [record] * 3)
    client.delete(*part_keys(client, names[1]))
    (problem,) = tier.check()
    assert names[1].block_hash.hex() in problem and "not whole" in problem
    assert tier.check(fix=True) == [problem]
    assert tier.check() == []
    assert get(tier, names, 2 * PART) == [record, None, record]


def test_counts(tier, client):
    names = make_names(3)
    put(tier, names[:2], [bytes(10), bytes(20)])
    put(tier, names[:1], [bytes(10)])
    get(tier, names, 20)
    tier.delete_many(names)
    stats = tier.stats()
    assert (stats.num_puts, stats.written_bytes) == (2, 30)
    assert (stats.num_hits, stats.num_misses, stats.read_bytes) == (2, 1, 30)
    assert stats.num_deletes == 2
    assert stats.capacity_bytes == 0  # without maxmemory
    assert stats.used_bytes > 100_000 and stats.num_records == client.dbsize()


def test_says_who_is_connected(tier, client):
    tier.contains_many(make_names(1))
    assert "kvkernels-redis" in [row["name"] for row in client.client_list()]


def test_threads_share_a_tier(tier):
    names = make_names(12)
    records = dict(
        zip(names, (random_bytes(PART * (i % 4) + i, i) for i in range(12)), strict=True)
    )
    problems = []

    def work(thread: int) -> None:
        for step in range(25):
            some = [names[(thread + step * i) % 12] for i in range(1, 5)]
            put(tier, some, [records[name] for name in some])
            for name, found in zip(some, get(tier, some, 4 * PART), strict=True):
                if found not in (None, records[name]):
                    problems.append(f"{thread}: {name}: {found!r:.40}")
            if step % 5 == thread % 5:
                tier.delete_many(some[:1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert tier.stats().num_hits > 400


def test_a_forked_process_has_connections_of_its_own(tier, server):
    names, records = make_names(4), [random_bytes(3 * PART, seed) for seed in range(4)]
    put(tier, names, records)
    child = os.fork()
    if child == 0:
        is_right = all(get(tier, names, 3 * PART) == records for _ in range(20))
        os._exit(0 if is_right else 1)
    for _ in range(20):
        assert get(tier, names, 3 * PART) == records
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert get(tier, names, 3 * PART) == records
