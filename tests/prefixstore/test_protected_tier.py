"""Protected tiers: tampering with the tier below, other keys, changes of keys, and the store."""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence

import pytest
from sample_blocks import IDENTITY, LARGE_LAYOUT, LAYOUT, load_block, make_keys, make_payload
from sample_blocks import make_record as make_bytearray
from tier_kinds import PAGE, get, held, put, put_many

from prefixstore.block_key import BlockKey, RecordName
from prefixstore.errors import BlockCorrupted, TierTimeout
from prefixstore.keys import ProtectionConfig
from prefixstore.protection import RecordKey, make_record_keys
from prefixstore.record_header import AUTHENTICATED, SEALED, TRAILER_BYTES
from prefixstore.record_layout import RecordLayout
from prefixstore.store import Store
from prefixstore.store.block_sources import HostBlock
from prefixstore.tiers import scratch
from prefixstore.tiers.base import ReadOutcome, Tier
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig
from prefixstore.tiers.protected import ProtectedTier

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
CONFIGS = {
    "authenticated": (ProtectionConfig(OLD), RecordKey(OLD, AUTHENTICATED)),
    "sealed": (ProtectionConfig(seal_key=OLD), RecordKey(OLD, SEALED)),
}


class CountingTier(MemoryTier):
    """A memory tier that records how it is read."""

    def __init__(self, capacity_bytes: int = 1 << 24) -> None:
        super().__init__(MemoryTierConfig(capacity_bytes))
        self.reads: list[int] = []

    def get_many(self, names, outs, *, offsets=None, deadline=None) -> list[ReadOutcome]:
        self.reads.append(len(names))
        return super().get_many(names, outs, offsets=offsets, deadline=deadline)


@pytest.fixture
def below() -> CountingTier:
    return CountingTier()


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def guarded(request, below) -> tuple[ProtectedTier, RecordKey]:
    """A protected tier, and its key."""
    config, record_key = request.param
    return ProtectedTier(below, config), record_key


def make_record(key: BlockKey) -> bytes:
    return bytes(make_bytearray(key))


def stored(tier: Tier, name: RecordName) -> bytes:
    out = bytearray(1 << 20)
    num_bytes = tier.get(name, memoryview(out))
    assert num_bytes is not None
    return bytes(out[:num_bytes])


def replace(tier: Tier, name: RecordName, data: bytes) -> None:
    """Replace a record, as someone can who may write to the medium."""
    tier.delete(name)
    tier.put(name, memoryview(data))


def save(store: Store, keys: Sequence[BlockKey]) -> None:
    for key in keys:
        assert store.save(key, HostBlock(make_payload(key)))
    assert store.flush(10)


# ---- what others write -----------------------------------------------------------------------


def test_refuses_a_record_under_the_name_of_another(guarded, below):
    tier, record_key = guarded
    first, second = make_keys(2)
    put_many(tier, [first, second])
    replace(
        below,
        record_key.stored_name(first.name),
        stored(below, record_key.stored_name(second.name)),
    )
    with pytest.raises(BlockCorrupted, match=r"memory: name: expected .*, got "):
        get(tier, first)
    assert get(tier, second) == make_record(second)


def test_refuses_what_is_cut_off_or_not_protected(guarded, below):
    tier, record_key = guarded
    (key,) = make_keys(1)
    put(tier, key)
    name = record_key.stored_name(key.name)
    good = stored(below, name)
    for wrong, message in (
        (good[:-1], r"record: expected 3416 bytes, got 3415"),
        (good[:40], r"record: expected at least 96 bytes, got 40"),
        (b"", r"record: expected at least 96 bytes, got 0"),
        (make_record(key), r"protection: expected .* got a plain record"),
    ):
        replace(below, name, wrong)
        with pytest.raises(BlockCorrupted, match=message):
            get(tier, key)
        (part,) = tier.get_many([key.name], [memoryview(bytearray(9))], offsets=[0])
        assert isinstance(part, BlockCorrupted)
    replace(below, name, good)
    assert get(tier, key) == make_record(key)


