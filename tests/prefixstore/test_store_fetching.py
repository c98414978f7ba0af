"""A record that several requests want is fetched once, and how long each of them waits."""

import threading
import time
from functools import partial

import numpy as np
import pytest
from dict_tier import DictTier, fill
from sample_blocks import LAYOUT, load_block, make_keys, make_payload
from stores import load, save, use_of

from prefixstore.errors import TierTimeout, TierUnavailable
from prefixstore.store import loader
from prefixstore.store.block_targets import HostBlocks
from prefixstore.store.config import TierPolicy
from prefixstore.store.in_flight import InFlight, SharedRecord
from prefixstore.store.recent_names import RecentNames


def test_absence_is_remembered_for_a_while(make_store):
    slow = DictTier("slow")
    store = make_store(slow, policies={"slow": TierPolicy(negative_ttl_s=60)})
    keys = make_keys(4)
    fill(slow, keys[:1])
    for _ in range(5):
        assert store.contains_many(keys) == ["slow", None, None, None]
    assert slow.calls.count("contains") == 5  # only for the record that is there
    assert store.contains_many(keys[1:]) == [None] * 3
    assert slow.calls.count("contains") == 5
    save(store, keys[1:2])
    assert store.contains_many(keys) == ["slow", "slow", None, None]


def test_a_request_waits_no_longer_than_its_deadline(make_store):
    """A tier gets the request's deadline, and keeps it."""

    class Slow(DictTier):
        def get_many(self, names, outs, *, offsets=None, deadline=None):
            time.sleep(max(0.0, deadline - time.monotonic()))
            return [TierTimeout("slow")] * len(names)

    fast, slow = DictTier("fast"), Slow("slow")
    store = make_store(fast, slow, load_timeout_s=0.2)
    assert store.deadline() - time.monotonic() <= 0.191  # the rest is for restoring what came
    keys = make_keys(4)
    fill(slow, keys)
    fill(fast, keys[:1])
    started = time.monotonic()
    assert [load(store, keys[0]), load(store, keys[1])] == ["fast", None]
    assert 0.15 < time.monotonic() - started < 5
    use = use_of(store, "slow")
    assert (use.num_misses, use.num_errors, use.num_timeouts) == (1, 1, 1)


def run_both(store, first, second, is_fetching: threading.Event, gate: threading.Event) -> None:
    """Run two requests; until the gate opens, the second waits for the first's fetch."""
    threads = [threading.Thread(target=request) for request in (first, second)]
    threads[0].start()
    assert is_fetching.wait(30)
    threads[1].start()
    try:
        while store.stats().num_coalesced == 0:
            assert threads[1].is_alive()
            time.sleep(0.001)
    finally:
        gate.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_two_requests_fetch_a_record_once(make_store):
    gate, fetched = threading.Event(), threading.Event()

    def fail(call: str) -> None:
        if call == "get":
            fetched.set()
            assert gate.wait(30)

    fast, slow = DictTier("fast"), DictTier("slow", fail)
    store = make_store(fast, slow)
    keys = make_keys(3)
    fill(slow, keys)
    found: dict[str, list[str | None]] = {}

    def request(name: str) -> None:
        found[name] = [load(store, key) for key in keys[:1]]

    run_both(store, partial(request, "first"), partial(request, "second"), fetched, gate)
    assert found == {"first": ["slow"], "second": ["slow"]}
    assert slow.calls.count("get") == 1
    use = use_of(store, "slow")
    assert (use.num_hits, use.read_bytes) == (2, LAYOUT.record_bytes)


def test_what_a_long_load_has_yet_to_fetch_is_fetched_once(make_store, monkeypatch):
    """Even while its earlier records are on their way to the faster tier."""
    monkeypatch.setattr(loader, "BATCH_BYTES", 1)  # one record at a time
    gate, is_at_last = threading.Event(), threading.Event()

    def fail(call: str) -> None:
        if call == "get" and slow.calls.count("get") == len(keys):
            is_at_last.set()
            assert gate.wait(30)

    fast, slow = DictTier("fast"), DictTier("slow", fail)
    keys = make_keys(5)
    store = make_store(fast, slow, queue_bytes=2 * LAYOUT.record_bytes)
    fill(slow, keys)
    found: list[list[str | None]] = []

    def request(keys) -> None:
        outs = HostBlocks([bytearray(LAYOUT.block_bytes) for _ in keys])
        found.append(store.load_many(keys, outs))

    run_both(store, partial(request, keys), partial(request, keys[-1:]), is_at_last, gate)
    assert sorted(found, key=len) == [["slow"], ["slow"] * 5]
    assert slow.calls.count("get") == 5


