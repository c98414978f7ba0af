"""How long the disk tier keeps records: time to live, pins, priorities, clocks."""

import time

import pytest
from disk_tiers import Clock, contains, count_right, open_tier, put, put_with
from sample_blocks import LARGE_LAYOUT, LAYOUT, make_keys

from prefixstore.errors import TierFull
from prefixstore.tiers.base import Swept
from prefixstore.tiers.disk import clock as disk_clock
from prefixstore.tiers.pages import PAGE_BYTES

HOUR = 3600.0
YEAR_NS = 365 * 86400 * 10**9


# ---- time to live --------------------------------------------------------------------------------


def test_a_record_lives_from_its_last_use(tmp_path):
    clock = Clock()
    tier = open_tier(tmp_path, ttl_s=HOUR, clock=clock)
    used, idle = make_keys(2)
    put(tier, [used, idle])
    for _ in range(4):
        clock.seconds += 0.9 * HOUR
        assert count_right(tier, [used]) == 1
    assert contains(tier, [used, idle]) == [True, False]
    clock.seconds += 1.01 * HOUR
    assert count_right(tier, [used]) == 0
    tier.close()


def test_a_record_lives_from_its_last_put_where_use_does_not_count(tmp_path):
    clock = Clock()
    tier = open_tier(tmp_path, ttl_s=HOUR, refresh_ttl=False, clock=clock)
    again, once = make_keys(2)
    put(tier, [again, once])
    clock.seconds += 0.9 * HOUR
    assert count_right(tier, [again, once]) == 2
    put(tier, [again])
    clock.seconds += 0.2 * HOUR
    assert contains(tier, [again, once]) == [True, False]
    clock.seconds += 0.9 * HOUR
    assert contains(tier, [again, once]) == [False, False]
    tier.close()


def test_other_processes_see_a_use_in_time(tmp_path):
    clock = Clock()
    reader = open_tier(tmp_path, ttl_s=HOUR, clock=clock)
    other = open_tier(tmp_path, ttl_s=HOUR, clock=clock)
    keys = make_keys(3)
    put(other, keys)
    clock.seconds += 0.5 * HOUR
    assert count_right(reader, keys) == 3
    clock.seconds += 0.6 * HOUR
    assert contains(other, keys) == [True] * 3
    assert other.sweep() == Swept()
    reader.close()
    other.close()


def test_a_sweep_gives_expired_records_back(tmp_path):
    clock = Clock()
    tier = open_tier(tmp_path, ttl_s=HOUR, clock=clock)
    put(tier, make_keys(5))
    clock.seconds += 0.5 * HOUR
    put(tier, make_keys(7)[5:])
    clock.seconds += 0.6 * HOUR
    assert tier.sweep() == Swept(num_expired=5, num_bytes=5 * LAYOUT.record_bytes)
    stats = tier.stats()
    assert (stats.num_records, stats.num_expired, stats.num_evictions) == (2, 5, 0)
    assert tier.sweep() == Swept()
    assert tier.check() == []
    tier.close()


def test_expired_records_go_before_others_are_evicted(tmp_path):
    clock = Clock()
    keys = make_keys(8)
    sizes = {"capacity_bytes": 4 * PAGE_BYTES, "slab_bytes": 4 * PAGE_BYTES}
    mortal = open_tier(tmp_path, ttl_s=HOUR, refresh_ttl=False, clock=clock, **sizes)
    immortal = open_tier(tmp_path, clock=clock, **sizes)
    put(immortal, keys[:2])
    clock.seconds += 1
    put(mortal, keys[2:4])
    clock.seconds += 2 * HOUR
    put(immortal, keys[4:6])  # replace the two expired ones, though those were used later
    assert contains(immortal, keys[:6]) == [True, True, False, False, True, True]
    stats = immortal.stats()
    assert (stats.num_expired, stats.num_evictions) == (2, 0)
    assert count_right(mortal, keys) == 4
    mortal.close()
    immortal.close()


def test_an_expired_record_can_be_put_again(tmp_path):
    clock = Clock()
    tier = open_tier(tmp_path, ttl_s=HOUR, clock=clock)
    keys = make_keys(3)
    put(tier, keys)
    clock.seconds += 2 * HOUR
    put(tier, keys)
    assert count_right(tier, keys) == 3
    assert tier.stats().num_puts == 6
    tier.close()