def test_refuses_parts_of_a_record_that_is_wrong_elsewhere(guarded, below):
    tier, record_key = guarded
    (key,) = make_keys(1)
    put(tier, key)
    name = record_key.stored_name(key.name)
    wrong = bytearray(stored(below, name))
    wrong[-TRAILER_BYTES - 1] ^= 1
    replace(below, name, wrong)
    out = memoryview(bytearray(9))
    (outcome,) = tier.get_many([key.name], [out], offsets=[1000])
    assert isinstance(outcome, BlockCorrupted) and "tag" in str(outcome)
    assert bytes(out) == bytes(9)


def test_a_length_that_is_made_up_costs_no_memory(guarded, below):
    tier, record_key = guarded
    (key,) = make_keys(1)
    put(tier, key)
    name = record_key.stored_name(key.name)
    wrong = bytearray(stored(below, name))
    struct.pack_into("<Q", wrong, 24, 1 << 60)
    replace(below, name, wrong)
    (outcome,) = tier.get_many([key.name], [memoryview(bytearray(9))], offsets=[0])
    assert isinstance(outcome, BlockCorrupted) and "at most" in str(outcome)


def test_an_older_record_of_the_same_block_may_come_back(guarded, below):
    """Whoever kept it can put it back: it is authentic, and records carry no date."""
    tier, record_key = guarded
    (key,) = make_keys(1)
    put(tier, key)
    older = stored(below, record_key.stored_name(key.name))
    tier.delete(key.name)
    put(tier, key)
    replace(below, record_key.stored_name(key.name), older)
    assert get(tier, key) == make_record(key)


def test_keeps_no_damaged_record(guarded, below):
    tier, _ = guarded
    first, second = make_keys(2)
    damaged = bytearray(make_record(first))
    damaged[100] ^= 1
    outcomes = tier.put_many(
        [first.name, second.name], [memoryview(damaged), memoryview(make_record(second))]
    )
    assert isinstance(outcomes[0], BlockCorrupted) and outcomes[1] is None
    assert held(tier, [first, second]) == [False, True]


# ---- other keys ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ProtectionConfig(NEW), ProtectionConfig(seal_key=NEW), None])
def test_who_has_another_key_or_none_neither_finds_nor_deletes(guarded, below, config):
    mine, _ = guarded
    keys = make_keys(3)
    put_many(mine, keys)
    other = below if config is None else ProtectedTier(below, config)
    with Store([other]) as store:
        out = bytearray(LAYOUT.block_bytes)
        assert [load_block(store, key, out) for key in keys] == [None] * 3
        (use,) = store.stats().tiers
        assert (use.num_misses, use.num_corrupted, use.num_errors) == (3, 0, 0)
        assert other.delete_many([key.name for key in keys]) == [False] * 3
        other.delete_identity(IDENTITY)
        save(store, keys[:1])  # both keys have written one now
        assert [load_block(store, key, out) for key in keys] == ["memory", None, None]
        assert [get(mine, key) for key in keys] == [make_record(key) for key in keys]


def test_a_store_counts_and_deletes_what_others_wrote_and_writes_it_anew(guarded, below):
    tier, record_key = guarded
    keys = make_keys(2)
    with Store([tier]) as store:
        save(store, keys)
        name = record_key.stored_name(keys[0].name)
        wrong = bytearray(stored(below, name))
        wrong[200] ^= 4
        replace(below, name, wrong)
        out = bytearray(LAYOUT.block_bytes)
        assert [load_block(store, key, out) for key in keys] == [None, "memory"]
        (use,) = store.stats().tiers
        assert (use.num_hits, use.num_misses, use.num_corrupted) == (1, 1, 1)
        assert held(tier, keys) == [False, True]
        save(store, keys[:1])
        assert load_block(store, keys[0], out) == "memory"
        assert out == bytes(make_payload(keys[0]))


def test_a_store_counts_a_damaged_record_that_was_to_be_written(guarded):
    tier, _ = guarded
    (key,) = make_keys(1)
    damaged = bytearray(make_record(key))
    damaged[100] ^= 1
    fast = MemoryTier(MemoryTierConfig(1 << 20, name="fast"))
    with Store([fast, tier]) as store:
        fast.put(key.name, memoryview(damaged))
        save(store, [key])  # fast has it already, and passes it on
        assert store.stats().tiers[1].num_corrupted == 1
        assert not tier.contains(key.name)


