"""The contract of every tier: batches, parts, pins, priorities, identities and deadlines."""

import time

import numpy as np
import pytest
from disk_tiers import Clock
from sample_blocks import LARGE_LAYOUT, LAYOUT, make_keys, make_record
from tier_kinds import SLOT, get, held, put, put_many, stored_bytes

from prefixstore.block_key import chain_keys
from prefixstore.errors import BlockCorrupted, TierFull, TierTimeout, TierUnavailable
from prefixstore.record_header import TRAILER_BYTES
from prefixstore.tiers.base import Held, Swept

BYTES = LAYOUT.record_bytes


def buffers(num_records: int, num_bytes: int = BYTES) -> list[memoryview]:
    return [memoryview(bytearray(b"\xee" * num_bytes)) for _ in range(num_records)]


def test_each_record_of_a_batch_has_its_own_outcome(make_any_tier):
    tier = make_any_tier(4 << 20)
    keys = make_keys(3) + make_keys(1, LARGE_LAYOUT)
    put_many(tier, [keys[0], keys[2], keys[3]])
    outs = buffers(4)
    outcomes = tier.get_many([key.name for key in keys], outs)
    assert outcomes[:3] == [BYTES, None, BYTES]
    assert isinstance(outcomes[3], BlockCorrupted)
    assert (outs[0], outs[2]) == (make_record(keys[0]), make_record(keys[2]))
    assert tier.get_many([], []) == [] == tier.put_many([], [])
    assert tier.delete_many([key.name for key in keys]) == [True, False, True, True]
    assert held(tier, keys) == [False] * 4


def test_a_batch_may_be_larger_than_any_query(make_any_tier):
    tier = make_any_tier(2048 * SLOT)
    keys = make_keys(1200)
    put_many(tier, keys)
    outs = buffers(1200)
    assert tier.get_many([key.name for key in keys], outs) == [BYTES] * 1200
    assert all(out == make_record(key) for out, key in zip(outs, keys, strict=True))
    assert all(tier.delete_many([key.name for key in keys]))


def test_the_same_name_may_come_twice_in_a_batch(make_tier):
    tier = make_tier(64 * SLOT)
    (key,) = make_keys(1)
    put_many(tier, [key, key])
    assert tier.get_many([key.name] * 2, buffers(2)) == [BYTES] * 2
    assert tier.stats().num_records == 1
    tier.delete_many([key.name] * 2)
    assert tier.stats().num_records == 0


def test_a_name_that_comes_again_in_a_deletion_finds_none(make_any_tier):
    tier = make_any_tier(64 * SLOT)
    first, missing, second = (key.name for key in make_keys(3))
    put_many(tier, make_keys(3)[::2])
    outcomes = tier.delete_many([first, missing, second, first, missing, first])
    assert outcomes == [True, False, True, False, False, False]
    assert tier.stats().num_deletes == 2


def test_a_buffer_may_be_longer_than_the_record_and_keeps_its_rest(make_any_tier):
    tier = make_any_tier(64 * SLOT)
    (key,) = make_keys(1)
    put(tier, key)
    (out,) = buffers(1, BYTES + 5000)
    assert tier.get_many([key.name], [out]) == [BYTES]
    assert out[:BYTES] == make_record(key)


@pytest.mark.parametrize(
    ("offset", "num_bytes", "expected"),
    [
        (0, BYTES, BYTES),
        (0, 1, 1),
        (64, 100, 100),
        (BYTES - 7, 7, 7),
        (BYTES - 7, 50, 7),
        (BYTES, 8, 0),
    ],
)
def test_reads_parts_of_records(make_any_tier, offset, num_bytes, expected):
    tier = make_any_tier(64 * SLOT)
    first, missing, second = make_keys(3)
    put_many(tier, [first, second])
    outs = buffers(3, num_bytes)
    names = [key.name for key in (first, missing, second)]
    assert tier.get_many(names, outs, offsets=[offset] * 3) == [expected, None, expected]
    for key, out in ((first, outs[0]), (second, outs[2])):
        assert out[:expected] == make_record(key)[offset : offset + expected]