def test_time_to_live_survives_reopening(tmp_path):
    clock = Clock()
    keys = make_keys(2)
    tier = open_tier(tmp_path, ttl_s=HOUR, clock=clock)
    put(tier, keys)
    tier.close()
    clock.seconds += 0.9 * HOUR
    tier = open_tier(tmp_path, clock=clock)
    assert contains(tier, keys) == [True, True]
    clock.seconds += 0.2 * HOUR
    assert contains(tier, keys) == [False, False]
    tier.close()


# ---- clocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_ns", [YEAR_NS, -YEAR_NS])
def test_a_step_of_the_wall_clock_changes_nothing(tmp_path, monkeypatch, step_ns):
    now_ns = time.time_ns
    keys = make_keys(2)
    tier = open_tier(tmp_path, ttl_s=HOUR)
    put(tier, keys)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + step_ns)
    assert contains(tier, keys) == [True, True]
    assert tier.sweep() == Swept()
    tier.close()
    tier = open_tier(tmp_path, ttl_s=0.05)  # reopened in the same run of the machine
    assert contains(tier, keys) == [True, True]
    put(tier, keys)  # restarts with the new time to live
    time.sleep(0.06)
    assert contains(tier, keys) == [False, False]
    tier.close()


def test_a_clock_that_was_set_back_keeps_no_old_record_for_ever(tmp_path, monkeypatch):
    now_ns = time.time_ns
    old, new = make_keys(40)[:20], make_keys(40)[20:]
    sizes = {"capacity_bytes": 10 * PAGE_BYTES, "slab_bytes": 1 << 14}
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + YEAR_NS)
    tier = open_tier(tmp_path, **sizes)
    put(tier, old)
    assert count_right(tier, old) == 10
    tier.close()
    monkeypatch.setattr(time, "time_ns", now_ns)
    monkeypatch.setattr(disk_clock, "boot_id", lambda: "the next start")
    tier = open_tier(tmp_path, **sizes)
    put(tier, new)
    assert count_right(tier, new) == 10
    tier.close()


def restart(monkeypatch, name: str, wall_s: float) -> None:
    """Reboot the machine; its clock then says that so many seconds have passed."""
    now_ns = time.time_ns
    monkeypatch.setattr(disk_clock, "boot_id", lambda: name)
    monkeypatch.setattr(disk_clock, "boot_ns", lambda: 10**9)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(wall_s * 1e9))


@pytest.mark.parametrize(
    "off_s, is_kept", [(0.5 * HOUR, True), (2 * HOUR, False), (-24 * HOUR, True)]
)
def test_over_a_restart_the_wall_clock_counts_and_never_backwards(
    tmp_path, monkeypatch, off_s, is_kept
):
    keys = make_keys(2)
    tier = open_tier(tmp_path, ttl_s=HOUR)
    put(tier, keys)
    tier.close()
    restart(monkeypatch, "second", off_s)
    tier = open_tier(tmp_path, ttl_s=HOUR)
    assert contains(tier, keys) == [is_kept] * 2
    monkeypatch.setattr(disk_clock, "boot_ns", lambda: 10**9 + int(1.1 * HOUR * 1e9))
    assert contains(tier, keys) == [False] * 2  # the old expiry does not last for ever
    tier.close()


# ---- pins ----------------------------------------------------------------------------------------


def test_pinned_records_are_neither_evicted_nor_expired(tmp_path):
    clock = Clock()
    sizes = {"capacity_bytes": 4 * PAGE_BYTES, "slab_bytes": 4 * PAGE_BYTES}
    tier = open_tier(tmp_path, ttl_s=HOUR, clock=clock, **sizes)
    keys = make_keys(20)
    put(tier, keys[:4])
    assert tier.pin_many([keys[0].name, keys[1].name, keys[9].name]) == [True, True, False]
    put(tier, keys[4:])
    clock.seconds += 2 * HOUR
    assert tier.sweep().num_expired == 2
    tier.close()
    tier = open_tier(tmp_path, ttl_s=HOUR, clock=clock, **sizes)  # pins survive
    assert count_right(tier, keys) == 2
    put(tier, keys[10:])
    assert count_right(tier, keys[:2]) == 2
    assert tier.pin_many([keys[0].name], False) == [True]
    put(tier, keys[2:10])
    assert contains(tier, keys[:2]) == [False, True]
    assert tier.check() == []
    tier.close()


