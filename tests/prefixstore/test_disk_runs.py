"""Few statements change many slots, and each slot still holds its own record."""

import random
from pathlib import Path

import numpy as np
import pytest
from disk_tiers import Clock, open_tier

from prefixstore.block_key import BlockHash, RecordName
from prefixstore.tiers.disk import DiskTier
from prefixstore.tiers.disk.runs import Run, runs_of
from prefixstore.tiers.pages import PAGE_BYTES

NUM_SLOTS = 64
SLOT_BYTES = 2 * PAGE_BYTES


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tier(tmp_path: Path, clock: Clock):
    size = NUM_SLOTS * SLOT_BYTES
    tier = open_tier(tmp_path, clock=clock, capacity_bytes=size, slab_bytes=size // 2, ttl_s=1000)
    yield tier
    tier.close()


def record_of(name: RecordName, num_bytes: int) -> np.ndarray:
    source = np.random.default_rng(int.from_bytes(name.block_hash, "little"))
    return source.integers(0, 256, num_bytes, np.uint8)


def trace(tier: DiskTier) -> list[str]:
    statements: list[str] = []
    tier._index._writer._sql.set_trace_callback(statements.append)
    return statements


def test_a_run_ends_with_its_slab_at_a_gap_and_where_slots_differ() -> None:
    rows = [(2, 0, (1,), "f"), (1, 3, (1,), "b"), (1, 2, (1,), "a"), (1, 4, (2,), "c")]
    rows += [(1, 5, (2,), "d"), (1, 7, (2,), "e")]
    assert list(runs_of(rows)) == [
        Run(1, 2, 3, (1,), ["a", "b"]),
        Run(1, 4, 5, (2,), ["c", "d"]),
        Run(1, 7, 7, (2,), ["e"]),
        Run(2, 0, 0, (1,), ["f"]),
    ]
    assert list(runs_of([])) == []


def test_each_slot_of_a_run_gets_its_own_record(tier: DiskTier) -> None:
    """Random identities, sizes and hashes of odd lengths, evicted in a random order."""
    source = random.Random(0)
    held: dict[RecordName, int] = {}
    identities = [source.randbytes(16) for _ in range(2)]
    for _ in range(100):
        batch = {}
        for _ in range(source.randint(1, 24)):
            block_hash = BlockHash(source.randbytes(source.choice([16, 16, 16, 12, 20])))
            name = RecordName(source.choice(identities), block_hash)
            batch[name] = source.choice([SLOT_BYTES, SLOT_BYTES, SLOT_BYTES - 704, PAGE_BYTES + 1])
        records = [record_of(*item).data for item in batch.items()]
        assert tier.put_many(list(batch), records) == [None] * len(batch)
        held |= batch
        used = source.sample(list(held), min(len(held), 9))
        tier.get_many(used, [memoryview(bytearray(SLOT_BYTES)) for _ in used])
        there = [
            name
            for name, is_there in zip(held, tier.contains_many([*held]), strict=True)
            if is_there
        ]
        held = {name: held[name] for name in there}
        outs = [np.zeros(SLOT_BYTES, np.uint8) for _ in held]
        assert tier.get_many(list(held), [out.data for out in outs]) == list(held.values())
        for out, (name, num_bytes) in zip(outs, held.items(), strict=True):
            assert np.array_equal(out[:num_bytes], record_of(name, num_bytes))
        assert dict(tier.list_records()) == held
    assert len(held) > NUM_SLOTS // 2


def test_records_written_together_are_published_and_marked_by_one_statement(
    tier: DiskTier, clock: Clock
) -> None:
    names = [RecordName(bytes(16), BlockHash(bytes([n]) * 16)) for n in range(NUM_SLOTS // 2)]
    statements = trace(tier)
    tier.put_many(names, [record_of(name, SLOT_BYTES).data for name in names])
    clock.seconds += 1
    tier.get_many(names, [memoryview(bytearray(SLOT_BYTES)) for _ in names])
    other = RecordName(bytes(16), BlockHash(b"o" * 16))
    tier.put(other, record_of(other, SLOT_BYTES).data)
    updates = [s for s in statements if s.startswith("UPDATE") and "slots SET" in s]
    assert [s.partition("SET ")[2][:9] for s in updates] == [
        *("state = 1", "state = 2"),  # statements for 32 slots taken and published
        *("last_used", "state = 1", "state = 2"),  # and for marking use, together with another's
    ]


def test_of_a_run_only_the_record_of_a_block_that_is_there_gives_way(
    tmp_path: Path, tier: DiskTier, clock: Clock
) -> None:
    names = [RecordName(bytes(16), BlockHash(bytes([n]) * 16)) for n in range(8)]
    records = [record_of(name, SLOT_BYTES).data for name in names]
    publish = tier._index.publish_many

    def overtaken(*args):
        """Let another process publish one of the blocks first."""
        theirs = open_tier(tmp_path, clock=clock, capacity_bytes=NUM_SLOTS * SLOT_BYTES)
        theirs.put(names[3], records[3])
        theirs.close()
        return publish(*args)

    tier._index.publish_many = overtaken
    assert tier.put_many(names, records) == [None] * len(names)
    assert sorted(name for name, _ in tier.list_records()) == names
    outs = [np.zeros(SLOT_BYTES, np.uint8) for _ in names]
    assert tier.get_many(names, [out.data for out in outs]) == [SLOT_BYTES] * len(names)
    assert all(np.array_equal(out, record) for out, record in zip(outs, records, strict=True))
    assert tier.stats().num_records == len(names)
