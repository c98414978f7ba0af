"""Keys in files, in the environment, in URLs of tiers, and on the command line."""

from __future__ import annotations

import json
import os
import resource
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sample_blocks import make_keys, make_record

from prefixstore.commands import kvkernels
from prefixstore.errors import ConfigError
from prefixstore.keys import ProtectionConfig, read_key, write_key
from prefixstore.tier_urls import open_tiers
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.protected import ProtectedTier

SECRET = bytes(range(32))


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(kvkernels, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "content",
    [SECRET, SECRET.hex().encode(), SECRET.hex().upper().encode() + b"\n"],
    ids=["bytes", "digits", "a line"],
)
def test_reads_a_key_from_a_file(tmp_path, content):
    path = write(tmp_path / "key", content)
    assert read_key(path) == read_key(str(path)) == SECRET
    config = ProtectionConfig(auth_key=path, seal_key=[str(path), bytes(32)])
    assert (config.auth_keys, config.seal_keys) == ((SECRET,), (SECRET, bytes(32)))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o777])
def test_refuses_a_file_that_others_may_use(tmp_path, mode):
    path = write(tmp_path / "key", SECRET, mode)
    with pytest.raises(ConfigError, match=f"only its owner may read.* got mode {mode:03o}"):
        ProtectionConfig(path)
    path.chmod(0o400)
    assert read_key(path) == SECRET


@pytest.mark.parametrize(
    "content",
    [b"", SECRET[:31], SECRET + b"\n", SECRET.hex()[:-1].encode(), b"g" * 64, SECRET * 3],
    ids=["empty", "short", "raw with a line end", "63 digits", "no digits", "long"],
)
def test_refuses_a_file_without_a_key_and_does_not_show_it(tmp_path, content):
    path = write(tmp_path / "key", content)
    with pytest.raises(ConfigError, match="expected 64 hexadecimal digits or 32 bytes") as error:
        read_key(path)
    assert error.value.__cause__ is None and error.value.__context__ is None
    assert not content or repr(content)[2:-1] not in str(error.value)


@pytest.mark.parametrize("key", [SECRET[:31], SECRET + b"\0", b"", 7, [7], [SECRET, b""]])
def test_refuses_what_is_no_key(key):
    message = r"seal_key: expected 32 bytes or the path of a file, got (\d+ bytes|int)"
    with pytest.raises(ConfigError, match=message):
        ProtectionConfig(seal_key=key)


def test_refuses_no_key_at_all(tmp_path):
    for config in ({}, {"auth_key": []}, {"auth_key": (), "seal_key": None}):
        with pytest.raises(ConfigError, match="expected at least one of them, got none"):
            ProtectionConfig(**config)
    with pytest.raises(ConfigError, match="absent: No such file"):
        ProtectionConfig(tmp_path / "absent")


def test_makes_a_key_that_only_its_owner_may_read(tmp_path):
    path = tmp_path / "key"
    before = os.umask(0)
    try:
        result = run("key", path)
    finally:
        os.umask(before)
    assert result.exit_code == 0 and f"auth_key={path}" in result.output
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = read_key(path)
    assert key.hex() not in result.output
    result = run("key", path)
    assert result.exit_code == 1 and "File exists" in result.output
    assert read_key(path) == key != write_key(tmp_path / "other")


