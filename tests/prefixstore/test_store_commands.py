"""`kvkernels store`: statistics, checking, sweeping and clearing of tiers."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from sample_blocks import LAYOUT, make_keys, make_record

from prefixstore.block_key import BlockKey, chain_keys
from prefixstore.commands import kvkernels
from prefixstore.keys import write_key
from prefixstore.tier_urls import open_tier, parse_tier_url
from prefixstore.tiers.disk import DiskTier
from prefixstore.tiers.disk.config import DiskTierConfig

MINE, OTHER = bytes([0xAB] * 16), bytes([0xCD] * 16)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(kvkernels, ["store", *(str(argument) for argument in arguments)])


def results(*arguments: object) -> list[dict[str, Any]]:
    """The JSON that a command prints, whatever its status."""
    return json.loads(run(*arguments, "--json").stdout)


def keys_of(identity: bytes, count: int) -> list[BlockKey]:
    tokens = np.concatenate([key.tokens for key in make_keys(count)])
    return chain_keys(LAYOUT, identity, tokens)


def open_disk(path: Path, **options: object) -> DiskTier:
    return DiskTier(DiskTierConfig(path, 1 << 20, **options))  # type: ignore[arg-type]


def put_into(url: str, keys: list[BlockKey]) -> None:
    with closing(open_tier(parse_tier_url(url))) as tier:
        records = [memoryview(make_record(key)) for key in keys]
        assert tier.put_many([key.name for key in keys], records) == [None] * len(keys)


def count_in(url: str, keys: list[BlockKey]) -> int:
    """How many of the records a store finds."""
    with closing(open_tier(parse_tier_url(url))) as tier:
        return sum(tier.contains_many([key.name for key in keys]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A disk tier with three records of one identity and two of another."""
    path = tmp_path / "tier"
    tier = open_disk(path)
    for key in keys_of(MINE, 3) + keys_of(OTHER, 2):
        tier.put(key.name, memoryview(make_record(key)))
    tier.close()
    return path


def test_says_what_tiers_hold(path: Path) -> None:
    for target in (path, f"disk://{path}?max_bytes=4KiB"):  # a small bound evicts nothing
        result = run("stats", target)
        assert result.exit_code == 0, result.output
        assert MINE.hex() in result.output and OTHER.hex() in result.output
    (found,) = results("stats", path)
    assert found == {
        "target": str(path),
        "num_records": 5,
        "num_bytes": 5 * LAYOUT.record_bytes,
        "capacity_bytes": 0,
        "identities": {
            MINE.hex(): {"num_records": 3, "num_bytes": 3 * LAYOUT.record_bytes},
            OTHER.hex(): {"num_records": 2, "num_bytes": 2 * LAYOUT.record_bytes},
        },
    }


def test_tells_the_bound_that_a_url_says(path: Path) -> None:
    urls = (f"disk://{path}?max_bytes=1MiB", f"disk://{path}", path)
    capacities = [found["capacity_bytes"] for found in results("stats", *urls)]
    assert capacities == [1 << 20, 4 << 30, 0]
    assert "16.6 kB of 1.0 MB" in run("stats", urls[0]).output
    assert " of " not in run("stats", path).output


def test_counts_what_an_object_store_lists(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/objects"
    put_into(url, keys_of(MINE, 3) + keys_of(OTHER, 2))
    (found,) = results("stats", url)
    assert (found["num_records"], found["num_bytes"]) == (5, 5 * LAYOUT.record_bytes)


def test_reads_targets_from_a_file(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "kv.toml"
    file.write_text(f'tiers = ["memory://1GiB", "disk://{path}?max_bytes=1MiB"]\n')
    assert [found["num_records"] for found in results("stats", file)] == [5]
    served = tmp_path / "serve.toml"  # as `kvkernels serve` takes it
    served.write_text(f"[server]\nport = 0\n[cache]\n{file.read_text()}")
    assert [found["num_records"] for found in results("stats", served)] == [5]


def test_forgets_one_identity_or_all(path: Path) -> None:
    assert run("clear", path).exit_code == 2
    assert run("clear", path, "--all", "--identity", "ab").exit_code == 2
    result = run("clear", path, "--identity", "abab")
    assert result.exit_code == 0 and MINE.hex() in result.output
    tier = open_disk(path)
    assert tier.list_identities().keys() == {OTHER}
    tier.close()
    assert results("clear", path, "--all") == [{"target": str(path), "forgotten": [OTHER.hex()]}]
    tier = open_disk(path)
    assert tier.list_identities() == {}
    tier.close()


def test_refuses_digits_of_several_identities(path: Path) -> None:
    tier = open_disk(path)
    for key in keys_of(bytes([0xAB] * 15 + [0]), 1):
        tier.put(key.name, memoryview(make_record(key)))
    tier.close()
    result = run("clear", path, "--identity", "ab")
    assert result.exit_code == 1
    assert "identity: expected digits of one, got 'ab', which 2 have" in result.output


def test_checks_and_mends(path: Path) -> None:
    assert run("check", path).exit_code == 0
    for file in path.glob("slab-v*.kvb"):
        with file.open("r+b") as slab:
            slab.write(bytes(100))  # the first record's header
    result = run("check", path)
    assert result.exit_code == 1 and "does not hold the record" in result.output
    assert run("check", path, "--fix").exit_code == 1
    assert run("check", path).exit_code == 0
    assert [found["num_records"] for found in results("stats", path)] == [4]


def test_sweeps_what_expired(tmp_path: Path) -> None:
    path = tmp_path / "tier"
    tier = open_disk(path, ttl_s=0.05)
    (key,) = keys_of(MINE, 1)
    tier.put(key.name, memoryview(make_record(key)))
    tier.close()
    time.sleep(0.1)
    assert results("sweep", path) == [
        {
            "target": str(path),
            "num_expired": 1,
            "num_orphans": 0,
            "num_bytes": LAYOUT.record_bytes,
        }
    ]
    assert "0 expired" in run("sweep", path).output


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere", "nowhere: store: expected the directory of a disk tier, got /"),
        ("memory://1GiB", "targets: expected tiers outside a process, got memory://1GiB"),
        ("disk://host/tmp/kv", "disk: expected an absolute path, disk:///path, got 'disk://host/t"),
        ("disk:///tmp/kv?tll=1d", "disk: option: expected one of io, max_bytes, "),
        ("dsk:///tmp", "did you mean disk?"),
        ("none.toml", "none.toml: No such file"),
    ],
)
def test_refuses_other_targets(target: str, message: str) -> None:
    result = run("stats", target)
    assert result.exit_code == 1
    assert message in result.output


