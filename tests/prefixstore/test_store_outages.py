"""What takes a tier down, for which kinds of calls, and what brings it back."""

import errno
import os
import threading
import time

import numpy as np
import pytest
from dict_tier import DictTier, fill, held, raises
from disk_tiers import put, replace_preadv
from faulty_network import ScriptedServer
from sample_blocks import LAYOUT, make_keys, make_payload
from stores import load, save, use_of

from prefixstore.errors import TierPartSilent, TierPartTimeout, TierTimeout, TierUnavailable
from prefixstore.store import Store, StoreConfig, TierPolicy, block_sources
from prefixstore.store.block_sources import HostBlock
from prefixstore.store.block_targets import HostBlocks
from prefixstore.store.breaker import BreakerConfig
from prefixstore.store.guarded_tier import GuardedTier
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.outcomes import raise_if_all
from prefixstore.tiers.remote import RemoteTier
from prefixstore.tiers.remote.config import RemoteTierConfig

LONG = BreakerConfig(failures=1, pause_s=60)
SHORT = BreakerConfig(failures=1, pause_s=0.05, max_pause_s=0.05)


def use_and_save(store, keys) -> None:
    """Make the calls that requests and writers make of a tier, except reads."""
    store.contains_many(keys)
    save(store, keys)


def look_after(store, keys) -> None:
    """Make the calls that tools, metrics and the dashboard make of a tier."""
    store.tier_stats()
    store.pin_many(keys)
    store.sweep()
    store.check()


@pytest.mark.parametrize("do", [use_and_save, look_after])
def test_only_a_read_ends_an_outage_of_reads(make_store, do):
    tier = DictTier("tier")
    store = make_store(tier, breaker=SHORT)
    keys = make_keys(4)
    fill(tier, keys[:1])
    tier.fail = raises(TierTimeout, "get")
    assert load(store, keys[0]) is None
    for _ in range(3):
        time.sleep(0.06)
        do(store, keys)
        assert use_of(store, "tier").is_down
        assert load(store, keys[0]) is None
    tier.fail = lambda call: None
    time.sleep(0.06)
    assert load(store, keys[0]) == "tier"
    assert not use_of(store, "tier").is_down


def test_who_may_not_write_reads_all_the_same(make_store):
    tier = DictTier("tier")
    store = make_store(tier, breaker=LONG)
    keys = make_keys(6)
    fill(tier, keys[:3])
    tier.fail = raises(TierUnavailable, "put", "delete")
    for key in keys[3:]:
        save(store, [key])
    use = use_of(store, "tier")
    assert (use.is_down, use.num_errors, use.num_dropped) == (True, 1, 3)
    assert tier.calls.count("put") == 1
    assert store.contains_many(keys) == ["tier"] * 3 + [None] * 3
    assert [load(store, key) for key in keys[:3]] == ["tier"] * 3
    assert store.delete_many(keys[:1]) == ["tier"] and held(tier, keys[:1]) == [True]
    assert "delete" not in tier.calls


@pytest.mark.parametrize("num_faster", [0, 1])
def test_nothing_is_done_for_writes_that_are_left_alone(make_store, monkeypatch, num_faster):
    tier = DictTier("tier", raises(TierUnavailable, "put"))
    tiers = [DictTier("faster"), tier][1 - num_faster :]
    store = make_store(*tiers, breaker=LONG)
    first, *others = make_keys(5)
    save(store, [first])
    assert use_of(store, "tier").is_down
    for one in tiers:
        one.calls.clear()
    encoded, done = [], []
    encode = block_sources.encode
    monkeypatch.setattr(block_sources, "encode", lambda *args: encoded.append(1) or encode(*args))
    for key in others:
        assert store.save(key, HostBlock(make_payload(key)), lambda: done.append(1))
    assert store.flush(30)
    assert len(done) == 4 and len(encoded) == 4 * num_faster
    assert tier.calls == [] and "get" not in tiers[0].calls
    use = use_of(store, "tier")
    assert (use.num_dropped, use.num_errors) == (5, 1) and use.num_skipped >= 1
    assert held(tiers[0], others) == [num_faster == 1] * 4


def test_a_tier_that_is_left_alone_is_looked_after(make_store):
    tier = DictTier("tier")
    store = make_store(tier, breaker=LONG)
    keys = make_keys(2)
    fill(tier, keys)
    tier.fail = raises(TierUnavailable, "contains", "get", "put")
    assert store.contains_many(keys) == [None, None]
    assert [load(store, key) for key in keys] == [None, None]
    stats = store.tier_stats()["tier"]
    assert stats is not None and stats.num_records == 2
    assert store.pin_many(keys) == [["tier"], ["tier"]]
    assert "check" not in tier.calls
    assert store.check() == [] and "check" in tier.calls
    assert use_of(store, "tier").is_down


