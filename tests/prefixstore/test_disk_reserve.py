"""Slots that the disk tier takes ahead for puts in quick succession."""

import random
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from disk_tiers import MIB, Clock, get_all, make_bytes, open_tier

from prefixstore.block_key import BlockHash, RecordName
from prefixstore.errors import TierTimeout, TierUnavailable
from prefixstore.record_header import (
    FIXED,
    FIXED_BYTES,
    MAGIC,
    VERSION,
    FixedHeader,
    header_crc,
)
from prefixstore.tiers.base import Swept
from prefixstore.tiers.disk import DiskTier
from prefixstore.tiers.disk.files import SlabFiles
from prefixstore.tiers.disk.index import SlotIndex
from prefixstore.tiers.disk.reserve import SlotReserve
from prefixstore.tiers.disk.transfers import Transfers

RECORD_BYTES = 64 << 10
BATCH = 16  # records per put: a megabyte, and a sixteenth of the tier
NUM_BATCHES = 16
CAPACITY = NUM_BATCHES * BATCH * RECORD_BYTES
MINE, THEIRS = b"m" * 16, b"t" * 16  # identities
_NUMBERS = (
    *("codec", "dtype", "flags", "num_layers", "num_kv_heads", "head_dim", "block_size"),
    *("num_tokens", "layer_group", "crc", "latent_dim"),
)


@pytest.fixture(autouse=True)
def _slow_transfers(monkeypatch) -> None:
    """Slow transfers down, so that a transaction fits beside each on any disk."""
    monkeypatch.setattr(Transfers, "is_over", lambda *_: False)


class TickingClock(Clock):
    """A clock that advances a little with each reading: puts follow each other closely."""

    def __call__(self) -> float:
        self.seconds += 1e-3
        return super().__call__()


@pytest.fixture
def clock() -> Clock:
    return TickingClock()


@pytest.fixture
def tier(tmp_path: Path, clock: Clock):
    tier = open_tier(tmp_path, clock=clock, capacity_bytes=CAPACITY)
    yield tier
    tier.close()


def names_of(batch: int, identity: bytes = MINE, count: int = BATCH) -> list[RecordName]:
    return [
        RecordName(
            identity, BlockHash(identity[:8] + batch.to_bytes(4, "big") + n.to_bytes(4, "big"))
        )
        for n in range(count)
    ]


def record_of(name: RecordName, num_bytes: int = RECORD_BYTES) -> np.ndarray:
    """A record: a header that names it, and its own bytes."""
    data = make_bytes(num_bytes, int.from_bytes(name.block_hash, "big"))
    header = FixedHeader(
        magic=MAGIC,
        version=VERSION,
        header_bytes=FIXED_BYTES,
        payload_bytes=num_bytes - FIXED_BYTES,
        identity=name.identity,
        block_hash=name.block_hash,
        parent_hash=bytes(16),
        reserved=bytes(10),
        **dict.fromkeys(_NUMBERS, 0),
    )
    crc = header_crc(memoryview(FIXED.pack(*header)))
    data[:FIXED_BYTES] = np.frombuffer(FIXED.pack(*header._replace(crc=crc)), np.uint8)
    return data


def put(tier: DiskTier, names: list[RecordName], priority: int = 0) -> None:
    records = [record_of(name).data for name in names]
    assert tier.put_many(names, records, priority=priority) == [None] * len(names)


def num_right(tier: DiskTier, names: list[RecordName]) -> int:
    found = get_all(tier, names, RECORD_BYTES)
    kept = [(name, data) for name, data in zip(names, found, strict=True) if data is not None]
    assert all(data == record_of(name).tobytes() for name, data in kept)
    return len(kept)


def num_taken(path: Path) -> int:
    """Slots without a readable record that no other writer can take."""
    with sqlite3.connect(path / "index.sqlite") as sql:
        (count,) = sql.execute("SELECT count(*) FROM slots WHERE state = 1").fetchone()
    sql.close()
    return count


