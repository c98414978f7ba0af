"""Large puts are written in portions, several at a time; callers see no difference, whatever
fails."""

from pathlib import Path

import numpy as np
import pytest
from disk_tiers import open_tier
from test_disk_transfers import get_all, make_bytes, make_names

from prefixstore.errors import TierFull, TierTimeout
from prefixstore.tiers.disk import DiskTier, writer
from prefixstore.tiers.disk.index import SlotIndex
from prefixstore.tiers.disk.transfers import Transfers

MIB = 1 << 20
NUM_RECORDS = 10  # two per small portion


@pytest.fixture
def records() -> list[np.ndarray]:
    return [make_bytes(2 * MIB - 704, number) for number in range(NUM_RECORDS)]


@pytest.fixture
def small_portions(monkeypatch) -> None:
    monkeypatch.setattr(writer, "_PORTION_BYTES", 4 * MIB)


@pytest.fixture
def tier(tmp_path: Path):
    tier = open_tier(tmp_path, capacity_bytes=256 * MIB, slab_bytes=64 * MIB)
    yield tier
    tier.close()


def num_kept(tier: DiskTier, names, records) -> int:
    found = get_all(tier, names, records[0].size)
    kept = [n for n, data in enumerate(found) if data is not None]
    assert all(found[n] == records[n].tobytes() for n in kept)
    return len(kept)


@pytest.mark.parametrize(
    ("num_bytes", "num_records", "num_portions"),
    [(2 * MIB - 704, 10, 2), (MIB, 16, 1), (MIB, 17, 2), (64 * 1024, 256, 2), (64 * 1024, 257, 3)],
)
def test_a_large_batch_takes_two_transactions_a_portion(
    tier, num_bytes, num_records, num_portions
) -> None:
    names = make_names(num_records)
    records = [make_bytes(num_bytes, number) for number in range(num_records)]
    statements: list[str] = []
    tier._index._writer._sql.set_trace_callback(statements.append)
    assert tier.put_many(names, [record.data for record in records]) == [None] * num_records
    assert sum(s.startswith("BEGIN") for s in statements) == 2 * num_portions
    assert num_kept(tier, names, records) == num_records


@pytest.mark.usefixtures("small_portions")
def test_the_next_portion_is_allocated_while_one_is_written(tier, records, monkeypatch) -> None:
    order: list[str] = []

    def note(cls: type, call: str) -> None:
        run = getattr(cls, call)

        def noting(self, *args):
            order.append(call.partition("_")[0])
            return run(self, *args)

        monkeypatch.setattr(cls, call, noting)

    note(SlotIndex, "allocate_many")
    note(Transfers, "end_writing")
    tier.put_many(make_names(NUM_RECORDS), [record.data for record in records])
    assert order == ["allocate"] * 3 + ["end", "allocate"] * 2 + ["end"] * 3


@pytest.mark.usefixtures("small_portions")
def test_an_identity_keeps_to_its_quota_over_all_portions(tmp_path, records) -> None:
    """As with separate calls: the last records are kept."""
    tier = open_tier(tmp_path, capacity_bytes=64 * MIB, slab_bytes=32 * MIB, quota_bytes=6 * MIB)
    names = make_names(NUM_RECORDS)
    assert tier.put_many(names, [record.data for record in records]) == [None] * NUM_RECORDS
    assert tier.list_identities()[names[0].identity].num_bytes <= 6 * MIB
    assert tier.contains_many(names) == [False] * 7 + [True] * 3
    assert num_kept(tier, names, records) == 3
    tier.close()


@pytest.mark.usefixtures("small_portions")
@pytest.mark.parametrize("error", [TierFull("no room"), TierTimeout("too late")])
def test_portions_before_one_that_fails_are_kept(tier, records, monkeypatch, error) -> None:
    names = make_names(NUM_RECORDS)
    allocate, num_calls = SlotIndex.allocate_many, 0

    def failing(self, *args):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            raise error
        return allocate(self, *args)

    monkeypatch.setattr(SlotIndex, "allocate_many", failing)
    views = [record.data for record in records]
    if isinstance(error, TierFull):  # full for one record need not be full for the next
        assert tier.put_many(names, views) == [None] * 6 + [error] * 2 + [None] * 2
        assert num_kept(tier, names, records) == NUM_RECORDS - 2
    else:
        with pytest.raises(TierTimeout):
            tier.put_many(names, views)
        assert num_kept(tier, names, records) == 6
    monkeypatch.undo()
    assert tier.put_many(names, views) == [None] * NUM_RECORDS
    assert num_kept(tier, names, records) == NUM_RECORDS


@pytest.mark.usefixtures("small_portions")
def test_what_another_published_meanwhile_stands(tmp_path, records) -> None:
    """Both processes then have it, and no slot is used twice."""
    names = make_names(NUM_RECORDS)
    tiers = [open_tier(tmp_path, capacity_bytes=64 * MIB, slab_bytes=32 * MIB) for _ in range(2)]
    mine, theirs = tiers
    publish = mine._index.publish_many
    num_calls = 0

    def overtaken(refs, *args):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:  # publish one record of this portion first
            assert theirs.put_many([refs[1].name], [records[names.index(refs[1].name)].data]) == [
                None
            ]
        return publish(refs, *args)

    mine._index.publish_many = overtaken
    assert mine.put_many(names, [record.data for record in records]) == [None] * NUM_RECORDS
    assert num_calls == 5
    for tier in tiers:
        assert num_kept(tier, names, records) == NUM_RECORDS == tier.stats().num_records
        tier.close()


@pytest.mark.usefixtures("small_portions")
def test_all_portions_are_waited_for_where_publishing_fails(tier, records, monkeypatch) -> None:
    """The caller's memory is not read after the call."""
    ended: list[int] = []
    end = Transfers.end_writing

    def noting(self, writing):
        outcomes = end(self, writing)
        ended.append(len(outcomes))
        return outcomes

    def failing(*_):
        raise TierTimeout("too late")

    monkeypatch.setattr(Transfers, "end_writing", noting)
    monkeypatch.setattr(SlotIndex, "publish_many", failing)
    names, views = make_names(NUM_RECORDS), [record.data for record in records]
    with pytest.raises(TierTimeout):
        tier.put_many(names, views)
    assert ended == [2] * 3  # the three that were under way
    monkeypatch.undo()
    assert num_kept(tier, names, records) == 0
    assert tier.put_many(names, views) == [None] * NUM_RECORDS
    assert num_kept(tier, names, records) == NUM_RECORDS
