"""The disk tier's look-ups: remembered ones stay right when other processes change the index."""

import random

import pytest
from disk_tiers import Clock, get_all, make_bytes, make_names, open_tier

from prefixstore.tiers.disk import look_ups as disk_look_ups


def count_look_ups(tier):
    statements: list[str] = []
    tier._index.look_ups._reader._sql.set_trace_callback(statements.append)
    return lambda: sum("block_hash IN" in statement for statement in statements)


@pytest.fixture
def two(tmp_path):
    """Two tiers on one directory, like two processes."""
    tiers = [open_tier(tmp_path) for _ in range(2)]
    yield tiers
    for tier in tiers:
        tier.close()


def test_is_looked_up_again_only_when_anybody_changed_anything(two):
    reader, other = two
    names = make_names(3)
    records = [make_bytes(3000, n).tobytes() for n in range(3)]
    assert not any(reader.put_many(names[:2], [memoryview(record) for record in records[:2]]))
    num_look_ups = count_look_ups(reader)
    for _ in range(5):
        assert get_all(reader, names[:2], 3000) == records[:2]
    assert num_look_ups() == 1
    assert get_all(reader, names, 3000) == [*records[:2], None]
    assert num_look_ups() == 2  # the second is for the third record
    assert other.put(names[2], memoryview(records[2])) is None
    for _ in range(5):
        assert get_all(reader, names, 3000) == records
    assert num_look_ups() == 3
    assert other.delete(names[0])
    assert get_all(reader, names, 3000) == [None, *records[1:]]
    assert reader.delete(names[1])
    assert get_all(reader, names, 3000) == [None, None, records[2]]


def test_a_record_past_its_time_is_not_found_again_unless_it_is_pinned(tmp_path):
    clock = Clock()
    tier = open_tier(tmp_path, clock=clock, ttl_s=10, refresh_ttl=False)
    names = make_names(2)
    records = [make_bytes(3000, n).tobytes() for n in range(2)]
    assert not any(tier.put_many(names, [memoryview(record) for record in records]))
    assert tier.pin_many(names[1:]) == [True]
    for _ in range(2):
        assert get_all(tier, names, 3000) == records
    clock.seconds += 11
    for _ in range(2):
        assert get_all(tier, names, 3000) == [None, records[1]]
    tier.close()


def test_what_is_remembered_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_look_ups, "_MAX_FOUND", 10)
    tier = open_tier(tmp_path)
    names = make_names(40)
    assert not any(tier.put_many(names, [make_bytes(300, n).data for n in range(40)]))
    for start in (*range(0, 40, 8), 0):
        assert None not in get_all(tier, names[start : start + 8], 300)
        assert len(tier._index.look_ups._found) <= 18
    tier.close()


def test_two_tiers_that_evict_from_one_another_read_nothing_wrong(two):
    source = random.Random(0)
    names = make_names(60)
    records = [make_bytes(100_000, n).tobytes() for n in range(60)]  # twice as much as has room
    num_hits = 0
    for _ in range(200):
        tier, asked = source.choice(two), source.sample(range(60), 6)
        found = get_all(tier, [names[n] for n in asked], 100_000)
        for n, record in zip(asked, found, strict=True):
            assert record is None or record == records[n]
            num_hits += record is not None
        if source.random() < 0.5:
            n = source.choice(asked)
            assert source.choice(two).put(names[n], memoryview(records[n])) is None
    assert num_hits > 100 and two[0].stats().num_evictions + two[1].stats().num_evictions > 10