def note_calls(monkeypatch) -> list[str]:
    order: list[str] = []

    def note(cls: type, call: str) -> None:
        run = getattr(cls, call)

        def noting(self, *args, **kwargs):
            order.append(call.partition("_")[0])
            return run(self, *args, **kwargs)

        monkeypatch.setattr(cls, call, noting)

    for call in ("allocate_many", "take_slots", "publish_many"):
        note(SlotIndex, call)
    note(Transfers, "begin_writing")
    return order


def test_from_the_third_put_on_no_transaction_comes_before_the_transfer(
    tier, tmp_path, monkeypatch
) -> None:
    order = note_calls(monkeypatch)
    for batch in range(4):
        put(tier, names_of(batch))
    assert order == [
        *("allocate", "begin", "publish"),
        *("allocate", "begin", "take", "publish"),
        *("begin", "take", "publish"),
        *("begin", "take", "publish"),
    ]
    assert num_taken(tmp_path) == BATCH
    for batch in range(4):
        assert num_right(tier, names_of(batch)) == BATCH


def test_nothing_gives_way_while_there_is_room(tier) -> None:
    for batch in range(NUM_BATCHES):
        put(tier, names_of(batch))
    assert tier.stats().num_evictions == 0
    for batch in range(NUM_BATCHES):
        assert num_right(tier, names_of(batch)) == BATCH


def test_in_a_full_tier_one_put_more_gives_way_than_came(tier, monkeypatch) -> None:
    for batch in range(NUM_BATCHES + 1):
        put(tier, names_of(batch))
    order = note_calls(monkeypatch)
    for batch in range(NUM_BATCHES + 1, 3 * NUM_BATCHES):
        put(tier, names_of(batch))
        assert tier.stats().num_records == (NUM_BATCHES - 1) * BATCH
    assert "allocate" not in order
    kept = [num_right(tier, names_of(batch)) for batch in range(3 * NUM_BATCHES)]
    assert kept == [0] * (2 * NUM_BATCHES + 1) + [BATCH] * (NUM_BATCHES - 1)
    assert tier.check() == []


def test_records_of_a_higher_priority_stay(tier) -> None:
    for batch in range(NUM_BATCHES - 2):
        put(tier, names_of(batch), priority=3)
    for batch in range(100, 110):
        put(tier, names_of(batch), priority=1)
    for batch in range(NUM_BATCHES - 2):
        assert num_right(tier, names_of(batch)) == BATCH


def test_other_puts_find_free_what_was_taken(tier, tmp_path, monkeypatch) -> None:
    for batch in range(3):
        put(tier, names_of(batch))
    assert num_taken(tmp_path) == BATCH
    order = note_calls(monkeypatch)
    put(tier, names_of(3, count=2 * BATCH))  # these use them, and need more
    assert order[0] == "allocate"
    for batch in range(10, 13):
        put(tier, names_of(batch))
    name = names_of(99)[0]
    assert tier.put_many([name], [record_of(name, 5000).data]) == [None]
    assert num_taken(tmp_path) == 0
    assert tier.check() == []


def test_what_another_put_left_is_never_taken_for_one_of_another_size(tier, monkeypatch) -> None:
    """Even if a put of records of another size comes between, in whichever thread order."""
    for batch in range(3):
        put(tier, names_of(batch))
    put(tier, names_of(3)[:10])  # six slots remain
    large = [names_of(100 + batch)[:8] for batch in range(3)]
    records = [[record_of(name, 2 * RECORD_BYTES) for name in names] for names in large]
    for number, (names, rows) in enumerate(zip(large, records, strict=True)):
        with monkeypatch.context() as patched:
            if number < 2:
                patched.setattr(SlotReserve, "allocate", lambda *_: None)
            assert tier.put_many(names, [row.data for row in rows]) == [None] * len(names)
    assert all(num_right(tier, names_of(batch)) == BATCH for batch in range(3))
    for names, rows in zip(large, records, strict=True):
        assert get_all(tier, names, 2 * RECORD_BYTES) == [row.tobytes() for row in rows]
    assert tier.check() == []


