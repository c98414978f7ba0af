"""A damaged index of the disk tier: rebuilt from the slabs, mended in place, or left alone."""

import sqlite3
from contextlib import suppress

import numpy as np
import pytest
from disk_tiers import count_right, damage_order_of_use, open_tier, put
from sample_blocks import make_keys

from prefixstore.errors import TierUnavailable


@pytest.mark.parametrize(
    "damage",
    ["missing", "garbage", "empty", "damaged page", "other tables", "no text"],
)
def test_a_lost_index_is_rebuilt_from_the_slabs(tmp_path, damage):
    keys = make_keys(40)
    tier = open_tier(tmp_path)
    put(tier, keys)
    tier.delete(keys[0].name)
    tier.close()
    index = tmp_path / "index.sqlite"
    size = index.stat().st_size
    match damage:
        case "missing":
            index.unlink()
        case "garbage":
            index.write_bytes(np.random.default_rng(0).bytes(size))
        case "empty":
            index.write_bytes(b"")
        case "damaged page":
            with index.open("r+b") as file:
                file.seek(4096)
                file.write(np.random.default_rng(0).bytes(size - 4096))
        case "other tables":
            index.unlink()
            with sqlite3.connect(index) as sql:
                sql.execute("CREATE TABLE strangers (name TEXT)")
            sql.close()
        case "no text":  # SQLite's message quotes bytes that are not UTF-8
            damaged = index.read_bytes().replace(b"WITHOUT ROWID", b"WITHOUT \xff\xfeWID")
            index.write_bytes(damaged)
    tier = open_tier(tmp_path)
    assert tier.check() == []
    assert count_right(tier, keys) == 39  # what was deleted stays deleted
    assert not tier.contains(keys[0].name)
    put(tier, keys)
    assert count_right(tier, keys) == 40
    tier.close()
    if damage in ("garbage", "damaged page", "other tables", "no text"):
        assert (tmp_path / "damaged-index.sqlite").exists()  # set aside, not destroyed


def test_damage_that_only_a_call_finds_is_mended_by_the_next_to_open(tmp_path):
    keys = make_keys(12)
    tier = open_tier(tmp_path)
    put(tier, keys)
    tier.close()
    damage_order_of_use(tmp_path / "index.sqlite")
    tier = open_tier(tmp_path)
    with pytest.raises(TierUnavailable, match="malformed"):
        tier.delete_many([key.name for key in keys[1:]])
    tier.close()
    tier = open_tier(tmp_path)
    assert tier.check() == []
    assert count_right(tier, keys) == 12
    tier.delete_many([key.name for key in keys[1:]])
    assert count_right(tier, keys) == 1
    tier.close()
    # Mended in place, with its order of use: nothing is set aside, and the mark is gone.
    assert not list(tmp_path.glob("*damaged*"))


def test_a_free_slot_of_no_slab_is_damage(tmp_path):
    tier = open_tier(tmp_path)
    put(tier, make_keys(1))
    with sqlite3.connect(tmp_path / "index.sqlite") as sql:
        sql.execute("DELETE FROM slabs")
    sql.close()
    with pytest.raises(TierUnavailable, match="expected a free slot in a known slab"):
        put(tier, make_keys(2))
    tier.close()
    tier = open_tier(tmp_path)
    assert tier.check() == []
    assert count_right(tier, make_keys(1)) == 1
    tier.close()


@pytest.mark.parametrize("value", [b"\x00\x00", 1.5, 1e300])
@pytest.mark.parametrize("column", ["slot_bytes", "record_bytes", "ticket", "expires_at"])
def test_a_cell_of_another_type_is_damage(tmp_path, column, value):
    keys = make_keys(12)
    tier = open_tier(tmp_path)
    put(tier, keys[:10])
    tier.close()
    with sqlite3.connect(tmp_path / "index.sqlite") as sql:
        sql.execute(f"UPDATE slots SET {column} = ? WHERE slot IN (0, 10)", (value,))
    sql.close()
    tier = open_tier(tmp_path)
    calls = [
        lambda: count_right(tier, keys),
        lambda: count_right(tier, keys),
        lambda: put(tier, keys[10:]),
        lambda: tier.delete_many([keys[11].name]),
        tier.sweep,
        tier.check,
    ]
    for call in calls:
        with suppress(TierUnavailable):
            call()
    tier.close()
    tier = open_tier(tmp_path)
    tier.check(fix=True)
    assert tier.check() == []
    put(tier, keys)
    assert count_right(tier, keys) == 12
    tier.close()


def test_a_damaged_index_that_others_use_is_left_alone(tmp_path):
    other = open_tier(tmp_path)
    put(other, make_keys(3))
    with (tmp_path / "index.sqlite").open("r+b") as file:
        file.write(bytes(100))
    (tmp_path / "index.sqlite-wal").write_bytes(b"")
    with pytest.raises(TierUnavailable):
        open_tier(tmp_path)
    assert not (tmp_path / "damaged-index.sqlite").exists()
    other._index.look_ups._reader.close()
    other._index._writer.close()
    other._files.close()
