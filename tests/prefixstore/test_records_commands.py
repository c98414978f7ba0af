"""`kvkernels inspect` and `kvkernels verify`, on files and on stores."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from disk_tiers import replace_preadv
from sample_blocks import make_keys
from test_record_codecs import LATENT, MIXED, make_block, make_record

from prefixstore.commands import kvkernels
from prefixstore.errors import TierTimeout
from prefixstore.record import BlockKey
from prefixstore.record_layout import RecordLayout
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.pages import PAGE_BYTES, round_up

LAYOUTS = [RecordLayout(2, 1, 16, 32, "bfloat16", 0, (codec,)) for codec in ("raw", "q8")] + [MIXED]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(kvkernels, [str(argument) for argument in arguments])


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, list[BlockKey]]:
    """Six records in a store, two of each layout."""
    keys = [key for seed, layout in enumerate(LAYOUTS) for key in make_keys(2, layout, seed)]
    path = tmp_path / "store"
    tier = DiskTier(DiskTierConfig(path, 1 << 20))
    for key in keys:
        tier.put(key.name, memoryview(make_record(key, make_block(key.layout))))
    tier.close()
    return path, keys


def flip_a_payload_bit(store: Path, key: BlockKey) -> None:
    """Flip a bit in the file, without the tier."""
    for path in store.glob("slab-v*.kvb"):
        data = bytearray(path.read_bytes())
        start = data.find(key.block_hash)
        if start >= 0:
            data[start - 48 + key.layout.header_bytes + 100] ^= 8
            path.write_bytes(data)
            return
    raise AssertionError("the record is in no file")


def test_inspect_lists_what_looks_like_markup(store: tuple[Path, list[BlockKey]]) -> None:
    path, keys = store
    for slab in path.glob("slab-v*.kvb"):
        slab.write_bytes(slab.read_bytes().replace(b"KVB1", b"[/a]"))
    result = run("inspect", path)
    assert result.exit_code == 0
    assert f"{len(keys)} records" in result.output


def test_inspect_tells_of_latents(tmp_path: Path) -> None:
    (key,) = make_keys(1, LATENT)
    path = tmp_path / "record"
    path.write_bytes(make_record(key, make_block(LATENT)))
    result = run("inspect", path)
    assert "1 heads of 16 (latents of 12), bfloat16" in result.output
    assert json.loads(run("inspect", path, "--json").output)["layout"]["latent_dim"] == 12


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "+".join(layout.codecs))
def test_inspects_a_file(layout: RecordLayout, tmp_path: Path) -> None:
    (key,) = make_keys(1, layout)
    path = tmp_path / "record"
    path.write_bytes(make_record(key, make_block(layout)))
    result = run("inspect", path, "--layers")
    assert result.exit_code == 0, result.output
    for text in (key.block_hash.hex(), key.identity.hex(), "every byte is as it was written"):
        assert text in result.output
    for layer in json.loads(run("inspect", path, "--json").output)["layers"]:
        assert layer["sum"] in result.output and layer["codec"] in result.output


def test_inspects_a_damaged_file(tmp_path: Path) -> None:
    (key,) = make_keys(1, MIXED)
    record = make_record(key, make_block(MIXED))
    path = tmp_path / "record"
    record[-100] ^= 1
    path.write_bytes(record)
    result = run("inspect", path)
    assert result.exit_code == 1
    assert "expected the table's checksums, got others in layers [1]" in result.output
    path.write_bytes(b"GGUF" + bytes(500))
    result = run("inspect", path)
    assert result.exit_code == 1
    assert result.output.startswith("Error: record: magic: expected b'KVB1', got b'GGUF'")


def test_lists_a_store_and_finds_a_block_in_it(store: tuple[Path, list[BlockKey]]) -> None:
    path, keys = store
    result = run("inspect", path)
    assert result.exit_code == 0, result.output
    rows = json.loads(run("inspect", path, "--json").output)
    assert {row["block_hash"] for row in rows} == {key.block_hash.hex() for key in keys}
    assert [row["codecs"] for row in rows].count("l12, q4") == 2
    assert "6 records" in result.output
    saved = path.parent / "saved"
    result = run("inspect", path, "--block", keys[5].block_hash.hex()[:8], "--save", saved)
    assert result.exit_code == 0, result.output
    assert saved.read_bytes() == make_record(keys[5], make_block(MIXED))
    for prefix, count in (("", 6), ("zz", 0)):
        result = run("inspect", path, "--block", prefix)
        assert result.exit_code == 1
        assert f"got {prefix!r}, which {count} blocks have" in result.output
    assert "expected a store to find it in" in run("inspect", saved, "--block", "7").output


def test_verifies_a_store(store: tuple[Path, list[BlockKey]]) -> None:
    path, keys = store
    result = run("verify", path)
    assert result.exit_code == 0, result.output
    assert "6 records" in result.output and "0 damaged, 0 deleted" in result.output
    flip_a_payload_bit(path, keys[2])
    result = run("verify", path)
    assert result.exit_code == 1
    assert f"{keys[2].block_hash.hex()}  payload: expected the table's checksums" in result.output
    assert "1 damaged, 0 deleted" in result.output
    found = json.loads(run("verify", path, "--delete", "--json").stdout)
    assert (found["num_records"], found["num_deleted"], found["problems"]) == (6, 1, [])
    assert list(found["damaged"]) == [keys[2].block_hash.hex()]
    result = run("verify", path)
    assert result.exit_code == 0 and "5 records" in result.output


@pytest.fixture
def bad_spot(tmp_path: Path, monkeypatch) -> tuple[Path, list[BlockKey]]:
    """A store of eight records; the second is damaged, the fourth unreadable."""
    layout = LAYOUTS[0]
    keys = make_keys(8, layout)
    path = tmp_path / "store"
    tier = DiskTier(DiskTierConfig(path, 1 << 20))
    for key in keys:
        tier.put(key.name, memoryview(make_record(key, make_block(layout))))
    tier.close()
    flip_a_payload_bit(path, keys[1])
    start = 3 * round_up(layout.record_bytes, PAGE_BYTES)

    def read_failing(read, offset, num_bytes):
        if offset <= start < offset + num_bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read()

    replace_preadv(monkeypatch, True, read_failing)
    return path, keys


def test_verifying_goes_on_past_a_record_that_cannot_be_read(
    bad_spot: tuple[Path, list[BlockKey]],
) -> None:
    path, keys = bad_spot
    result = run("verify", path, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["num_records"] == 7
    assert list(found["damaged"]) == [keys[1].block_hash.hex(), keys[3].block_hash.hex()]
    assert os.strerror(errno.EIO) in found["damaged"][keys[3].block_hash.hex()]
    (problem,) = found["problems"]  # the index is checked, too
    assert problem.endswith("Input/output error: slot 3 cannot be read")
    found = json.loads(run("verify", path, "--delete", "--json").stdout)
    assert (found["num_deleted"], found["problems"]) == (2, [])
    result = run("verify", path)
    assert result.exit_code == 0 and "6 records" in result.output


def test_verifying_tells_what_it_found_whatever_the_tier_cannot_do(
    bad_spot: tuple[Path, list[BlockKey]], monkeypatch
) -> None:
    path, keys = bad_spot

    def busy(*_):
        raise TierTimeout("disk: no turn")

    monkeypatch.setattr(DiskTier, "delete", busy)
    monkeypatch.setattr(DiskTier, "check", busy)
    result = run("verify", path, "--delete", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["num_records"], len(found["damaged"]), found["num_deleted"]) == (7, 2, 0)
    assert found["problems"] == [
        f"{keys[1].block_hash.hex()}  disk: no turn",
        f"{keys[3].block_hash.hex()}  disk: no turn",
        "disk: no turn",
    ]


def test_lists_records_beside_one_that_cannot_be_read(
    bad_spot: tuple[Path, list[BlockKey]],
) -> None:
    path, keys = bad_spot
    rows = json.loads(run("inspect", path, "--json").output)
    assert [row["block_hash"] for row in rows] == [key.block_hash.hex() for key in keys]
    assert [n for n, row in enumerate(rows) if "problem" in row] == [3]
    assert "8 records" in run("inspect", path).output


def test_a_longer_record_in_place_of_one_that_was_listed_is_no_damage(
    store: tuple[Path, list[BlockKey]], monkeypatch
) -> None:
    path, keys = store
    list_records = DiskTier.list_records
    monkeypatch.setattr(
        DiskTier,
        "list_records",
        lambda tier: [
            (name, num_bytes - (name == keys[0].name)) for name, num_bytes in list_records(tier)
        ],
    )
    result = run("verify", path, "--delete", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["num_records"], found["num_gone"], found["num_deleted"]) == (5, 1, 0)
    assert "5 records" in run("inspect", path).output


def test_verifying_evicts_nothing_and_makes_no_store(
    store: tuple[Path, list[BlockKey]], tmp_path: Path
) -> None:
    path, _ = store
    before = {file.name: file.read_bytes() for file in path.glob("slab-v*.kvb")}
    assert run("verify", path).exit_code == 0
    assert {file.name: file.read_bytes() for file in path.glob("slab-v*.kvb")} == before
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run("verify", empty)
    assert result.exit_code == 1
    assert f"store: expected the directory of a disk tier, got {empty}" in result.output
    assert list(empty.iterdir()) == []


def test_looking_at_records_does_not_count_as_use(store: tuple[Path, list[BlockKey]]) -> None:
    path, _ = store

    def last_used() -> list[tuple[int, int, int]]:
        with sqlite3.connect(path / "index.sqlite") as sql:
            return sql.execute(
                "SELECT slab_id, slot, last_used FROM slots ORDER BY 1, 2"
            ).fetchall()

    before = last_used()
    assert run("verify", path).exit_code == 0
    assert run("inspect", path).exit_code == 0
    assert last_used() == before


def test_verifies_while_another_process_serves(store: tuple[Path, list[BlockKey]]) -> None:
    path, keys = store
    tier = DiskTier(DiskTierConfig(path, 1 << 20))
    try:
        assert run("verify", path).exit_code == 0
        assert tier.contains(keys[0].name)
    finally:
        tier.close()
