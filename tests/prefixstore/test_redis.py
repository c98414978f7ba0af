"""Records in a real server: parts, ranges, incomplete records, counts, threads, forks."""

import os
import threading

import pytest
from redis_servers import wait_until
from redis_tiers import PART, get, make_names, open_tier, part_keys, put, random_bytes, record_key
from sample_blocks import make_keys, make_payload

from prefixstore.errors import BlockCorrupted
from prefixstore.record_header import MAX_RECORD_BYTES, TRAILER_BYTES
from prefixstore.store import Store
from prefixstore.store.block_sources import HostBlock
from prefixstore.tiers.redis.config import MAX_PART_BYTES, MIN_PART_BYTES
from prefixstore.tiers.redis.pool import Pool
from prefixstore.tiers.redis.records import MANIFEST_BYTES, Manifest, read_manifest

SIZES = [0, 1, PART - 1, PART, PART + 1, 2 * PART, 5 * PART + 77]


def test_keeps_records_of_every_length(redis_tier):
    names, records = make_names(len(SIZES)), [random_bytes(size, size) for size in SIZES]
    assert put(redis_tier, names, records) == [None] * len(SIZES)
    assert get(redis_tier, names, max(SIZES)) == records
    outs = [bytearray(size) for size in SIZES]
    assert redis_tier.get_many(names, [memoryview(out) for out in outs]) == SIZES
    assert outs == records
    assert redis_tier.contains_many(names) == [True] * len(SIZES)


def test_a_server_has_the_first_records_before_the_last_are_looked_at(redis_tier, redis_client):
    names, records = make_names(100), [random_bytes(PART, seed) for seed in range(100)]
    stored = []

    class Looking(list):
        """Names or records; records which keys are stored when the last one is accessed."""

        def __getitem__(self, index):
            if index == 99:
                wait_until(lambda: redis_client.dbsize() > 1)  # more keys than the generation
                stored.append(redis_client.dbsize())
            return super().__getitem__(index)

    views = Looking(memoryview(record) for record in records)
    assert redis_tier.put_many(names, views) == [None] * 100
    assert 1 < stored[0] < 100
    assert get(redis_tier, names, PART) == records


def test_what_fails_half_way_keeps_what_was_sent_and_no_connection(redis_tier):
    names, records = make_names(100), [random_bytes(PART, seed) for seed in range(100)]
    views = [memoryview(record) for record in records]
    views[60] = memoryview(bytes(2 * PART))[::2]
    with pytest.raises(TypeError, match="contiguous"):
        redis_tier.put_many(names, views)
    found = get(redis_tier, names, PART)
    assert all(one in (None, record) for one, record in zip(found, records, strict=True))
    views[60] = memoryview(records[60])
    assert redis_tier.put_many(names, views) == [None] * 100
    assert get(redis_tier, names, PART) == records