# ---- several targets -----------------------------------------------------------------------------


def test_tells_targets_apart_whose_urls_differ_in_options_only(
    redis_server, tmp_path: Path
) -> None:
    urls = [f"{redis_server.url}?prefix={tmp_path.name}-{end}" for end in "ab"]
    for url, count in zip(urls, (3, 2), strict=True):
        put_into(url, keys_of(MINE, count))
    found = results("stats", *urls)
    assert [one["num_records"] for one in found] == [3, 2]
    names = [f"{redis_server.url} (redis {number})" for number in (1, 2)]
    assert [one["target"] for one in found] == names
    for url in urls:
        assert run("clear", url, "--all").exit_code == 0


def test_tells_what_is_wrong_with_each_of_several(path: Path, tmp_path: Path) -> None:
    short = tmp_path / "objects" / "1" / ("00" * 16) / "ab" / ("ab" * 16 + ".kvb")
    short.parent.mkdir(parents=True)
    short.write_bytes(b"short")
    url = f"file://{tmp_path}/objects"
    result = run("check", url, path, f"{url}?name=again")
    assert result.exit_code == 1
    assert f"{url} (remote 1): 1 problems" in result.output
    assert f"{path}: no problems" in result.output
    assert f"{url} (again 2): 1 problems" in result.output


@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
def test_goes_on_after_a_target_that_fails(path: Path, order: int) -> None:
    down = "redis://user:hidden@127.0.0.1:1/0?connect_timeout=1s"
    result = run("clear", "--all", *[down, path][::order])
    assert result.exit_code == 1
    assert f"{path}: 2 identities forgotten" in result.stdout
    assert "redis://127.0.0.1:1/0: redis: 127.0.0.1:1: " in result.stderr
    found = results("clear", "--all", *[down, path][::order])[::order]
    assert "refused" in found[0].pop("error")
    assert found == [{"target": "redis://127.0.0.1:1/0"}, {"target": str(path), "forgotten": []}]
    assert "hidden" not in result.output + str(found)


def test_does_nothing_where_a_target_is_mistyped(path: Path) -> None:
    assert run("clear", "--all", path, "dsk:///tmp").exit_code == 1
    assert [found["num_records"] for found in results("stats", path)] == [5]


# ---- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", ["", "xyz", "ab ", "0" * 33])
def test_refuses_what_are_no_digits_of_an_identity(path: Path, digits: str) -> None:
    result = run("clear", path, "--identity", digits)
    assert result.exit_code == 1
    assert "identity: expected 1 to 32 hexadecimal digits, got " in result.output
    assert [found["num_records"] for found in results("stats", path)] == [5]


def test_says_which_identity_no_target_has(path: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/objects"
    put_into(url, keys_of(OTHER, 1))
    result = run("clear", path, url, "--identity", "AB", "--identity", "cd")
    assert result.exit_code == 0, result.output  # each identity is in some target
    result = run("clear", path, url, "--identity", "ab")
    assert result.exit_code == 1
    assert "identity: expected digits of one that is there, got 'ab'" in result.stderr


@pytest.mark.parametrize("place", ["disk", "file"])
@pytest.mark.parametrize("says_key", ["url", "environment"])
def test_forgets_an_identity_under_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, says_key: str
) -> None:
    write_key(tmp_path / "seal.key")
    url = target = f"{place}://{tmp_path}/sealed"
    if says_key == "url":
        url = target = f"{url}?seal_key={tmp_path}/seal.key"
    else:
        monkeypatch.setenv("KVKERNELS_SEAL_KEY_FILE", f"{tmp_path}/seal.key")
        if place == "disk":
            target = f"{tmp_path}/sealed"
    put_into(url, keys_of(MINE, 3) + keys_of(OTHER, 2))
    (found,) = results("stats", target)
    assert set(found["identities"]) == {MINE.hex(), OTHER.hex()}
    assert run("clear", target, "--identity", MINE.hex()).exit_code == 0
    assert (count_in(url, keys_of(MINE, 3)), count_in(url, keys_of(OTHER, 2))) == (0, 2)
    assert run("clear", target, "--identity", MINE.hex()).exit_code == 1


def test_forgets_an_identity_that_an_older_key_sealed(tmp_path: Path) -> None:
    old, new = f"{tmp_path}/old.key", f"{tmp_path}/new.key"
    for key in (old, new):
        write_key(key)
    url = f"disk://{tmp_path}/sealed?seal_key="
    put_into(url + old, keys_of(MINE, 3))
    put_into(url + new, keys_of(OTHER, 2))
    assert run("clear", url + new, "--identity", MINE.hex()).exit_code == 1  # another key's
    assert run("clear", f"{url}{new}:{old}", "--identity", MINE.hex()).exit_code == 0
    assert count_in(url + old, keys_of(MINE, 3)) == 0
    assert count_in(url + new, keys_of(OTHER, 2)) == 2
