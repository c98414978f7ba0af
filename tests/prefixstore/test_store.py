"""The store: order of tiers, promotion, bounded writes, and nothing wrong whatever tiers do."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from sample_blocks import LARGE_LAYOUT, LAYOUT, load_block, make_keys, make_payload, make_record

from prefixstore.errors import (
    BlockCorrupted,
    ConfigError,
    TierError,
    TierFull,
    TierTimeout,
    TierUnavailable,
)
from prefixstore.record import BlockKey
from prefixstore.store import Store
from prefixstore.store.block_sources import HostBlock
from prefixstore.store.block_targets import HostBlocks
from prefixstore.store.breaker import Breaker, BreakerConfig
from prefixstore.store.config import StoreConfig, TierPolicy
from prefixstore.tiers.base import Swept, Tier, TierCounters, TierStats
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig

CAPACITY = 4 << 20


class DictTier(Tier):
    """A tier that cannot be wrong, and fails as told: `fail` runs at the start of every call."""

    name = ""

    def __init__(self, name: str, fail: Callable[[str], None] = lambda call: None) -> None:
        self.name = name
        self.fail = fail
        self.records: dict[bytes, bytes] = {}
        self.calls: list[str] = []

    def _enter(self, call: str) -> None:
        self.calls.append(call)
        self.fail(call)

    def get_many(self, names, outs, *, offsets=None, deadline=None):
        if offsets is None:
            items = zip(names, outs, strict=True)
            return [self._attempt("get", self._read, *item) for item in items]
        parts = zip(names, outs, offsets, strict=True)
        return [self._attempt("get", self._read_part, *part) for part in parts]

    def put_many(self, names, records, *, priority=0, deadline=None):
        items = zip(names, records, strict=True)
        return [self._attempt("put", self._write, *item) for item in items]

    def contains_many(self, names, *, deadline=None):
        self._enter("contains")
        return [name.block_hash in self.records for name in names]

    def delete_many(self, names, *, deadline=None):
        self._enter("delete")
        return [self.records.pop(name.block_hash, None) is not None for name in names]

    def delete_identity(self, identity):
        self.records.clear()

    def list_identities(self):
        return {}

    def pin_many(self, names, is_pinned=True):
        return [name.block_hash in self.records for name in names]

    def stats(self) -> TierStats:
        used_bytes = sum(map(len, self.records.values()))
        return TierCounters().stats(CAPACITY, used_bytes, len(self.records))

    def check(self, fix=False) -> list[str]:
        self._enter("check")
        return []

    def sweep(self) -> Swept:
        return Swept()

    def close(self) -> None:
        self._enter("close")

    def _read(self, name, out):
        record = self.records.get(name.block_hash)
        if record is None:
            return None
        out[: len(record)] = record
        return len(record)

    def _read_part(self, name, out, offset):
        record = bytearray(len(self.records.get(name.block_hash, b"")))
        num_bytes = self._read(name, record)
        if num_bytes is None:
            return None
        part = record[offset : min(offset + len(out), num_bytes)]
        out[: len(part)] = part
        return len(part)

    def _write(self, name, record):
        self.records.setdefault(name.block_hash, bytes(record))

    def _attempt(self, call, run, *args):
        """A record's outcome; what is said to be down altogether fails the call."""
        try:
            self._enter(call)
            return run(*args)
        except (TierFull, BlockCorrupted, TierTimeout) as error:
            return error