def test_splits_what_is_longer_than_a_part(redis_tier, redis_client):
    names = make_names(3)
    put(redis_tier, names, [bytes(size) for size in (PART, PART + 1, 5 * PART)])
    assert [len(part_keys(redis_client, name)) for name in names] == [0, 1, 4]
    lengths = [redis_client.strlen(key) for name in names for key in part_keys(redis_client, name)]
    assert lengths == [PART // 2, PART, PART, PART, PART]


def test_reads_parts_of_records(redis_tier):
    (name,), record = make_names(1), random_bytes(4 * PART + 100)
    put(redis_tier, [name], [record])
    ranges = [(0, 10), (PART - 5, 10), (10, 3 * PART), (4 * PART, 100), (4 * PART + 99, 1), (7, 0)]
    outs = [bytearray(length) for _, length in ranges]
    views, offsets = [memoryview(out) for out in outs], [begin for begin, _ in ranges]
    outcomes = redis_tier.get_many([name] * len(ranges), views, offsets=offsets)
    assert outcomes == [length for _, length in ranges]
    assert outs == [record[begin : begin + length] for begin, length in ranges]
    beyond = [memoryview(bytearray(50)) for _ in range(2)]
    assert redis_tier.get_many([name] * 2, beyond, offsets=[4 * PART + 90, 5 * PART]) == [10, 0]


SMALL = [1, 300, PART - 50, PART]  # records of one part, so one command each


def test_reads_many_small_records_and_misses_at_once(redis_tier):
    names, absent = make_names(200), make_names(100)
    records = [random_bytes(SMALL[i % 4], i) for i in range(200)]
    assert put(redis_tier, names, records) == [None] * 200
    mixed = [name for pair in zip(names, absent * 2, strict=True) for name in pair]
    expected = [found for record in records for found in (record, None)]
    assert get(redis_tier, mixed, PART) == expected
    assert redis_tier.contains_many(mixed) == [found is not None for found in expected]
    assert put(redis_tier, names, records) == [None] * 200  # they exist already


@pytest.mark.parametrize("begin", [0, 1, 299, 300, PART - 60])
def test_reads_a_range_of_many_small_records(redis_tier, begin):
    names, absent = make_names(4), make_names(1)
    records = [random_bytes(size, size) for size in SMALL]
    put(redis_tier, names, records)
    expected = [record[begin : begin + 50] for record in records]
    assert get(redis_tier, [*names, *absent], 50, offsets=[begin] * 5) == [*expected, None]


def test_small_reads_find_records_that_others_wrote_in_parts(
    redis_tier, redis_server, redis_client
):
    (name,), record = make_names(1), random_bytes(3 * PART + 5)
    put(redis_tier, [name], [record])
    large = open_tier(redis_server.url, prefix=redis_tier._config.prefix, part_bytes=16 * PART)
    keys = [record_key(redis_client, name), *part_keys(redis_client, name)]
    for read in [{}, {"offsets": [2 * PART]}]:
        for key in keys:
            redis_client.expire(key, 100)
        large._renewed.clear()
        begin = read.get("offsets", [0])[0]
        assert get(large, [name], len(record), **read) == [record[begin:]]
        assert all(redis_client.ttl(key) > 86390 for key in keys)
    assert large.contains_many([name]) == [True]
    large.close()


@pytest.mark.parametrize("damage", [b"", b"KVR", b"x" * 40])
def test_small_reads_say_what_is_no_record(redis_tier, redis_client, damage):
    (name,) = make_names(1)
    put(redis_tier, [name], [bytes(100)])
    redis_client.set(record_key(redis_client, name), damage)
    for read in [{}, {"offsets": [10]}]:
        outcome = redis_tier.get_many([name], [memoryview(bytearray(50))], **read)[0]
        assert outcome is None if damage == b"" else isinstance(outcome, BlockCorrupted)
    put(redis_tier, [name], [bytes(100)])
    assert get(redis_tier, [name], 100) == [bytes(100)]


def test_a_record_longer_than_the_memory_for_it_is_refused(redis_tier):
    (name,) = make_names(1)
    put(redis_tier, [name], [bytes(100)])
    (outcome,) = redis_tier.get_many([name], [memoryview(bytearray(99))])
    assert isinstance(outcome, BlockCorrupted)


def test_writes_from_memory_of_any_type_and_reads_into_it(redis_tier):
    (name,) = make_names(1)
    words = memoryview(random_bytes(2 * PART)).cast("I")
    assert redis_tier.put_many([name], [words]) == [None]
    out = memoryview(bytearray(2 * PART)).cast("I")
    assert redis_tier.get_many([name], [out]) == [2 * PART]
    assert out == words


def test_a_part_that_is_gone_makes_a_miss_and_a_new_record_mends_it(redis_tier, redis_client):
    names, record = make_names(2), random_bytes(3 * PART)
    put(redis_tier, names, [record, record])
    redis_client.delete(part_keys(redis_client, names[0])[1])
    assert get(redis_tier, names, len(record)) == [None, record]
    assert redis_tier.contains_many(names) == [False, True]
    assert get(redis_tier, names[:1], PART, offsets=[PART + PART // 2]) == [None]
    put(redis_tier, names, [record, record])
    assert get(redis_tier, names, len(record)) == [record, record]


def test_parts_of_two_writers_never_mix(redis_tier, redis_server, redis_client):
    """Both write the same names at once; a reader gets the whole record of one of them."""
    other = open_tier(redis_server.url, prefix=redis_tier._config.prefix)
    names = make_names(8)
    versions = [random_bytes(3 * PART + 1, seed) for seed in range(2)]
    barrier = threading.Barrier(2)

    def write(writer, record: bytes) -> None:
        barrier.wait()
        assert put(writer, names, [record] * len(names)) == [None] * len(names)

    threads = [
        threading.Thread(target=write, args=pair)
        for pair in zip((redis_tier, other), versions, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(record in versions for record in get(redis_tier, names, 4 * PART))
    assert sum(len(part_keys(redis_client, name)) for name in names) == 3 * len(names)
    other.close()


def test_what_is_not_ours_is_corrupted_and_not_a_hit(redis_tier, redis_client):
    names, record = make_names(3), random_bytes(100)
    put(redis_tier, names, [record] * 3)
    redis_client.set(
        record_key(redis_client, names[0]), b"something else, longer than a manifest is"
    )
    redis_client.setrange(record_key(redis_client, names[1]), MANIFEST_BYTES + 100, b"more")
    key = record_key(redis_client, names[2])
    redis_client.delete(key)
    redis_client.rpush(key, b"a list")
    outcomes = get(redis_tier, names, 200)
    assert all(isinstance(outcome, BlockCorrupted) for outcome in outcomes)
    assert redis_tier.delete_many(names[:2]) == [True, True]
    assert len(redis_tier.check(fix=True)) == 1  # the list
    assert redis_tier.check() == []


@pytest.mark.parametrize("max_part_bytes", [MIN_PART_BYTES, 5000, MAX_PART_BYTES])
def test_manifests_of_all_writers_are_read(max_part_bytes):
    longest = MAX_RECORD_BYTES + TRAILER_BYTES
    for num_bytes in (0, 1, max_part_bytes, max_part_bytes + 1, 3 * max_part_bytes, longest):
        manifest = Manifest.of_new(num_bytes, max_part_bytes)
        assert read_manifest(manifest.encode(), MANIFEST_BYTES) == manifest


IMPOSSIBLE = {
    "tiny parts": Manifest(1 << 20, 1, bytes(8)),
    "short parts": Manifest(1 << 20, MIN_PART_BYTES // 2, bytes(8)),
    "too long": Manifest(1 << 50, 1 << 40, bytes(8)),
    "too long at once": Manifest(1 << 50, 1 << 50, bytes(8)),
}


@pytest.mark.parametrize("manifest", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_manifest_that_no_writer_makes_is_corrupted(manifest):
    with pytest.raises(BlockCorrupted, match="expected a manifest"):
        read_manifest(manifest.encode(), MANIFEST_BYTES)


def test_a_manifest_of_too_many_parts_is_mended(redis_tier, redis_client):
    (name,), record = make_names(1), random_bytes(3 * PART)
    put(redis_tier, [name], [record])
    redis_client.set(record_key(redis_client, name), IMPOSSIBLE["tiny parts"].encode())
    (outcome,) = get(redis_tier, [name], 2 * PART, offsets=[0])
    assert isinstance(outcome, BlockCorrupted)
    assert redis_tier.contains_many([name]) == [False]
    put(redis_tier, [name], [record])
    assert get(redis_tier, [name], len(record)) == [record]


def spoil(client, names) -> None:
    """Spoil the records under the first three names, in three ways."""
    client.set(record_key(client, names[0]), b"short")
    client.setrange(record_key(client, names[1]), 0, b"XXXX")
    key = record_key(client, names[2])
    client.delete(key)
    client.rpush(key, b"a list")


@pytest.mark.parametrize("size", [100, 3 * PART])
def test_what_is_no_record_is_absent_and_a_new_one_mends_it(redis_tier, redis_client, size):
    names, record = make_names(5), random_bytes(size)
    put(redis_tier, names, [record] * 5)
    spoil(redis_client, names)
    whole = [False] * 3 + [True] * 2
    assert redis_tier.contains_many(names) == whole
    assert redis_tier.pin_many(names) == whole
    assert redis_tier.pin_many(names, is_pinned=False) == whole
    assert put(redis_tier, names, [record] * 5) == [None] * 5
    assert redis_tier.contains_many(names) == [True] * 5
    assert get(redis_tier, names, size) == [record] * 5


def test_a_store_finds_and_mends_what_lies_beside_a_damaged_record(redis_server, redis_client):
    keys = make_keys(4)
    payloads = [HostBlock(make_payload(key)) for key in keys]
    with Store([open_tier(redis_server.url)]) as store:
        for key, payload in zip(keys, payloads, strict=True):
            assert store.save(key, payload)
        assert store.flush(30)
        spoil(redis_client, [key.name for key in keys])
        for _ in range(6):  # more often than a breaker lets pass
            assert store.contains_many(keys) == [None] * 3 + ["redis"]
        for key, payload in zip(keys, payloads, strict=True):
            store.save(key, payload)
        assert store.flush(30)
        assert store.contains_many(keys) == ["redis"] * 4
        assert store.stats().tiers[0].num_errors == 0


def test_counts_calls_bytes_and_records(redis_tier, redis_client):
    names = make_names(3)
    put(redis_tier, names[:2], [bytes(10), bytes(20)])
    put(redis_tier, names[:1], [bytes(10)])
    get(redis_tier, names, 20)
    redis_tier.delete_many(names)
    stats = redis_tier.stats()
    assert (stats.num_puts, stats.written_bytes) == (2, 30)
    assert (stats.num_hits, stats.num_misses, stats.read_bytes) == (2, 1, 30)
    assert stats.num_deletes == 2
    assert stats.capacity_bytes == 0  # without maxmemory
    assert stats.used_bytes > 100_000 and stats.num_records == redis_client.dbsize()


def test_counts_the_keys_of_servers_that_tell_more(redis_tier, monkeypatch):
    """Redis 8 adds the sizes of keys, for example."""
    put(redis_tier, make_names(3), [bytes(10)] * 3)
    num_records = redis_tier.stats().num_records
    ask = Pool.ask

    def ask_one_that_tells_more(self, address, args, deadline):
        keysizes = b"\r\n# Keysizes\r\ndb0_distrib_strings_sizes:2=3,1K=20\r\n"
        return ask(self, address, args, deadline) + keysizes

    monkeypatch.setattr(Pool, "ask", ask_one_that_tells_more)
    assert redis_tier.stats().num_records == num_records


def test_says_who_is_connected(redis_tier, redis_client):
    redis_tier.contains_many(make_names(1))
    assert "kvkernels-redis" in [row["name"] for row in redis_client.client_list()]


def test_threads_share_a_tier(redis_tier):
    names = make_names(12)
    records = dict(
        zip(names, (random_bytes(PART * (i % 4) + i, i) for i in range(12)), strict=True)
    )
    problems = []

    def work(thread: int) -> None:
        for step in range(25):
            some = [names[(thread + step * i) % 12] for i in range(1, 5)]
            put(redis_tier, some, [records[name] for name in some])
            for name, found in zip(some, get(redis_tier, some, 4 * PART), strict=True):
                if found not in (None, records[name]):
                    problems.append(f"{thread}: {name}: {found!r:.40}")
            if step % 5 == thread % 5:
                redis_tier.delete_many(some[:1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert redis_tier.stats().num_hits > 400


def test_a_forked_process_has_connections_of_its_own(redis_tier, redis_server):
    names, records = make_names(4), [random_bytes(3 * PART, seed) for seed in range(4)]
    put(redis_tier, names, records)
    child = os.fork()
    if child == 0:
        is_right = all(get(redis_tier, names, 3 * PART) == records for _ in range(20))
        os._exit(0 if is_right else 1)
    for _ in range(20):
        assert get(redis_tier, names, 3 * PART) == records
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert get(redis_tier, names, 3 * PART) == records
