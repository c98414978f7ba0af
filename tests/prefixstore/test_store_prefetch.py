"""While a batch is decoded the next is read; a failure meanwhile costs nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from dict_tier import DictTier
from sample_blocks import LAYOUT, make_keys, make_payload, make_record
from stores import use_of

import prefixstore.store.loader as loader
from prefixstore.block_key import BlockKey
from prefixstore.errors import TierTimeout, TierUnavailable
from prefixstore.store import Store
from prefixstore.store.block_targets import FetchedRecord, HostBlocks
from prefixstore.store.fetcher import Slab, Slabs, record_room
from prefixstore.tiers.base import is_past
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig

NUM_BLOCKS, BATCH = 12, 3


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    (key,) = make_keys(1)
    monkeypatch.setattr(loader, "BATCH_BYTES", BATCH * record_room(key))
    monkeypatch.setattr(loader, "LENT_BATCH_BYTES", BATCH * key.layout.record_bytes)


class Target(HostBlocks):
    """Blocks in host memory; `before` is called with each batch's number before it is decoded."""

    def __init__(self, keys: Sequence[BlockKey], before: Callable[[int], object]) -> None:
        self.blocks = [np.full(LAYOUT.block_bytes, 0xEE, np.uint8) for _ in keys]
        self._keys, self._before = keys, before
        self._num_batches = 0
        super().__init__(self.blocks)

    def start(self, records: Sequence[FetchedRecord]) -> Callable[[], list[str | None]]:
        self._num_batches += 1
        self._before(self._num_batches - 1)
        return super().start(records)

    def check(self, found: Sequence[str | None]) -> None:
        """Check that what was found is right."""
        for key, block, name in zip(self._keys, self.blocks, found, strict=True):
            assert name is None or np.array_equal(block, make_payload(key))


class BatchTier(DictTier):
    """A tier that calls `before` with the number of each `get_many`, and keeps deadlines."""

    def __init__(self, name: str, before: Callable[[int], object] = lambda number: None) -> None:
        super().__init__(name)
        self.before = before
        self.num_gets = 0

    def get_many(self, names, outs, *, offsets=None, deadline=None):
        self.num_gets += 1
        self.before(self.num_gets - 1)
        outcomes = super().get_many(names, outs, deadline=deadline)
        return [TierTimeout("late")] * len(names) if is_past(deadline) else outcomes


@pytest.fixture
def tier() -> BatchTier:
    tier = BatchTier("tier")
    for key in make_keys(NUM_BLOCKS):
        tier.records[key.block_hash] = bytes(make_record(key))
    return tier


def nothing(number: int) -> None:
    pass