def test_what_looking_after_a_tier_meets_is_counted_and_takes_it_from_nobody(make_store):
    class Dumb(DictTier):
        """Keeps records, but raises in the calls of tools and metrics."""

        def _refuse(self, *_: object):
            raise TierTimeout("no answer")

        stats = sweep = pin_many = _refuse

    tier = Dumb("dumb", raises(TierTimeout, "check"))
    store = make_store(tier, breaker=LONG)
    keys = make_keys(1)
    fill(tier, keys)
    assert store.tier_stats() == {"dumb": None}
    assert store.pin_many(keys) == [[]]
    assert store.sweep()["dumb"].num_expired == 0
    assert store.check() == ["dumb: cannot be checked: injected into check"]
    use = use_of(store, "dumb")
    assert (use.num_errors, use.num_timeouts, use.is_down) == (4, 4, False)
    assert load(store, keys[0]) == "dumb"
    tier.fail = lambda call: None


def test_an_object_store_that_hangs_is_not_brought_back_by_who_asks_for_its_metrics(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ScriptedServer()
    server.answer = lambda *_: None
    place = {"region": "us-east-1", "endpoint": server.endpoint}
    tier = RemoteTier(RemoteTierConfig("s3", "bucket", **place))
    with Store([tier], StoreConfig(load_timeout_s=0.2, breaker=SHORT)) as store:
        (key,) = make_keys(1)
        for _ in range(3):
            assert load(store, key) is None
            time.sleep(0.06)  # the next call would be a trial
            assert store.tier_stats()[tier.name] is not None
            assert use_of(store, tier.name).is_down
    server.close()


def load_all(store, keys, seconds: float = 10) -> list[str | None]:
    """Load blocks in one call, as a session does: each tier is asked for all that it may hold."""
    target = HostBlocks([bytearray(LAYOUT.payload_bytes) for _ in keys])
    return store.load_many(keys, target, time.monotonic() + seconds)


@pytest.fixture
def disk(tmp_path):
    """A disk tier, which the test's store closes."""
    return DiskTier(DiskTierConfig(tmp_path, 4 << 20))


@pytest.fixture
def hanging(monkeypatch):
    """An event: while it is set, reads from a disk hang."""
    event, go_on = threading.Event(), threading.Event()

    def read(transfer, offset, num_bytes):
        if event.is_set():
            assert go_on.wait(60)
        return transfer()

    replace_preadv(monkeypatch, False, read)
    yield event
    event.clear()
    go_on.set()


def test_a_disk_that_hangs_is_left_alone_though_it_knows_what_it_lacks(make_store, disk, hanging):
    far, keys = DictTier("far"), make_keys(6)
    put(disk, keys[:3])
    fill(far, keys[3:])
    policies = {"disk": TierPolicy(write="never", promote=False)}
    store = make_store(disk, far, policies=policies, breaker=LONG)
    assert load_all(store, keys) == ["disk"] * 3 + ["far"] * 3
    hanging.set()
    assert load_all(store, keys, 0.3) == [None] * 6
    assert use_of(store, "disk").is_down
    assert load_all(store, keys) == [None] * 3 + ["far"] * 3


class Nowhere:
    """A target for layers and their progress that keeps nothing."""

    begin = add_layers = fail = end = staticmethod(lambda *_: [])


def load_what_it_lacks(store, keys) -> None:
    assert load_all(store, make_keys(3, seed=1)) == [None] * 3


def load_nothing(store, keys) -> None:
    """Load with all keys barred, so that the tier is asked for none of them."""
    barred = make_keys(3, seed=2)
    store.quarantine(barred)
    nowhere, steps = Nowhere(), [range(LAYOUT.num_layers)]
    found = store.load_layers("disk", barred, nowhere, steps, nowhere, time.monotonic() + 9)
    assert found == [None] * 3


@pytest.mark.parametrize("do", [load_what_it_lacks, load_nothing])
def test_what_a_disk_knows_by_its_index_ends_no_outage_of_reads(make_store, disk, hanging, do):
    keys = make_keys(1)
    put(disk, keys)
    store = make_store(disk, breaker=SHORT)
    hanging.set()
    assert load_all(store, keys, 0.3) == [None]
    hanging.clear()
    for _ in range(3):
        time.sleep(0.06)  # the next call would be a trial
        do(store, keys)
        assert use_of(store, "disk").is_down
    assert load_all(store, keys) == ["disk"]  # this call is the trial: no other took it
    assert not use_of(store, "disk").is_down


def test_only_what_a_disk_really_writes_or_deletes_ends_an_outage_of_writes(
    make_store, disk, monkeypatch
):
    keys, absent = make_keys(3), make_keys(2, seed=1)
    put(disk, keys[:1])
    store = make_store(disk, breaker=SHORT)
    write = os.pwritev

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for number, mend in enumerate([lambda: save(store, keys[1:]), lambda: delete(store, keys[:1])]):
        monkeypatch.setattr(os, "pwritev", fail)
        save(store, make_keys(1, seed=2 + number))
        assert use_of(store, "disk").is_down
        monkeypatch.setattr(os, "pwritev", write)
        time.sleep(0.06)  # the next call would be a trial
        delete(store, absent)
        assert store.delete_identity(bytes(16)) == []
        assert use_of(store, "disk").is_down
        mend()
        assert not use_of(store, "disk").is_down


def delete(store, keys) -> None:
    assert store.delete_many(keys) == []


def test_a_server_that_says_it_lacks_records_is_there(make_store):
    """An absence is an answer: it ends an outage, and outweighs another record's timeout."""
    keys = make_keys(4)
    tier = DictTier("tier")
    store = make_store(tier, breaker=SHORT)
    answers = iter([TierTimeout("late")])
    tier._read = lambda name, out: next(answers, None)
    assert load_all(store, keys) == [None] * 4
    use = use_of(store, "tier")
    assert (use.num_timeouts, use.is_down) == (1, False)
    tier.fail = raises(TierTimeout, "get")
    assert load_all(store, keys) == [None] * 4
    assert use_of(store, "tier").is_down
    tier.fail = lambda call: None
    time.sleep(0.06)
    assert load_all(store, keys) == [None] * 4
    assert not use_of(store, "tier").is_down


def test_a_deletion_that_reaches_some_records_failed_and_blames_no_tier(make_store):
    class PartlyLate(DictTier):
        def delete_many(self, names, *, deadline=None):
            return [*super().delete_many(names[1:], deadline=deadline), TierTimeout("late")]

    tier, keys = PartlyLate("tier"), make_keys(3)
    fill(tier, keys)
    store = make_store(tier, breaker=LONG)
    assert store.delete_many(keys) == ["tier"]
    use = use_of(store, "tier")
    assert (use.num_timeouts, use.is_down) == (1, False)


@pytest.mark.parametrize("error", [TierPartSilent, TierPartTimeout])
def test_a_part_that_is_silent_neither_begins_an_outage_nor_ends_one(make_store, error):
    tier, keys = DictTier("tier"), make_keys(1)
    fill(tier, keys)
    store = make_store(tier, breaker=SHORT)
    for is_down in (False, True):
        if is_down:
            tier.fail = raises(TierTimeout, "contains")
            assert store.contains_many(keys) == [None]
            time.sleep(0.06)  # the next call would be a trial
        tier.fail = raises(error, "contains")
        assert store.contains_many(keys) == [None]
        assert use_of(store, "tier").is_down is is_down
    tier.fail = lambda call: None
    assert store.contains_many(keys) == ["tier"]
    assert not use_of(store, "tier").is_down
    with pytest.raises(TierTimeout, match="whole"):  # of both errors the tier's
        raise_if_all([error("part"), TierTimeout("whole")], TierUnavailable, TierTimeout)


@pytest.mark.parametrize("call", ["fetch_many", "fetch_parts", "read_many", "put_many"])
def test_a_tier_is_not_called_after_the_deadline_nor_blamed(disk, call):
    keys = make_keys(3)
    put(disk, keys)
    tier, abandoned = GuardedTier(disk, LONG), []
    rows = [np.empty(LAYOUT.max_record_bytes, np.uint8) for _ in keys]
    late, names, numbers = time.monotonic() - 1, [key.name for key in keys], [0] * len(keys)

    def abandon() -> None:
        abandoned.append(call)

    answers = {
        "fetch_many": lambda: tier.fetch_many(keys, rows, late, abandon),
        "fetch_parts": lambda: tier.fetch_parts(keys, rows, numbers, late),
        "read_many": lambda: tier.read_many(names, rows, late, abandon),
        "put_many": lambda: tier.put_many(names, rows, numbers, late),
    }[call]()
    use = tier.use()
    assert not any(answers) and abandoned == []
    assert (use.is_down, use.num_errors, use.num_skipped) == (False, 0, 0)
    assert (use.num_misses, use.num_dropped) == (
        3 * (call == "fetch_many"),
        3 * (call == "put_many"),
    )
    tier.close()


def test_a_deletion_after_the_deadline_blames_no_tier(disk):
    put(disk, keys := make_keys(3))
    tier, names = GuardedTier(disk, LONG), [key.name for key in keys]
    assert not tier.delete_many(names, time.monotonic() - 1)
    assert (tier.use().is_down, tier.use().num_timeouts) == (False, 1)
    assert tier.contains_many(names) == [False] * 3
    tier.close()