# ---- change of keys --------------------------------------------------------------------------


def changes() -> list[tuple[ProtectionConfig, ProtectionConfig, ProtectionConfig]]:
    return [
        (ProtectionConfig(OLD), ProtectionConfig([NEW, OLD]), ProtectionConfig(NEW)),
        (
            ProtectionConfig(seal_key=OLD),
            ProtectionConfig(seal_key=[NEW, OLD]),
            ProtectionConfig(seal_key=NEW),
        ),
        (ProtectionConfig(OLD), ProtectionConfig(OLD, OLD), ProtectionConfig(seal_key=OLD)),
    ]


@pytest.mark.parametrize(
    ("before", "meanwhile", "after"), changes(), ids=["auth_key", "seal_key", "auth to seal"]
)
def test_keys_change_without_a_miss(below, before, meanwhile, after):
    keys = make_keys(4)
    put_many(ProtectedTier(below, before), keys[:2])
    tier = ProtectedTier(below, meanwhile)
    assert held(tier, keys) == [True, True, False, False]
    put_many(tier, keys[2:])
    outs = [memoryview(bytearray(LAYOUT.record_bytes)) for _ in keys]
    assert tier.get_many([key.name for key in keys], outs) == [LAYOUT.record_bytes] * 4
    assert [bytes(out) for out in outs] == [make_record(key) for key in keys]
    parts = [memoryview(bytearray(10)) for _ in keys]
    assert tier.get_many([key.name for key in keys], parts, offsets=[50] * 4) == [10] * 4
    assert [bytes(part) for part in parts] == [make_record(key)[50:60] for key in keys]
    assert held(ProtectedTier(below, before), keys) == [True, True, False, False]
    assert held(ProtectedTier(below, after), keys) == [False, False, True, True]
    assert tier.pin_many([key.name for key in keys]) == [True] * 4
    assert tier.delete_many([keys[0].name, keys[2].name]) == [True, True]
    assert held(tier, keys) == [False, True, False, True]
    assert tier.list_identities()[IDENTITY].num_records == 1
    tier.delete_identity(IDENTITY)
    assert held(tier, keys) == [False] * 4
    assert below.stats().num_records == 0


def test_one_key_that_gets_no_answer_hides_nothing_that_another_finds(below):
    keys = make_keys(3)
    put_many(ProtectedTier(below, ProtectionConfig(OLD)), keys[:1])
    put_many(ProtectedTier(below, ProtectionConfig(NEW)), keys[1:2])
    tier, names = ProtectedTier(below, ProtectionConfig([NEW, OLD])), [key.name for key in keys]
    ask, late = below.contains_many, TierTimeout("late")
    answered: list[object] = []

    def contains_many(asked, *, deadline=None):
        how = answered.pop(0)
        if how == "raises":
            raise late
        answers = ask(asked, deadline=deadline)
        return [late if how == "no" and answer is False else answer for answer in answers]

    below.contains_many = contains_many
    for how, expected in (
        (["yes", "yes"], [True, True, False]),
        (["no", "yes"], [True, True, late]),
        (["yes", "no"], [True, True, late]),
        (["raises", "yes"], [True, late, late]),
        (["yes", "raises"], [late, True, late]),
    ):
        answered[:] = how
        assert tier.contains_many(names) == expected
    answered[:] = ["raises", "raises"]
    with pytest.raises(TierTimeout):
        tier.contains_many(names)


def test_what_is_listed_under_no_identity_of_ours_can_be_forgotten(below):
    old, new = (ProtectedTier(below, ProtectionConfig(seal_key=key)) for key in (OLD, NEW))
    put_many(old, make_keys(2))
    (identity,) = new.list_identities()
    assert identity != IDENTITY and list(old.list_identities()) == [IDENTITY]
    new.delete_identity(identity)
    assert below.stats().num_records == 0


def test_the_first_key_writes_and_sealing_goes_first():
    keys = make_record_keys(ProtectionConfig([OLD, NEW], [NEW]))
    assert [(key.protection.flag, key.protection) for key in keys] == [
        (flag, RecordKey(secret, flag).protection)
        for secret, flag in ((NEW, SEALED), (OLD, AUTHENTICATED), (NEW, AUTHENTICATED))
    ]