def test_records_that_are_there_take_no_slot(tier, tmp_path) -> None:
    for batch in range(3):
        put(tier, names_of(batch))
    put(tier, names_of(2))
    assert tier.stats().num_puts == 3 * BATCH
    put(tier, [*names_of(2)[:10], *names_of(3)[10:]])
    assert tier.stats().num_puts == 3 * BATCH + 6
    assert num_taken(tmp_path) == BATCH
    assert num_right(tier, names_of(3)) == 6
    assert num_right(tier, names_of(2)) == BATCH


def test_they_are_not_used_when_their_lease_has_run_for_a_while(
    tier, tmp_path, clock, monkeypatch
) -> None:
    for batch in range(3):
        put(tier, names_of(batch))
    order = note_calls(monkeypatch)
    clock.seconds += 16  # of a lease of 60
    put(tier, names_of(3))
    assert order == ["allocate", "begin", "publish"]  # nor does it continue the earlier puts
    assert num_taken(tmp_path) == 0


@pytest.mark.parametrize("settings", [{"quota_bytes": 2 * MIB}, {"capacity_bytes": CAPACITY // 2}])
def test_nothing_is_taken_ahead_with_a_quota_or_little_room(tmp_path, settings) -> None:
    tier = open_tier(tmp_path, **{"capacity_bytes": CAPACITY, **settings})
    for batch in range(4):
        put(tier, names_of(batch))
        assert num_taken(tmp_path) == 0
    tier.close()


def test_closing_gives_reserved_slots_back(tmp_path) -> None:
    for _ in range(2):
        tier = open_tier(tmp_path, capacity_bytes=CAPACITY)
        for batch in range(3):
            put(tier, names_of(batch))
            for name in names_of(batch):
                tier.delete(name)
        assert num_taken(tmp_path) == BATCH
        tier.close()
        assert num_taken(tmp_path) == 0


def test_a_sweep_gives_them_back_and_does_not_count_them(tier, tmp_path) -> None:
    for batch in range(3):
        put(tier, names_of(batch))
    assert num_taken(tmp_path) == BATCH
    assert tier.sweep() == Swept()
    assert num_taken(tmp_path) == 0
    assert tier.check(fix=True) == []


def test_those_of_a_process_that_died_are_taken_over(tmp_path, clock) -> None:
    dead = open_tier(tmp_path, clock=clock, capacity_bytes=CAPACITY)
    for batch in range(3):
        put(dead, names_of(batch))
    other = open_tier(tmp_path, clock=clock, capacity_bytes=CAPACITY)
    assert num_taken(tmp_path) == BATCH
    clock.seconds += 61
    assert other.sweep() == Swept(0, BATCH, BATCH * RECORD_BYTES)
    assert num_taken(tmp_path) == 0
    put(other, names_of(3))
    put(dead, names_of(4))  # it was not dead, only slow
    for tier in (dead, other):
        assert all(num_right(tier, names_of(batch)) == BATCH for batch in range(5))
        assert tier.check() == []
        tier.close()


def test_they_are_not_used_after_another_process_changed_anything(
    tier, tmp_path, clock, monkeypatch
) -> None:
    other = open_tier(tmp_path, clock=clock, capacity_bytes=CAPACITY)
    for batch in range(3):
        put(tier, names_of(batch))
    assert num_taken(tmp_path) == BATCH
    put(other, names_of(3))
    order = note_calls(monkeypatch)
    put(tier, names_of(3))  # all of them exist already
    put(tier, names_of(4))
    assert order[0] == "allocate"
    for batch in range(5, 9):  # two sizes alternate: nothing is taken ahead
        put([tier, other][batch % 2], names_of(batch))
        assert batch == 5 or num_taken(tmp_path) == 0
    assert all(num_right(other, names_of(batch)) == BATCH for batch in range(9))
    other.close()


def delete_identity(tier: DiskTier) -> None:
    tier.delete_identity(THEIRS)


def delete_records(tier: DiskTier) -> None:
    tier.delete_many([name for batch in range(NUM_BATCHES) for name in names_of(batch, THEIRS)])


@pytest.mark.parametrize("delete", [delete_identity, delete_records])
@pytest.mark.parametrize("who", ["mine", "other"])
def test_what_is_deleted_is_gone_from_them_too(tmp_path, clock, who, delete) -> None:
    """A rebuilt index does not find it, not even in slots taken ahead that still hold its bytes."""
    tier = open_tier(tmp_path, clock=clock, capacity_bytes=CAPACITY)
    other = open_tier(tmp_path, clock=clock, capacity_bytes=CAPACITY)
    for batch in range(NUM_BATCHES):
        put(tier, names_of(batch, THEIRS))
    for batch in range(3):
        put(tier, names_of(batch))
    assert num_taken(tmp_path) == BATCH
    delete({"mine": tier, "other": other}[who])
    tier.close()
    other.close()
    open_tier(tmp_path, clock=clock, capacity_bytes=CAPACITY).close()  # wipes leftovers
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    tier = open_tier(tmp_path, clock=clock, capacity_bytes=CAPACITY)
    assert {name.identity for name, _ in tier.list_records()} == {MINE}
    assert all(num_right(tier, names_of(batch)) == BATCH for batch in range(3))
    tier.close()


def test_a_put_does_not_fail_because_none_can_be_taken(tier, monkeypatch, caplog) -> None:
    def busy(*_, **__):
        raise TierTimeout("locked")

    def stuck(*_):
        raise TierUnavailable("read-only")

    with monkeypatch.context() as patched:
        patched.setattr(SlotIndex, "take_slots", busy)
        for batch in range(3):
            put(tier, names_of(batch))
    # slabs of another size must be dropped to take slots ahead
    for batch in range(3, 3 * NUM_BATCHES):
        put(tier, names_of(batch))
    take = SlotIndex.take_slots
    size = 2 * RECORD_BYTES
    names = [names_of(100 + n)[:8] for n in range(3)]
    with monkeypatch.context() as patched:

        def taking(self, *args, **kwargs):
            patched.setattr(SlabFiles, "remove", stuck)
            return take(self, *args, **kwargs)

        patched.setattr(SlotIndex, "take_slots", taking)
        for some in names[:2]:
            records = [record_of(name, size).data for name in some]
            assert tier.put_many(some, records) == [None] * len(some)
    assert "stay until a sweep: read-only" in caplog.text
    assert tier.sweep().num_orphans == 1
    assert tier.check() == []


@pytest.mark.parametrize("seed", range(3))
def test_random_calls_beside_a_dict(tmp_path, seed, monkeypatch) -> None:
    """Random calls of two tiers on one directory: whatever is read is right."""
    choice = random.Random(seed)
    tiers = [open_tier(tmp_path, capacity_bytes=CAPACITY) for _ in range(2)]
    order = note_calls(monkeypatch)
    there: set[int] = set()
    tier = tiers[0]
    for _ in range(120):
        if choice.random() < 0.1:
            tier = choice.choice(tiers)
        batch = choice.randrange(24)
        what = choice.random()
        if what < 0.75:
            put(tier, names_of(batch, count=choice.choice([BATCH, BATCH, BATCH, 5])))
            there.add(batch)
        elif what < 0.85:
            tier.delete_many(names_of(batch))
            there.discard(batch)
        elif what < 0.9:
            there.clear()
            tier.delete_identity(MINE)
        elif what < 0.95:
            assert tier.sweep().num_orphans == 0
        else:
            found = [batch for batch in range(24) if num_right(tier, names_of(batch))]
            assert there.issuperset(found)
        assert tier.stats().used_bytes <= CAPACITY
    assert order.count("begin") > order.count("allocate")  # some were used
    for tier in tiers:
        assert tier.check() == []
        tier.close()
    tier = open_tier(tmp_path, capacity_bytes=CAPACITY)  # wipes what both gave up
    assert num_taken(tmp_path) == 0
    assert tier.check() == []
    tier.close()