@pytest.mark.parametrize("num_failures", [1, 100])
def test_a_load_is_fetched_in_its_own_thread_where_no_other_can_be_begun(
    make_store, monkeypatch, num_failures
):
    """And nothing twice, if one can be begun later."""
    monkeypatch.setattr(loader, "BATCH_BYTES", 1)  # one record at a time
    slow = DictTier("slow")
    keys = make_keys(5)
    store = make_store(slow)
    fill(slow, keys)
    failures = [RuntimeError("can't start new thread")] * num_failures
    start = threading.Thread.start

    def start_or_fail(thread: threading.Thread) -> None:
        if failures:
            raise failures.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)
    outs = [bytearray(LAYOUT.block_bytes) for _ in keys]
    assert store.load_many(keys, HostBlocks(outs)) == ["slow"] * 5
    assert [bytes(out) for out in outs] == [make_payload(key).tobytes() for key in keys]
    assert slow.calls.count("get") == 5


@pytest.fixture
def held_up():
    """A fast tier whose writer waits at a gate, which opens after the test."""
    gate = threading.Event()

    def fail(call: str) -> None:
        assert call != "put" or gate.wait(30)

    yield DictTier("fast", fail), gate
    gate.set()


def test_no_request_waits_while_what_another_fetched_is_written(make_store, held_up):
    (fast, gate), slow = held_up, DictTier("slow")
    told = []
    store = make_store(fast, slow)
    store.observe_loads(lambda name, num_records, *_: told.append((name, num_records)))
    keys = make_keys(3)
    fill(slow, keys)
    assert load(store, keys[0]) == "slow"  # its writer is at the gate from here on
    outs = [bytearray(LAYOUT.block_bytes) for _ in keys]
    for _ in range(2):
        assert store.load_many(keys, HostBlocks(outs)) == ["slow"] * 3
        assert [bytes(out) for out in outs] == [make_payload(key).tobytes() for key in keys]
    assert slow.calls.count("get") == 3
    assert store.stats().num_coalesced == 4
    use = use_of(store, "slow")
    assert (use.num_hits, use.read_bytes) == (7, 3 * LAYOUT.record_bytes)
    asked = [one for one in told if one[0] == "slow"]
    assert asked == [("slow", 1), ("slow", 2)]  # the tier was not asked for what was shared
    gate.set()
    assert store.flush(30)
    assert [load(store, key) for key in keys] == ["fast"] * 3
    assert use_of(store, "fast").num_present == 0  # nothing was promoted twice


def test_who_is_given_what_another_fetched_verifies_it_too(make_store, held_up):
    read = []

    class Lending(DictTier):
        def get_many(self, names, outs, *, offsets=None, deadline=None):
            read.extend(outs)
            return super().get_many(names, outs, offsets=offsets, deadline=deadline)

    (fast, _), slow = held_up, Lending("slow")
    store = make_store(fast, slow)
    (key,) = make_keys(1)
    fill(slow, [key])
    assert load(store, key) == "slow"
    read[0][LAYOUT.header_bytes + 5] ^= 1
    assert load(store, key) is None
    use = use_of(store, "slow")
    assert (use.num_hits, use.num_corrupted) == (1, 1)