def test_parts_of_long_records_are_found_wherever_they_lie(make_any_tier):
    tier = make_any_tier(64 << 20)
    (key,) = make_keys(1, LARGE_LAYOUT)
    put(tier, key)
    record = bytes(make_record(key))
    for offset, num_bytes in ((1, 4096), (4095, 2), (8192, 8192), (12_345, 54_321)):
        (out,) = buffers(1, num_bytes)
        assert tier.get_many([key.name], [out], offsets=[offset]) == [num_bytes]
        assert out == record[offset : offset + num_bytes]


def test_pinned_records_stay(make_tier):
    tier = make_tier(8 * SLOT)
    keys = make_keys(40)
    put_many(tier, keys[:8])
    assert tier.pin_many([key.name for key in keys[:2]] + [keys[20].name]) == [True, True, False]
    for key in keys[8:]:
        put(tier, key)
    assert held(tier, keys) == [True] * 2 + [False] * 32 + [True] * 6
    assert get(tier, keys[0]) == make_record(keys[0])
    assert tier.check() == []
    assert tier.pin_many([keys[0].name, keys[1].name], False) == [True, True]
    put_many(tier, keys[8:16])
    assert held(tier, keys[:2]) == [False, False]


def test_a_tier_full_of_pins_is_full(make_tier):
    tier = make_tier(4 * SLOT)
    keys = make_keys(5)
    put_many(tier, keys[:4])
    assert tier.pin_many([key.name for key in keys[:4]]) == [True] * 4
    (outcome,) = tier.put_many([keys[4].name], [memoryview(make_record(keys[4]))])
    assert isinstance(outcome, TierFull)
    large = make_keys(1, LARGE_LAYOUT)[0]
    (outcome,) = tier.put_many([large.name], [memoryview(make_record(large))])
    assert isinstance(outcome, TierFull)
    assert held(tier, keys) == [True] * 4 + [False]
    assert tier.delete_many([keys[0].name]) == [True]  # a pin does not prevent deletion
    put(tier, keys[4])
    assert held(tier, keys) == [False, True, True, True, True]


def test_low_priority_gives_way_first_and_to_no_lower(make_tier):
    tier = make_tier(6 * SLOT)
    high, low, more = make_keys(3), make_keys(3, seed=1), make_keys(4, seed=2)
    put_many(tier, low, priority=-1)
    put_many(tier, high, priority=3)
    put_many(tier, more[:3])
    assert (held(tier, high), held(tier, low)) == ([True] * 3, [False] * 3)
    put_many(tier, more[3:])
    assert held(tier, more) == [False, True, True, True]
    put_many(tier, make_keys(3, seed=3), priority=4)
    put_many(tier, make_keys(3, seed=4), priority=4)
    name, record = more[0].name, memoryview(make_record(more[0]))
    (outcome,) = tier.put_many([name], [record], priority=3)
    assert isinstance(outcome, TierFull)
    with pytest.raises(ValueError, match="priority: expected -8 to 7, got 8"):
        tier.put_many([name], [record], priority=8)


def test_an_identity_is_forgotten_and_no_other(make_tier):
    tier = make_tier(64 * SLOT)
    tokens = make_keys(1)[0].tokens
    mine, other = (chain_keys(LAYOUT, bytes([i] * 16), tokens)[0] for i in (1, 2))
    put_many(tier, [mine, other])
    tier.pin_many([mine.name])
    tier.delete_identity(mine.identity)
    assert held(tier, [mine, other]) == [False, True]
    assert get(tier, mine) is None
    assert tier.stats().num_records == 1
    put(tier, mine)
    assert get(tier, mine) == make_record(mine)


def test_nothing_begins_after_the_deadline(make_tier):
    tier = make_tier(64 * SLOT)
    keys = make_keys(2)
    put_many(tier, keys)
    names, past = [key.name for key in keys], time.monotonic() - 1
    outcomes = tier.get_many(names, buffers(2), deadline=past)
    assert [type(outcome) for outcome in outcomes] == [TierTimeout] * 2
    outcomes = tier.put_many(names, [memoryview(make_record(key)) for key in keys], deadline=past)
    assert [type(outcome) for outcome in outcomes] == [TierTimeout] * 2
    outcomes = tier.get_or_abandon_many(names, buffers(2), deadline=past)
    assert [type(outcome) for outcome in outcomes] == [TierTimeout] * 2
    future = time.monotonic() + 60
    assert tier.get_many(names, buffers(2), deadline=future) == [BYTES] * 2