# ---- buffers and batches ---------------------------------------------------------------------


def test_a_buffer_with_room_is_read_once_and_a_tight_one_twice(guarded, below):
    tier, _ = guarded
    keys = make_keys(3)
    put_many(tier, keys)
    names = [key.name for key in keys]
    for room, reads in ((TRAILER_BYTES, [3]), (0, [3, 3]), (TRAILER_BYTES - 1, [3, 3])):
        below.reads.clear()
        outs = [memoryview(bytearray(LAYOUT.record_bytes + room)) for _ in keys]
        assert tier.get_many(names, outs) == [LAYOUT.record_bytes] * 3
        assert below.reads == reads
        for key, out in zip(keys, outs, strict=True):
            assert out[: LAYOUT.record_bytes] == make_record(key)


def test_a_store_reads_each_record_once(guarded, below):
    tier, _ = guarded
    # 64 bytes less than whole pages: the store's rows are longer
    pages = RecordLayout(31, 1, 16, 16, "float16")
    assert pages.max_record_bytes == pages.record_bytes == 8 * PAGE - 64
    keys = make_keys(3) + make_keys(3, pages, seed=1)
    with Store([tier]) as store:
        save(store, keys)
        below.reads.clear()
        for key in keys:
            out = bytearray(key.layout.block_bytes)
            assert load_block(store, key, out) == "memory"
            assert out == bytes(make_payload(key))
        assert below.reads == [1] * 6
        # and so does the writer of a slower tier
        slow = MemoryTier(MemoryTierConfig(1 << 24, name="slow"))
        with Store([tier, slow]) as two:
            below.reads.clear()
            save(two, keys)
            assert sum(below.reads) == 6 and slow.stats().num_records == 6


def test_batches_larger_than_the_scratch_memory(guarded, monkeypatch):
    tier, _ = guarded
    monkeypatch.setattr(scratch, "BATCH_BYTES", 20_000)
    keys = make_keys(7) + make_keys(2, LARGE_LAYOUT) + make_keys(3, seed=1)
    put_many(tier, keys)
    outs = [memoryview(bytearray(key.layout.record_bytes)) for key in keys]
    names = [key.name for key in keys]
    assert tier.get_many(names, outs) == [key.layout.record_bytes for key in keys]
    assert [bytes(out) for out in outs] == [make_record(key) for key in keys]
    parts = [memoryview(bytearray(300)) for _ in keys]
    assert tier.get_many(names, parts, offsets=[3000] * 12) == [300] * 12
    assert [bytes(part) for part in parts] == [make_record(key)[3000:3300] for key in keys]


# ---- disk, and what is said ------------------------------------------------------------------


def test_a_disk_finds_protected_records_when_its_index_is_lost(tmp_path):
    keys = make_keys(4)
    config, protection = DiskTierConfig(tmp_path, 1 << 20), CONFIGS["sealed"][0]
    tier = ProtectedTier(DiskTier(config), protection)
    put_many(tier, keys)
    tier.close()
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    tier = ProtectedTier(DiskTier(config), protection)
    assert [get(tier, key) for key in keys] == [make_record(key) for key in keys]
    assert tier.check() == []
    tier.close()
    raw = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for key in keys:
        assert key.block_hash not in raw and key.identity not in raw
        assert key.tokens[:2].tobytes() not in raw
        assert bytes(make_payload(key))[:16] not in raw


def test_nothing_that_is_said_has_a_key_in_it(guarded, below, caplog):
    tier, record_key = guarded
    (key,) = make_keys(1)
    caplog.set_level(logging.DEBUG)
    put(tier, key)
    name = record_key.stored_name(key.name)
    replace(below, name, make_record(key))
    with Store([tier]) as store:
        assert load_block(store, key, bytearray(LAYOUT.block_bytes)) is None
    said = caplog.text + repr(tier) + repr(vars(tier))
    assert "got a plain record" in said
    assert OLD.hex() not in said and repr(OLD)[2:-1] not in said