@pytest.mark.parametrize(
    ("num_own", "found"), [(2, [None] * 2 + ["slow"] * 2), (0, ["slow", None])]
)
def test_a_load_that_is_stopped_takes_no_more_of_what_another_fetched(
    make_store, held_up, monkeypatch, num_own, found
):
    """Neither after a batch of its own, nor after the first batch of the other load."""
    monkeypatch.setattr(loader, "LENT_BATCH_BYTES", LAYOUT.record_bytes)
    (fast, _), slow = held_up, DictTier("slow")
    store = make_store(fast, slow)
    keys = make_keys(2 + num_own)
    fill(slow, keys)
    assert [load(store, key) for key in keys[:2]] == ["slow"] * 2
    outs = [bytearray(LAYOUT.block_bytes) for _ in keys]
    assert store.load_many(keys, HostBlocks(outs), progress=lambda loaded: False) == found
    assert store.stats().num_misses == 0


def test_who_waits_for_a_fetch_that_fails_tries_for_itself(make_store):
    gate, fetched = threading.Event(), threading.Event()

    def fail(call: str) -> None:
        if call == "get" and not fetched.is_set():
            fetched.set()
            assert gate.wait(30)
            raise TierUnavailable("cut off")

    fast, slow = DictTier("fast"), DictTier("slow", fail)
    store = make_store(fast, slow)
    keys = make_keys(1)
    fill(slow, keys)
    found = []

    def request() -> None:
        found.append(load(store, keys[0]))

    run_both(store, request, request, fetched, gate)
    assert sorted(found, key=str) == [None, "slow"]


def test_a_load_that_raised_is_waited_for_by_nobody(make_store):
    """A wrong buffer makes the load raise; the next load must not wait for it."""
    fast, slow = DictTier("fast"), DictTier("slow")
    store = make_store(fast, slow)
    (key,) = make_keys(1)
    fill(slow, [key])
    with pytest.raises(ValueError, match="block_out: expected 3072 bytes"):
        load_block(store, key, bytearray(3))
    started = time.monotonic()
    assert load(store, key) == "slow"
    assert time.monotonic() - started < 20
    assert store.stats().num_coalesced == 0


def test_threads_that_want_the_same_never_wait_for_each_other_in_a_ring(make_store):
    fast, slow = DictTier("fast"), DictTier("slow")
    store = make_store(fast, slow, queue_bytes=LAYOUT.block_bytes)  # most promotions are dropped
    keys = make_keys(64)
    fill(slow, keys)
    problems = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(64)
        for _ in range(5):
            problems.extend(key for key in order if load(store, keys[key]) is None)

    started = time.monotonic()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert time.monotonic() - started < 30


def test_recent_names_are_bounded_and_age():
    now = [0.0]
    names = [key.name for key in make_keys(6)]
    recent = RecentNames(capacity=4, ttl_s=10, clock=lambda: now[0])
    assert recent.add(names[:4]) == [True] * 4
    now[0] = 5
    assert recent.add(names[2:5]) == [False, False, True]
    assert recent.contains_many(names) == [False, True, True, True, True, False]
    now[0] = 12
    assert recent.contains_many(names) == [False, False, True, True, True, False]
    recent.discard(names[2:4])
    assert recent.contains_many(names) == [False, False, False, False, True, False]


def test_a_claim_has_one_holder_and_wakes_all_who_wait():
    names = [key.name for key in make_keys(3)]
    in_flight = InFlight()
    assert in_flight.claim(names[:2]) == [True, True]
    assert in_flight.claim(names) == [False, False, True]
    started = time.monotonic()
    assert in_flight.wait(names, started + 0.01) == [None] * 3
    assert time.monotonic() >= started + 0.01
    shared = SharedRecord(1, np.zeros(3, np.uint8))
    in_flight.share(names[0], shared)
    in_flight.release(names[1:2])
    in_flight.releaser(names[2])()
    assert in_flight.wait(names, started + 60) == [shared, None, None]
    assert time.monotonic() < started + 30
    assert in_flight.claim(names) == [False, True, True]
    in_flight.release(names)
    assert in_flight.wait(names, started + 60) == [None] * 3
    assert in_flight.claim(names) == [True] * 3
    assert not in_flight.give(names[0], shared)  # no load waits
    in_flight.wait(names[1:], started)
    assert in_flight.give(names[1], shared)
    assert in_flight.wait(names[:2], started + 60) == [None] * 2
    assert in_flight.claim(names) == [True, True, False]