def test_who_abandons_late_buffers_gets_the_same_in_time(make_tier):
    tier = make_tier(64 * SLOT)
    keys = make_keys(4)
    put_many(tier, keys[:3])
    names, outs = [key.name for key in keys], buffers(4)
    outcomes = tier.get_or_abandon_many(names, outs, deadline=time.monotonic() + 60)
    assert outcomes == [BYTES] * 3 + [None]
    for key, out in zip(keys[:3], outs, strict=False):
        assert bytes(out[:BYTES]) == make_record(key)
    assert tier.get_or_abandon_many(names[:1], buffers(1)) == [BYTES]


def test_records_expire_unless_they_are_pinned(make_tier):
    clock = Clock()
    tier = make_tier(64 * SLOT, ttl_s=100, clock=clock)
    keys = make_keys(3)
    put_many(tier, keys)
    assert held(tier, keys) == [True] * 3
    tier.pin_many([keys[1].name])
    clock.seconds += 101
    assert held(tier, keys) == [False, True, False]
    assert get(tier, keys[0]) is None
    assert get(tier, keys[1]) == make_record(keys[1])
    put(tier, keys[0])
    assert held(tier, keys) == [True, True, False]
    swept = tier.sweep()
    assert swept.num_expired <= 2 and swept.num_orphans == 0
    assert tier.stats().num_records == 2
    assert tier.sweep() == Swept()


def test_check_mends_nothing_where_nothing_is_wrong(make_any_tier):
    tier = make_any_tier(64 * SLOT)
    keys = make_keys(5)
    put_many(tier, keys)
    assert tier.check(fix=True) == []
    assert held(tier, keys) == [True] * 5


def test_tells_what_it_holds_of_each_identity(make_any_tier):
    tier = make_any_tier(64 * SLOT)
    tokens = make_keys(3)[0].tokens
    several = np.concatenate([tokens, tokens])
    mine, other = (chain_keys(LAYOUT, bytes([i] * 16), several) for i in (1, 2))
    put_many(tier, mine + other[:1])
    num_bytes = stored_bytes(tier, LAYOUT)
    held_by = tier.list_identities()
    assert held_by == {bytes([1] * 16): Held(2, 2 * num_bytes), bytes([2] * 16): Held(1, num_bytes)}
    tier.delete_identity(bytes([1] * 16))
    assert tier.list_identities() == {bytes([2] * 16): Held(1, num_bytes)}


def test_an_identity_keeps_to_its_quota(make_tier):
    tier = make_tier(64 * SLOT, quota_bytes=4 * (BYTES + TRAILER_BYTES))
    tokens = np.concatenate([key.tokens for key in make_keys(10)])
    mine, other = (chain_keys(LAYOUT, bytes([i] * 16), tokens) for i in (1, 2))
    put_many(tier, other[:3])
    for key in mine[:4]:
        put(tier, key)
    assert get(tier, mine[0]) is not None
    put_many(tier, mine[4:6])
    assert held(tier, mine[:6]) == [True, False, False, True, True, True]
    assert held(tier, other[:3]) == [True] * 3
    tier.pin_many([key.name for key in mine[:6]])
    (outcome,) = tier.put_many([mine[6].name], [memoryview(make_record(mine[6]))])
    assert isinstance(outcome, TierFull)
    put(tier, other[3])
    assert tier.list_identities()[mine[0].identity].num_bytes == 4 * stored_bytes(tier, LAYOUT)