def test_leaves_no_part_of_a_key_where_there_is_no_room(tmp_path):
    path = tmp_path / "key"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(ConfigError, match=r"key file .*: File too large"):
            write_key(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()
    assert write_key(path) == read_key(path)


def test_takes_keys_from_the_environment(tmp_path):
    first, second = (write(tmp_path / name, name.encode() * 32) for name in "ab")
    assert ProtectionConfig.from_environment({}) is None
    config = ProtectionConfig.from_environment(
        {"KVKERNELS_AUTH_KEY_FILE": str(first), "KVKERNELS_SEAL_KEY_FILE": f"{second}:{first}"}
    )
    assert config is not None
    assert (config.auth_keys, config.seal_keys) == ((b"a" * 32,), (b"b" * 32, b"a" * 32))


def test_urls_name_keys(tmp_path, monkeypatch):
    key, other = (write(tmp_path / name, name.encode() * 32) for name in "ab")
    monkeypatch.delenv("KVKERNELS_AUTH_KEY_FILE", raising=False)
    monkeypatch.delenv("KVKERNELS_SEAL_KEY_FILE", raising=False)
    urls = ["memory://1MiB", f"disk://{tmp_path}/disk?max_bytes=1MiB"]

    def kinds(urls: list[str]) -> list[bool]:
        tiers, _ = open_tiers(urls)
        for tier in tiers:
            tier.close()
        return [isinstance(tier, ProtectedTier) for tier in tiers]

    assert kinds(urls) == [False, False]
    assert kinds([urls[0], f"{urls[1]}&seal_key={key}:{other}"]) == [False, True]
    assert kinds([f"{urls[0]}?auth_key={key}"]) == [True]
    monkeypatch.setenv("KVKERNELS_SEAL_KEY_FILE", str(key))
    assert kinds(urls) == [False, True]
    with pytest.raises(ConfigError, match="expected at least one of them"):
        open_tiers([f"{urls[1]}&seal_key="])


# ---- the commands that look at records --------------------------------------------------------


@pytest.fixture(params=["auth_key", "seal_key"])
def store(request, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A store with two protected records and a plain one, and the key's file."""
    monkeypatch.delenv("KVKERNELS_SEAL_KEY_FILE", raising=False)
    monkeypatch.delenv("KVKERNELS_AUTH_KEY_FILE", raising=False)
    path, key_file = tmp_path / "store", tmp_path / "key"
    write_key(key_file)
    disk = DiskTier(DiskTierConfig(path, 1 << 20))
    tier = ProtectedTier(disk, ProtectionConfig(**{request.param: key_file}))
    first, second, third = make_keys(3)
    for key in (first, second):
        tier.put(key.name, memoryview(make_record(key)))
    disk.put(third.name, memoryview(make_record(third)))
    tier.close()
    return path, key_file


def flip_a_bit_of_a_protected_record(path: Path) -> None:
    for slab in path.glob("slab-v*.kvb"):
        data = bytearray(slab.read_bytes())
        start = data.find(b"KVB1")
        assert data[start + 10] != 0
        data[start + 3000] ^= 1
        slab.write_bytes(data)


def test_verify_leaves_alone_what_it_has_no_key_for(store):
    path, _ = store
    flip_a_bit_of_a_protected_record(path)
    result = run("verify", path, "--delete")
    assert result.exit_code == 0, result.output
    assert "3 records" in result.output and "0 damaged, 0 deleted" in result.output
    assert "2 protected and not verified: their key is needed (--key)" in result.output


def test_verify_checks_protected_records_with_their_key(store, tmp_path, monkeypatch):
    path, key_file = store
    result = run("verify", path, "--key", key_file)
    assert result.exit_code == 0 and "not verified" not in result.output
    flip_a_bit_of_a_protected_record(path)
    monkeypatch.setenv("KVKERNELS_SEAL_KEY_FILE", str(key_file))
    result = run("verify", path)
    assert result.exit_code == 1 and "1 damaged" in result.output
    assert "tag: expected that of the key, got another" in result.output
    write_key(tmp_path / "other")
    found = json.loads(run("verify", path, "--key", tmp_path / "other", "--json").stdout)
    assert (found["num_locked"], found["damaged"]) == (2, {})
    result = run("verify", path, "--key", tmp_path / "other", "--key", key_file, "--delete")
    assert result.exit_code == 1 and "1 damaged, 1 deleted" in result.output


def test_inspect_opens_protected_records_with_their_key(store):
    path, key_file = store
    rows = json.loads(run("inspect", path, "--json").stdout)
    problems = [row.get("problem", "") for row in rows]
    assert sum("expected that key (--key), got 0 others" in text for text in problems) == 2
    rows = json.loads(run("inspect", path, "--json", "--key", key_file).stdout)
    assert [row["codecs"] for row in rows] == ["raw"] * 3
    locked = next(row for row, text in zip(rows, problems, strict=True) if text)
    arguments = "inspect", path, "--block", locked["block_hash"][:10]
    result = run(*arguments)
    assert result.exit_code == 1
    assert "Error: record: " in result.output and "expected that key (--key)" in result.output
    result = run(*arguments, "--key", key_file)
    assert result.exit_code == 0, result.output
    described = json.loads(run(*arguments, "--key", key_file, "--json").stdout)
    assert described["protection"] in result.output and "with key" in described["protection"]
    assert described["block_hash"] in [key.block_hash.hex() for key in make_keys(2)]
    assert described["problem"] is None