def test_a_tier_full_of_pinned_records_refuses_and_deletes(tmp_path):
    sizes = {"capacity_bytes": 4 * PAGE_BYTES, "slab_bytes": 4 * PAGE_BYTES}
    tier = open_tier(tmp_path, **sizes)
    keys, (large,) = make_keys(6), make_keys(1, LARGE_LAYOUT)
    put(tier, keys[:4])
    assert all(tier.pin_many([key.name for key in keys[:4]] * 2))  # pinning twice counts once
    with pytest.raises(TierFull, match="pinned"):
        put(tier, keys[4:])
    assert tier.delete(keys[0].name)
    put(tier, keys[4:5])
    assert contains(tier, keys[:5]) == [False, True, True, True, True]
    with pytest.raises(TierFull):
        put(tier, [large])
    tier.close()


def test_a_slab_with_a_pinned_record_is_not_dropped_for_another_size(tmp_path):
    slot = -(-LARGE_LAYOUT.record_bytes // PAGE_BYTES) * PAGE_BYTES
    tier = open_tier(tmp_path, capacity_bytes=2 * slot, slab_bytes=slot)
    small, large = make_keys(42), make_keys(4, LARGE_LAYOUT)
    put(tier, small)  # two slabs
    tier.pin_many([small[0].name])
    put(tier, large)
    assert contains(tier, [small[0], large[-1]]) == [True, True]
    assert tier.stats().num_records == 22
    tier.close()
    tier = open_tier(tmp_path, capacity_bytes=slot, slab_bytes=slot)  # a smaller bound
    assert contains(tier, [small[0], large[-1]]) == [True, False]
    assert tier.check() == []
    tier.close()


# ---- priorities ----------------------------------------------------------------------------------


def test_lower_priorities_go_first(tmp_path):
    sizes = {"capacity_bytes": 4 * PAGE_BYTES, "slab_bytes": 4 * PAGE_BYTES}
    tier = open_tier(tmp_path, **sizes)
    keys = make_keys(9)
    for key, priority in zip(keys[:4], (7, -8, 0, 0), strict=True):
        assert put_with(tier, [key], priority) == [None]
    put_with(tier, keys[4:5], 0)
    assert contains(tier, keys[:5]) == [True, False, True, True, True]
    put_with(tier, keys[5:6], 1)
    assert contains(tier, keys[:6]) == [True, False, False, True, True, True]
    (error,) = put_with(tier, keys[6:7], -1)
    assert isinstance(error, TierFull)
    assert contains(tier, keys[:6]) == [True, False, False, True, True, True]
    tier.pin_many([keys[3].name])
    tier.pin_many([keys[3].name], False)  # has its old priority again
    put_with(tier, keys[6:8], 0)
    assert contains(tier, keys[:8]) == [True, False, False, False, False, True, True, True]
    with pytest.raises(ValueError, match="priority: expected -8 to 7, got 8"):
        put_with(tier, keys, 8)
    tier.close()


def test_a_slab_is_worth_its_best_record(tmp_path):
    slot = -(-LARGE_LAYOUT.record_bytes // PAGE_BYTES) * PAGE_BYTES
    tier = open_tier(tmp_path, capacity_bytes=2 * slot, slab_bytes=slot)
    small, large = make_keys(42), make_keys(3, LARGE_LAYOUT)
    put_with(tier, small[:1], 5)
    put_with(tier, small[1:], 0)
    put_with(tier, large[:1], 0)  # drops the second slab, though it was used more recently
    assert contains(tier, [small[0], small[41], large[0]]) == [True, False, True]
    assert put_with(tier, large[1:], 5) == [None, None]
    assert contains(tier, [small[0], *large]) == [False, False, True, True]
    tier.close()
