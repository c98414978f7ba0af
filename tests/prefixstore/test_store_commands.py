"""`kvkernels store`: what tiers hold, checking, sweeping and clearing them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from sample_blocks import LAYOUT, make_keys, make_record

from prefixstore.block_key import BlockKey, chain_keys
from prefixstore.commands import kvkernels
from prefixstore.tiers.disk import DiskTier
from prefixstore.tiers.disk.config import DiskTierConfig

MINE, OTHER = bytes([0xAB] * 16), bytes([0xCD] * 16)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(kvkernels, ["store", *(str(argument) for argument in arguments)])


def keys_of(identity: bytes, count: int) -> list[BlockKey]:
    tokens = np.concatenate([key.tokens for key in make_keys(count)])
    return chain_keys(LAYOUT, identity, tokens)


def open_tier(path: Path, **options: object) -> DiskTier:
    return DiskTier(DiskTierConfig(path, 1 << 20, **options))  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A disk tier with three records of one identity and two of another."""
    path = tmp_path / "tier"
    tier = open_tier(path)
    for key in keys_of(MINE, 3) + keys_of(OTHER, 2):
        tier.put(key.name, memoryview(make_record(key)))
    tier.close()
    return path


def test_says_what_tiers_hold(path: Path) -> None:
    for target in (path, f"disk://{path}?max_bytes=4KiB"):  # a small bound evicts nothing
        result = run("stats", target)
        assert result.exit_code == 0, result.output
        assert MINE.hex() in result.output and OTHER.hex() in result.output
    found = json.loads(run("stats", path, "--json").output)[str(path)]
    assert found["num_records"] == 5
    assert found["identities"] == {
        MINE.hex(): {"num_records": 3, "num_bytes": 3 * LAYOUT.record_bytes},
        OTHER.hex(): {"num_records": 2, "num_bytes": 2 * LAYOUT.record_bytes},
    }


def test_reads_targets_from_a_file(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "kv.toml"
    file.write_text(f'tiers = ["memory://1GiB", "disk://{path}?max_bytes=1MiB"]\n')
    found = json.loads(run("stats", file, "--json").output)
    assert [stats["num_records"] for stats in found.values()] == [5]


def test_forgets_one_identity_or_all(path: Path) -> None:
    assert run("clear", path).exit_code == 2
    assert run("clear", path, "--all", "--identity", "ab").exit_code == 2
    result = run("clear", path, "--identity", "abab")
    assert result.exit_code == 0 and MINE.hex() in result.output
    tier = open_tier(path)
    assert tier.list_identities().keys() == {OTHER}
    tier.close()
    assert json.loads(run("clear", path, "--all", "--json").output) == {str(path): [OTHER.hex()]}
    tier = open_tier(path)
    assert tier.list_identities() == {}
    tier.close()


def test_refuses_digits_of_several_identities(path: Path) -> None:
    tier = open_tier(path)
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
    found = json.loads(run("stats", path, "--json").output)[str(path)]
    assert found["num_records"] == 4


def test_sweeps_what_expired(tmp_path: Path) -> None:
    path = tmp_path / "tier"
    tier = open_tier(path, ttl_s=0.05)
    (key,) = keys_of(MINE, 1)
    tier.put(key.name, memoryview(make_record(key)))
    tier.close()
    time.sleep(0.1)
    found = json.loads(run("sweep", path, "--json").output)[str(path)]
    assert found == {"num_expired": 1, "num_orphans": 0, "num_bytes": LAYOUT.record_bytes}
    assert "0 expired" in run("sweep", path).output


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere", "store: expected the directory of a disk tier, got nowhere"),
        ("memory://1GiB", "targets: expected tiers outside a process, got memory://1GiB"),
        ("dsk:///tmp", "did you mean disk?"),
        ("none.toml", "none.toml: No such file"),
    ],
)
def test_refuses_other_targets(target: str, message: str) -> None:
    result = run("stats", target)
    assert result.exit_code == 1
    assert message in result.output