@pytest.fixture
def make_store() -> Iterator[Callable[..., Store]]:
    """Makes a store; each is closed after the test."""
    stores: list[Store] = []

    def make(*tiers, **settings) -> Store:
        stores.append(Store(tiers, StoreConfig(**settings)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def save(store: Store, keys: list[BlockKey]) -> None:
    for key in keys:
        assert store.save(key, HostBlock(make_payload(key)))
    assert store.flush(30)


def load(store: Store, key: BlockKey) -> str | None:
    """Load a block; a payload that is not the right one fails the test."""
    out = np.full(key.layout.payload_bytes, 0xEE, np.uint8)
    name = load_block(store, key, out)
    assert name is None or np.array_equal(out, make_payload(key)), "wrong output"
    return name


def use_of(store: Store, name: str):
    return next(use for use in store.stats().tiers if use.name == name)


def raises(error: type[TierError], *calls: str) -> Callable[[str], None]:
    def fail(call: str) -> None:
        if not calls or call in calls:
            raise error(f"injected into {call}")

    return fail


def memory_and_disk(path) -> tuple[MemoryTier, DiskTier]:
    return (
        MemoryTier(MemoryTierConfig(CAPACITY)),
        DiskTier(DiskTierConfig(path, CAPACITY)),
    )


def test_saves_to_all_tiers_and_loads_from_the_fastest(make_store, tmp_path):
    store = make_store(*memory_and_disk(tmp_path))
    keys = make_keys(8) + make_keys(2, LARGE_LAYOUT)
    save(store, keys)
    assert store.contains_many(keys) == ["memory"] * 10
    assert [load(store, key) for key in keys] == ["memory"] * 10
    for name in ("memory", "disk"):
        assert use_of(store, name).num_written == 10
    assert use_of(store, "disk").num_hits == 0
    assert store.check() == []


def test_survives_a_restart_and_promotes(make_store, tmp_path):
    keys = make_keys(8)
    store = make_store(*memory_and_disk(tmp_path))
    save(store, keys)
    store.close()
    store = make_store(*memory_and_disk(tmp_path))
    assert store.contains_many(keys) == ["disk"] * 8
    assert [load(store, key) for key in keys] == ["disk"] * 8
    assert store.flush(30)
    assert [load(store, key) for key in keys] == ["memory"] * 8
    stats = store.stats()
    assert (stats.num_loads, stats.num_misses) == (16, 0)
    assert use_of(store, "disk").read_bytes == 8 * LAYOUT.record_bytes
    assert store.check() == []


def test_one_answer_for_each_key(make_store):
    store = make_store(DictTier("dict"))
    keys = make_keys(6)
    save(store, keys[1::2])
    outs = [bytearray(LAYOUT.payload_bytes) for _ in keys]
    assert store.load_many(keys, HostBlocks(outs)) == [None, "dict"] * 3
    assert store.contains_many(keys) == [None, "dict"] * 3
    for key, out in zip(keys[1::2], outs[1::2], strict=True):
        assert out == make_payload(key).tobytes()
    assert store.contains_many([]) == []


def test_policies_say_what_goes_where(make_store):
    fast, middle, slow = DictTier("fast"), DictTier("middle"), DictTier("slow")
    policies = {"fast": TierPolicy("never"), "middle": TierPolicy("never", promote=False)}
    store = make_store(fast, middle, slow, policies=policies)
    (key,) = make_keys(1)
    save(store, [key])
    assert [len(tier.records) for tier in (fast, middle, slow)] == [0, 0, 1]
    assert load(store, key) == "slow"
    assert store.flush(30)
    assert [len(tier.records) for tier in (fast, middle, slow)] == [1, 0, 1]


def test_a_present_record_is_not_written_again(make_store):
    tier = DictTier("dict")
    store = make_store(tier)
    (key,) = make_keys(1)
    save(store, [key])
    save(store, [key])
    assert tier.calls.count("put") == 1
    assert use_of(store, "dict").num_present == 1


def test_works_without_tiers(make_store):
    store = make_store()
    (key,) = make_keys(1)
    save(store, [key])
    assert load(store, key) is None
    assert store.contains_many([key]) == [None]


# ---- wrong bytes -------------------------------------------------------------------------------


REGIONS = {
    "header": (0, 96),
    "token ids": (96, 160),
    "layer table": (160, 232),
    "padding": (232, LAYOUT.header_bytes),
    "payload": (LAYOUT.header_bytes, LAYOUT.record_bytes),
}


def flip_stored_bit(tier: MemoryTier | DiskTier, key: BlockKey, position: int, bit: int) -> None:
    """Behind the tier's back: in its arena, or in its file."""
    if isinstance(tier, MemoryTier):
        tier._arena.records[key.block_hash].data[position] ^= 1 << bit
        return
    ref = tier._index.find_many([key.name])[key.name]
    with (tier._config.path / ref.slab.file_name).open("r+b", buffering=0) as file:
        file.seek(ref.slot * ref.slab.slot_bytes + position)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.fixture(params=["memory", "disk"])
def tier(request, tmp_path) -> MemoryTier | DiskTier:
    """Each real tier; the store that gets it closes it."""
    if request.param == "memory":
        return MemoryTier(MemoryTierConfig(CAPACITY))
    return DiskTier(DiskTierConfig(tmp_path, CAPACITY))


def test_a_thousand_flipped_bits_give_a_thousand_misses(make_store, tier):
    """One bit of one of many records at a time, 200 in each region, at random within it."""
    random = np.random.default_rng(0)
    store = make_store(tier)
    keys = make_keys(20)
    save(store, keys)
    for start, end in REGIONS.values():
        for _ in range(200):
            key = keys[random.integers(len(keys))]
            position, bit = int(random.integers(start, end)), int(random.integers(8))
            flip_stored_bit(tier, key, position, bit)
            assert load(store, key) is None, f"bit {bit} of byte {position}"
            assert not tier.contains(key.name)  # it is not met twice
            save(store, [key])
    use = use_of(store, tier.name)
    assert (use.num_corrupted, use.num_misses, use.num_hits) == (1000, 1000, 0)
    assert (store.stats().num_misses, use.num_errors, use.is_down) == (1000, 0, False)
    assert [load(store, key) for key in keys] == [tier.name] * 20
    assert store.check() == []


def other_records(key: BlockKey) -> dict[str, bytes]:
    """What may lie under a key's hash and must not be used."""
    right = bytes(make_record(key))
    tokens = key.tokens.copy()
    tokens[3] ^= 1
    layout = key.layout
    keys = {
        "another model": replace(key, identity=bytes(16)),
        "another prefix": replace(key, parent_hash=key.block_hash),
        "other tokens of the same hash": replace(key, tokens=tokens),
        "another dtype": replace(key, layout=replace(layout, dtype="float16")),
        "another layer group": replace(key, layout=replace(layout, layer_group=1)),
        "fewer layers": replace(key, layout=replace(layout, num_layers=2)),
        "more layers": replace(key, layout=replace(layout, num_layers=4)),
    }
    return {
        **{what: bytes(make_record(other)) for what, other in keys.items()},
        "another block": bytes(make_record(make_keys(1, seed=1)[0])),
        "half a header": right[:48],
        "a header only": right[: layout.header_bytes],
        "all but one byte": right[:-1],
        "one byte more": right + b"\0",
        "zeros": bytes(len(right)),
    }


@pytest.mark.parametrize("what", other_records(make_keys(1)[0]))
def test_any_other_record_under_the_hash_is_a_counted_miss(make_store, tier, what):
    store = make_store(tier)
    key, neighbour = make_keys(2)
    save(store, [neighbour])
    tier.put(key.name, memoryview(other_records(key)[what]))
    assert load(store, key) is None
    use = use_of(store, tier.name)
    assert (use.num_corrupted, use.num_misses, use.num_hits) == (1, 1, 0)
    assert store.contains_many([key, neighbour]) == [None, tier.name]
    save(store, [key])
    assert [load(store, key), load(store, neighbour)] == [tier.name] * 2
    assert store.check() == []


def test_a_corrupted_record_is_deleted_and_the_next_tier_answers(make_store):
    fast, slow = DictTier("fast"), DictTier("slow")
    store = make_store(fast, slow)
    (key,) = make_keys(1)
    save(store, [key])
    damaged = bytearray(fast.records[key.block_hash])
    damaged[-1] ^= 1
    fast.records[key.block_hash] = bytes(damaged)
    assert load(store, key) == "slow"
    assert store.flush(30)
    assert load(store, key) == "fast"  # promoted over the one that was deleted
    assert use_of(store, "fast").num_corrupted == 1


def test_truncated_and_overlong_records_are_misses(make_store):
    tier = DictTier("dict")
    store = make_store(tier)
    (key,) = make_keys(1)
    record = bytes(make_record(key))
    for num_bytes in (0, 1, 95, 96, 255, 256, len(record) - 1):
        tier.records[key.block_hash] = record[:num_bytes]
        assert load(store, key) is None
    assert use_of(store, "dict").num_corrupted == 7


@pytest.mark.parametrize("claim", [-1, 0, 1 << 40])
def test_a_tier_that_lies_about_lengths_is_a_miss(make_store, claim):
    tier = DictTier("liar")
    store = make_store(tier)
    (key,) = make_keys(1)
    tier.records[key.block_hash] = bytes(make_record(key))
    read = tier._read
    tier._read = lambda name, out: read(name, out) and claim
    name = load(store, key)  # fails where the payload is wrong
    assert name is None or claim > LAYOUT.record_bytes


# ---- failing tiers -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [TierUnavailable, TierTimeout, TierFull, BlockCorrupted])
def test_a_tier_that_raises_costs_only_its_hits(make_store, error):
    broken, good = DictTier("broken", raises(error)), DictTier("good")
    store = make_store(broken, good)
    keys = make_keys(20)
    save(store, keys)
    assert [load(store, key) for key in keys] == ["good"] * 20
    assert store.contains_many(keys) == ["good"] * 20
    assert use_of(store, "broken").num_hits == 0
    broken.fail = lambda call: None


def test_a_failing_tier_is_left_alone_and_comes_back(make_store, caplog):
    tier = DictTier("flaky")
    config = BreakerConfig(failures=3, window_s=10, pause_s=0.2, max_pause_s=1)
    store = make_store(tier, breaker=config)
    (key,) = make_keys(1)
    save(store, [key])
    tier.fail = raises(TierUnavailable)
    tier.calls.clear()
    with caplog.at_level(logging.WARNING, "prefixstore"):
        for _ in range(50):
            assert load(store, key) is None
        assert len(tier.calls) == 3
        use = use_of(store, "flaky")
        assert (use.is_down, use.num_errors, use.num_skipped) == (True, 3, 47)
        tier.fail = lambda call: None
        time.sleep(0.25)
        assert load(store, key) == "flaky"
    assert not use_of(store, "flaky").is_down
    assert [record.message.split(":")[1] for record in caplog.records] == [
        " down for 0.2 s",
        " back",
    ]


def test_a_full_tier_is_still_read(make_store):
    tier = DictTier("full")
    store = make_store(tier, breaker=BreakerConfig(failures=1))
    keys = make_keys(3)
    save(store, keys[:1])
    tier.fail = raises(TierFull, "put")
    save(store, keys[1:])
    assert load(store, keys[0]) == "full"
    use = use_of(store, "full")
    assert (use.num_full, use.num_errors, use.is_down) == (2, 0, False)


def test_a_bug_in_a_tier_marks_it_down_and_writing_goes_on(make_store, caplog):
    def fail(call: str) -> None:
        if call == "put":
            raise ZeroDivisionError("a bug")

    buggy, good = DictTier("buggy", fail), DictTier("good")
    store = make_store(good, buggy)
    keys = make_keys(3)
    save(store, keys)
    assert [load(store, key) for key in keys] == ["good"] * 3
    assert use_of(store, "buggy").is_down and not use_of(store, "good").is_down
    assert "a bug" in caplog.text


def test_a_bug_in_a_callback_does_not_end_the_writing(make_store, caplog):
    tier = DictTier("dict")
    store = make_store(tier)
    first, second = make_keys(2)

    def done() -> None:
        raise ZeroDivisionError("in done")

    assert store.save(first, HostBlock(make_payload(first)), done)
    save(store, [second])
    assert load(store, second) == "dict"
    assert "in done" in caplog.text
    assert not use_of(store, "dict").is_down


# ---- the queue ---------------------------------------------------------------------------------


class Gate:
    """Stalls a tier's puts until opened."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, call: str) -> None:
        if call == "put":
            assert self.event.wait(30)


def test_a_stalled_tier_never_stalls_who_saves(make_store):
    gate = Gate()
    store = make_store(DictTier("stalled", gate), queue_entries=4)
    keys = make_keys(20)
    done: list[int] = []
    started = time.monotonic()
    taken = [
        store.save(key, HostBlock(make_payload(key)), lambda i=i: done.append(i))
        for i, key in enumerate(keys)
    ]
    assert time.monotonic() - started < 5
    assert 4 <= sum(taken) <= 5
    stats = store.stats()
    assert (stats.num_saved, stats.num_dropped) == (sum(taken), 20 - sum(taken))
    assert {i for i, was_taken in enumerate(taken) if not was_taken} <= set(done)
    assert not store.flush(0.05)
    gate.event.set()
    assert store.flush(30)
    assert sorted(done) == list(range(20))  # each exactly once
    loaded = [load(store, key) is not None for key in keys]
    assert loaded == taken
    assert store.check() == []


def test_queue_is_bounded_in_bytes(make_store):
    gate = Gate()
    store = make_store(DictTier("stalled", gate), queue_bytes=3 * LAYOUT.payload_bytes + 1)
    keys = make_keys(8)
    assert sum(store.save(key, HostBlock(make_payload(key))) for key in keys) == 3
    stats = store.stats()
    assert (stats.queue_entries, stats.queue_bytes) == (3, 3 * LAYOUT.payload_bytes)
    gate.event.set()
    assert store.flush(30)
    assert store.stats().queue_bytes == 0


def test_payload_may_change_after_done(make_store):
    gate = Gate()
    store = make_store(DictTier("slow", gate))
    (key,) = make_keys(1)
    payload, is_done = make_payload(key), threading.Event()
    assert store.save(key, HostBlock(payload), is_done.set)
    assert is_done.wait(30)  # before the put, which the gate still holds
    payload[:] = 0
    gate.event.set()
    assert store.flush(30)
    assert load(store, key) == "slow"


def test_promotions_are_dropped_when_the_queue_is_full(make_store):
    gate = Gate()
    fast, slow = DictTier("fast", gate), DictTier("slow")
    store = make_store(fast, slow, queue_entries=2)
    keys = make_keys(6)
    for key in keys:
        slow.records[key.block_hash] = bytes(make_record(key))
    assert [load(store, key) for key in keys] == ["slow"] * 6
    assert store.stats().num_promotions_dropped == 4
    gate.event.set()
    assert store.flush(30)
    assert len(fast.records) == 2


def test_close_writes_what_is_queued(make_store, tmp_path):
    keys = make_keys(30)
    with make_store(*memory_and_disk(tmp_path)) as store:
        for key in keys:
            assert store.save(key, HostBlock(make_payload(key)))
    tier = DiskTier(DiskTierConfig(tmp_path, CAPACITY))
    assert all(tier.contains_many([key.name for key in keys]))
    tier.close()


def test_a_forked_process_queues_nothing_for_the_writer_it_lacks(make_store):
    store = make_store(DictTier("tier"))
    keys = make_keys(2)
    save(store, keys[:1])
    pid = os.fork()
    if pid == 0:  # in the child: exit at once, whatever happens
        try:
            done = []
            payload = memoryview(make_payload(keys[1])).cast("B")
            store.save(keys[1], HostBlock(payload), done=lambda: done.append(1))
            was_dropped = done == [1] and store.stats().num_dropped == 1
            os._exit(0 if was_dropped and not store.flush(60) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    save(store, keys[1:])
    assert load(store, keys[1]) == "tier"


def test_close_gives_up_on_a_stalled_tier(make_store):
    gate = Gate()
    store = make_store(DictTier("stalled", gate), close_timeout_s=0.1)
    done: list[BlockKey] = []
    keys = make_keys(3)
    for key in keys:
        store.save(key, HostBlock(make_payload(key)), lambda key=key: done.append(key))
    started = time.monotonic()
    store.close()
    assert time.monotonic() - started < 10
    assert len(done) == 3
    assert 0 <= store.stats().num_dropped <= 2  # the rest was being written
    gate.event.set()


def test_after_close_everything_is_a_miss(make_store, tmp_path):
    store = make_store(*memory_and_disk(tmp_path))
    (key,) = make_keys(1)
    save(store, [key])
    store.close()
    store.close()
    done: list[int] = []
    assert load(store, key) is None
    assert not store.save(key, HostBlock(make_payload(key)), lambda: done.append(1))
    assert done == [1]
    assert store.contains_many([key]) == [None]


def test_threads_save_and_load_at_once(make_store, tmp_path):
    memory = MemoryTier(MemoryTierConfig(8 * 4096))  # evicts all the time
    store = make_store(memory, DiskTier(DiskTierConfig(tmp_path, 24 * 4096)))
    keys = make_keys(40)
    problems: list[str] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(150):
                key = keys[random.integers(len(keys))]
                if random.integers(2):
                    store.save(key, HostBlock(make_payload(key)))
                else:
                    load(store, key)
        except AssertionError as error:
            problems.append(str(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.flush(30)
    assert problems == []
    stats = store.stats()
    assert sum(use.num_hits for use in stats.tiers) == stats.num_loads - stats.num_misses > 0
    assert [use.num_corrupted for use in stats.tiers] == [0, 0]
    assert store.check() == []


# ---- arguments ---------------------------------------------------------------------------------


def test_refuses_wrong_arguments(make_store):
    store = make_store(DictTier("dict"))
    (key,) = make_keys(1)
    with pytest.raises(ValueError, match="source: expected 3072 bytes, got 3"):
        store.save(key, HostBlock(b"abc"))
    save(store, [key])
    with pytest.raises(ValueError, match="block_out: expected 3072 bytes, got 3"):
        load_block(store, key, bytearray(3))
    with pytest.raises(ValueError, match="blocks: expected writable buffers"):
        load_block(store, key, bytes(LAYOUT.payload_bytes))
    with pytest.raises(ConfigError, match="tiers: expected distinct names"):
        make_store(DictTier("same"), DictTier("same"))
    with pytest.raises(ConfigError, match="policies: expected one of"):
        make_store(DictTier("dict"), policies={"dikt": TierPolicy()})
    with pytest.raises(ConfigError, match="queue_bytes: expected at least 1, got 0"):
        StoreConfig(queue_bytes=0)
    with pytest.raises(ConfigError, match="failures: expected at least 1, got 0"):
        BreakerConfig(failures=0)
    with pytest.raises(ConfigError, match="pause_s: expected more than 0, got 0"):
        BreakerConfig(pause_s=0)


def test_breaker_pauses_grow_and_shrink_back():
    now = [0.0]
    breaker = Breaker("x", BreakerConfig(2, 10, 1, 4), clock=lambda: now[0])
    error = TierUnavailable("x")
    breaker.failed(error)
    now[0] = 11
    breaker.failed(error)
    assert breaker.allows()  # two failures, but not within the window
    breaker.failed(error)
    assert not breaker.allows()
    for pause in (1, 2, 4, 4):
        now[0] += pause - 0.01
        assert not breaker.allows()
        now[0] += 0.02
        assert breaker.allows()  # the trial
        assert not breaker.allows()  # one at a time
        breaker.failed(error)
    now[0] += 5
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.allows() and breaker.allows()
    breaker.failed(error)
    breaker.failed(error)
    now[0] += 1.01
    assert breaker.allows()  # the first pause is short again


def test_what_is_quarantined_is_neither_loaded_nor_saved(make_store) -> None:
    tier = DictTier("tier")
    store, keys = make_store(tier), make_keys(3)
    for key in keys:
        tier.put(key.name, memoryview(make_record(key)))
    store.quarantine(keys[1:2])
    blocks = [np.empty(LAYOUT.block_bytes, np.uint8) for _ in keys]
    assert store.contains_many(keys) == ["tier", None, "tier"]
    assert store.load_many(keys, HostBlocks(blocks)) == ["tier", None, "tier"]
    assert store.delete_many(keys[1:]) == []
    assert list(tier.records) == [keys[0].block_hash]
    done: list[int] = []
    for number in (1, 2):
        block = HostBlock(make_payload(keys[number]))
        assert store.save(keys[number], block, lambda number=number: done.append(number))
    assert store.flush(30)
    assert sorted(done) == [1, 2]
    assert list(tier.records) == [keys[0].block_hash, keys[2].block_hash]


def test_tells_which_tiers_could_not_delete(make_store) -> None:
    store = make_store(DictTier("good"), DictTier("bad", raises(TierUnavailable, "delete")))
    assert store.delete_many(make_keys(2)) == ["bad"]