def test_the_next_batch_is_read_while_one_is_decoded_and_none_further(tier) -> None:
    keys = make_keys(NUM_BLOCKS)
    begun = [threading.Event() for _ in range(NUM_BLOCKS // BATCH)]
    decoded: list[int] = []

    def before_get(number: int) -> None:
        assert number <= len(decoded) + 1  # one of the two buffers is being decoded
        begun[number].set()

    def before_restore(number: int) -> None:
        if number + 1 < len(begun):
            assert begun[number + 1].wait(30)
            assert tier.num_gets == number + 2
        decoded.append(number)

    tier.before = before_get
    target = Target(keys, before_restore)
    with Store([tier]) as store:
        found = store.load_many(keys, target)
    assert found == ["tier"] * NUM_BLOCKS
    assert decoded == [0, 1, 2, 3]
    target.check(found)


@pytest.mark.parametrize("failing", range(4))
def test_a_call_that_fails_costs_its_batch(tier, failing: int) -> None:
    def fail(number: int) -> None:
        if number == failing:
            raise TierUnavailable("injected")

    tier.before = fail
    keys = make_keys(NUM_BLOCKS)
    target = Target(keys, nothing)
    with Store([tier]) as store:
        found = store.load_many(keys, target)
        target.check(found)
        lost = range(failing * BATCH, (failing + 1) * BATCH)
        assert found == [None if i in lost else "tier" for i in range(NUM_BLOCKS)]
        use = use_of(store, "tier")
        assert (use.num_errors, use.num_hits, use.num_misses) == (1, NUM_BLOCKS - BATCH, BATCH)
        assert store.stats().num_misses == BATCH
        assert store.load_many(keys, Target(keys, nothing)) == ["tier"] * NUM_BLOCKS


def test_what_a_tier_lacks_the_next_is_asked_for_together(tier) -> None:
    keys = make_keys(NUM_BLOCKS)
    middle, slow = tier, BatchTier("slow")
    for key in keys[::2]:  # one or two of each batch
        slow.records[key.block_hash] = middle.records.pop(key.block_hash)
    target = Target(keys, nothing)
    with Store([MemoryTier(MemoryTierConfig(1 << 20)), middle, slow]) as store:
        found = store.load_many(keys, target)
        assert found == ["slow", "tier"] * (NUM_BLOCKS // 2)
        target.check(found)
        assert (middle.num_gets, slow.num_gets) == (4, 2)
        assert store.flush(30)
        assert store.load_many(keys, Target(keys, nothing)) == ["memory"] * NUM_BLOCKS


@pytest.mark.parametrize("where", ["reading", "decoding"])
def test_a_bug_reaches_the_caller_and_leaves_no_claim(tier, where: str) -> None:
    """Another load must not wait for what this one had begun."""

    def fail(number: int) -> None:
        if number == 1:
            raise ZeroDivisionError("a bug")

    keys = make_keys(NUM_BLOCKS)
    memory = MemoryTier(MemoryTierConfig(1 << 20))
    with Store([memory, tier]) as store:
        if where == "reading":
            tier.before = fail
        with pytest.raises(ZeroDivisionError, match="a bug"):
            store.load_many(keys, Target(keys, nothing if where == "reading" else fail))
        assert tier.num_gets <= 3
        tier.before = nothing
        target = Target(keys, nothing)
        started = time.monotonic()
        found = store.load_many(keys, target, started + 30)
        assert time.monotonic() - started < 10
        assert None not in found
        target.check(found)


def test_after_the_deadline_the_rest_are_misses(tier) -> None:
    keys = make_keys(NUM_BLOCKS)
    for seconds in (0.5, 3, 20):  # on a stalled machine the first may be late, too
        deadline = time.monotonic() + seconds

        def outlast(number: int, deadline: float = deadline) -> None:
            if number == 1:
                time.sleep(max(0.0, deadline + 0.05 - time.monotonic()))

        target = Target(keys, outlast)
        with Store([tier]) as store:
            found = store.load_many(keys, target, deadline)
            assert use_of(store, "tier").num_misses >= BATCH
        target.check(found)
        if found[: 2 * BATCH] == ["tier"] * 2 * BATCH:
            break
    # The third was read while the second was decoded.
    assert found[: 2 * BATCH] == ["tier"] * 2 * BATCH and found[3 * BATCH :] == [None] * BATCH


def test_a_store_closed_meanwhile_gives_misses(tmp_path) -> None:
    keys = make_keys(NUM_BLOCKS)
    disk = DiskTier(DiskTierConfig(tmp_path, 4 << 20))
    for key in keys:
        disk.put(key.name, memoryview(make_record(key)))
    store = Store([disk])
    target = Target(keys, lambda number: number == 0 and store.close())
    found = store.load_many(keys, target)
    target.check(found)
    assert found[:BATCH] == ["disk"] * BATCH and found[2 * BATCH :] == [None] * 2 * BATCH


# ---- progress ----------------------------------------------------------------------------------


def test_progress_is_told_in_the_order_of_the_keys(tier) -> None:
    """Only for found blocks, of every tier."""
    keys = make_keys(NUM_BLOCKS)
    memory = MemoryTier(MemoryTierConfig(1 << 20))
    for key in keys[6:]:
        memory.put(key.name, memoryview(tier.records.pop(key.block_hash)))
    del tier.records[keys[4].block_hash]
    told: list[list[int]] = []
    target = Target(keys[::-1], nothing)

    def progress(loaded: Sequence[int]) -> bool:
        told.append(list(loaded))
        for i in loaded:
            assert np.array_equal(target.blocks[i], make_payload(keys[::-1][i]))
        return True

    with Store([memory, tier]) as store:
        found = store.load_many(keys[::-1], target, progress=progress)
    assert told == [[0, 1, 2], [3, 4, 5], [6, 8], [9, 10, 11]]
    assert found == ["memory"] * 6 + ["tier", None] + ["tier"] * 4


@pytest.mark.parametrize("last", range(4))
@pytest.mark.parametrize("kind", ["memory", "tier"])
def test_a_load_that_is_stopped_leaves_the_rest(tier, kind: str, last: int) -> None:
    keys = make_keys(NUM_BLOCKS)
    memory = MemoryTier(MemoryTierConfig(1 << 20))
    if kind == "memory":
        for key in keys:
            memory.put(key.name, memoryview(tier.records[key.block_hash]))
    target, told = Target(keys, nothing), []

    def progress(loaded: Sequence[int]) -> bool:
        told.append(loaded)
        return len(told) <= last

    with Store([memory, tier]) as store:
        found = store.load_many(keys, target, progress=progress)
        num_loaded = (last + 1) * BATCH
        assert found == [kind] * num_loaded + [None] * (NUM_BLOCKS - num_loaded)
        target.check(found)
        assert tier.num_gets <= (0 if kind == "memory" else last + 2)
        stats = store.stats()
        assert (stats.num_loads, stats.num_misses) == (num_loaded, 0)
        assert store.flush(30)
        target = Target(keys, nothing)
        found = store.load_many(keys, target)  # no claim is left on what was not loaded
        assert None not in found and store.stats().num_coalesced == 0
        target.check(found)
        assert store.check() == []


def test_two_loads_of_the_same_blocks_of_which_one_is_stopped(tier) -> None:
    """The other load waits for the stopped one's records, and then fetches them itself."""
    keys = make_keys(NUM_BLOCKS)
    other, others_target = threading.Event(), Target(keys, nothing)
    founds: list[list[str | None]] = []

    def progress(loaded: Sequence[int]) -> bool:
        thread.start()
        assert other.wait(30)
        return False

    with Store([MemoryTier(MemoryTierConfig(1 << 20)), tier]) as store:
        claim = store._loader._in_flight.claim

        def claimed(names):
            is_mine = claim(names)
            if threading.current_thread() is thread:
                other.set()
            return is_mine

        store._loader._in_flight.claim = claimed
        thread = threading.Thread(
            target=lambda: founds.append(store.load_many(keys, others_target))
        )
        first = store.load_many(keys, Target(keys, nothing), progress=progress)
        thread.join(30)
        assert first == ["tier"] * BATCH + [None] * (NUM_BLOCKS - BATCH)
        assert founds[0][BATCH:] == ["tier"] * (NUM_BLOCKS - BATCH) and None not in founds[0]
        others_target.check(founds[0])
        assert store.stats().num_coalesced == NUM_BLOCKS


# ---- buffers -----------------------------------------------------------------------------------


def test_buffers_are_used_again_and_few_are_kept() -> None:
    slabs = Slabs()
    first, second = slabs.take(5000), slabs.take(9000)
    assert first.memory.ctypes.data % 4096 == second.memory.ctypes.data % 4096 == 0
    slabs.give_back(first)
    slabs.give_back(second)
    assert slabs.take(6000) is second
    assert slabs.take(6000) is not first
    assert slabs.take(4000) is first
    for _ in range(9):
        slabs.give_back(Slab(np.empty(10, np.uint8)))
    assert len(slabs._free) == 4


def test_abandoned_buffers_are_not_used_again() -> None:
    slabs = Slabs()
    slab = slabs.take(5000)
    slab.abandon()
    slabs.give_back(slab)
    assert slabs.take(5000) is not slab


@pytest.mark.parametrize("how", ["one outcome", "all of it", "nothing"])
def test_what_came_too_late_is_written_to_no_buffer_in_use(tier, how) -> None:
    """A tier that goes on reading after the deadline writes to buffers that are no longer used."""
    keys = make_keys(NUM_BLOCKS)[:2]
    late: list[memoryview] = []

    def get_or_abandon_many(names, outs, *, deadline):
        outcomes = tier.get_many(names, outs)
        if how == "nothing":
            return outcomes
        late.extend(outs[1:])
        if how == "all of it":
            raise TierTimeout("late")
        return [outcomes[0], TierTimeout("late")]

    tier.get_or_abandon_many = get_or_abandon_many
    with Store([tier]) as store:
        first = Target(keys, nothing)
        found = store.load_many(keys, first)
        assert (
            found
            == {
                "one outcome": ["tier", None],
                "all of it": [None, None],
                "nothing": ["tier", "tier"],
            }[how]
        )
        first.check(found)
        del tier.get_or_abandon_many
        free = store._loader._slabs._free
        assert len(free) == (1 if how == "nothing" else 0)
        if how != "all of it":  # then the tier is down for a while
            second = Target(keys, nothing)
            found = store.load_many(keys, second)
            for out in late:
                out[:] = bytes(out.nbytes)
            assert found == ["tier", "tier"]
            second.check(found)


def test_promoted_records_keep_their_buffers(tier) -> None:
    """They are written to the faster tier after the load, while others load."""
    keys = make_keys(NUM_BLOCKS)
    gate = threading.Event()
    fast = DictTier("fast", lambda call: call == "put" and gate.wait(30))
    others = make_keys(NUM_BLOCKS, seed=1)
    for key in others:
        tier.records[key.block_hash] = bytes(make_record(key))
    with Store([fast, tier]) as store:
        for one in (keys, others):
            target = Target(one, nothing)
            found = store.load_many(one, target)
            assert found == ["tier"] * NUM_BLOCKS
            target.check(found)
        gate.set()
        assert store.flush(30)
    assert all(fast.records[key.block_hash] == make_record(key) for key in keys + others)