@pytest.mark.parametrize("num_lent", [0, 1, 2, 3])
@pytest.mark.parametrize("too_long", [0, 1])
def test_nothing_gives_way_to_a_record_that_the_quota_refuses_all_the_same(
    make_kind, num_lent, too_long
):
    """A long record needs the room of two of three, which may be evicted unless they are lent."""
    (long,) = make_keys(1, LARGE_LAYOUT)
    quota_bytes = LARGE_LAYOUT.record_bytes - 1 if too_long else LARGE_LAYOUT.record_bytes + BYTES
    tier = make_kind("memory", 256 * SLOT, 64 * SLOT, quota_bytes=quota_bytes)
    keys = make_keys(3)
    put_many(tier, keys)
    with tier.lend_many([key.name for key in keys[3 - num_lent :]]):
        (error,) = tier.put_many([long.name], [memoryview(make_record(long))])
    if too_long or num_lent > 1:
        assert "quota_bytes" in str(error)
        assert held(tier, [*keys, long]) == [True, True, True, False]
        assert tier.stats().num_evictions == 0
    else:
        assert error is None
        assert held(tier, [*keys, long]) == [False, False, True, True]


@pytest.fixture
def memory(make_kind):
    """A memory tier that records are made in, with room for four and no other slab."""
    return make_kind("memory", 4 * SLOT, 4 * SLOT)


def reserve(tier, keys, priority=0):
    sizes = [key.layout.record_bytes for key in keys]
    return tier.reserve_many([key.name for key in keys], sizes, priority=priority)


def fill(places, keys):
    for place, key in zip(places, keys, strict=True):
        place[:] = make_record(key)


def test_records_made_in_a_tier_are_there_once_they_are_whole(memory):
    keys = make_keys(3)
    with reserve(memory, keys) as places:
        assert [place.size for place in places] == [BYTES] * 3
        fill(places, keys)
        assert held(memory, keys) == [False] * 3
    assert [get(memory, key) for key in keys] == [make_record(key) for key in keys]
    stats = memory.stats()
    assert (stats.num_puts, stats.written_bytes, stats.num_records) == (3, 3 * BYTES, 3)


def test_a_place_that_is_given_back_is_free(memory):
    keys = make_keys(4)
    for _ in range(3):
        with reserve(memory, keys) as places:
            fill(places, keys)
            places[:] = [None] * 4
    with reserve(memory, keys) as places:
        fill(places, keys)
        places[:3] = [None] * 3
    assert held(memory, keys) == [False] * 3 + [True]
    assert memory.stats().num_evictions == 0


def test_after_an_exception_nothing_was_made(memory):
    keys = make_keys(4)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), reserve(memory, keys) as places:
            fill(places, keys)
            raise ZeroDivisionError
    assert held(memory, keys) == [False] * 4


def test_no_place_is_given_twice_nor_without_room(memory):
    kept, *keys = make_keys(7)
    put(memory, kept)
    with reserve(memory, [kept, *keys[:2], keys[0]]) as places:
        assert [place is None for place in places] == [True, False, False, False]
        fill(places[1:], [*keys[:2], keys[0]])
        with reserve(memory, keys[2:]) as others:  # an eviction frees one, the rest are in use
            assert [place is None for place in others] == [False, True, True, True]
            fill(others[:1], keys[2:3])
        put(memory, keys[1])  # another writer was faster
    assert held(memory, keys) == [True, True, False, False, False, False]
    assert [get(memory, key) for key in keys[:2]] == [make_record(key) for key in keys[:2]]


def test_places_keep_to_priorities_and_quota(make_kind):
    tier = make_kind("memory", 4 * SLOT, 4 * SLOT, quota_bytes=2 * BYTES)
    important, *keys = make_keys(4)
    put_many(tier, [important], priority=1)
    with reserve(tier, keys) as places:  # its own identity's quota evicts the important one
        assert [place is None for place in places] == [False, False, True]
        fill(places[:2], keys[:2])
    assert held(tier, keys) == [True, True, False]
    other = make_kind("memory", SLOT, SLOT)
    put_many(other, [important], priority=1)
    with reserve(other, keys[:1]) as places:
        assert places == [None]
    with reserve(other, keys[:1], priority=1) as places:
        fill(places, keys[:1])
    assert held(other, [important, keys[0]]) == [False, True]


def test_a_tier_may_be_closed_while_records_are_made_in_it(memory, open_tiers):
    keys = make_keys(2)
    with reserve(memory, keys) as places:
        memory.close()
        fill(places, keys)
    open_tiers.clear()
    with pytest.raises(TierUnavailable), reserve(memory, keys):
        pass
