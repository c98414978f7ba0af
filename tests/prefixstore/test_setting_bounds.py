"""Impossible times, sizes and counts are refused; the largest possible ones work."""

import fcntl
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sample_blocks import make_keys
from stores import load, save
from tier_kinds import get, put

from prefixstore import tier_urls
from prefixstore.config import CacheConfig
from prefixstore.errors import ConfigError, StoreError, TierUnavailable
from prefixstore.settings import MAX_BYTES, MAX_COUNT, MAX_SECONDS, MAX_WAIT_S
from prefixstore.store import BreakerConfig, StoreConfig, TierPolicy
from prefixstore.tier_urls import open_tiers
from prefixstore.tiers.disk import DiskTierConfig
from prefixstore.tiers.memory import MemoryTierConfig
from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.remote.config import RemoteTierConfig

STORE_WAITS = ("load_timeout_s", "write_timeout_s", "close_timeout_s")
REMOTE_WAITS = ("timeout_s", "connect_timeout_s", "request_timeout_s", "sweep_timeout_s")


def make_memory(**fields):
    return MemoryTierConfig(**{"capacity_bytes": 1 << 20, **fields})


def make_disk(**fields):
    return DiskTierConfig(**{"path": Path("x"), "capacity_bytes": 1 << 20, **fields})


def make_remote(**fields):
    return RemoteTierConfig("file", "/x", **fields)


TIMES = [
    *((StoreConfig, name, MAX_WAIT_S) for name in STORE_WAITS),
    *((BreakerConfig, name, MAX_SECONDS) for name in ("window_s", "pause_s", "max_pause_s")),
    (TierPolicy, "negative_ttl_s", MAX_SECONDS),
    (make_memory, "ttl_s", MAX_SECONDS),
    (make_disk, "ttl_s", MAX_SECONDS),
    (make_disk, "timeout_s", MAX_WAIT_S),
    (make_disk, "write_lease_s", MAX_SECONDS),
    (make_remote, "ttl_s", MAX_SECONDS),
    *((make_remote, name, MAX_WAIT_S) for name in REMOTE_WAITS),
    *((RedisTierConfig, name, MAX_WAIT_S) for name in ("connect_timeout_s", "timeout_s")),
]


@pytest.mark.parametrize(("make", "name", "most"), TIMES)
def test_refuses_times_without_an_end(make, name, most):
    make(**{name: most})
    for value in (math.nan, -1, "1s", True):
        with pytest.raises(ConfigError, match=rf"^{name}: expected (more than 0|0 or more), got "):
            make(**{name: value})
    for value in (math.inf, 1e300, most + 1):
        with pytest.raises(ConfigError, match=rf"^{name}: expected at most {most}, got "):
            make(**{name: value})


@pytest.mark.parametrize(
    ("make", "name", "most"),
    [
        (StoreConfig, "queue_bytes", MAX_BYTES),
        (StoreConfig, "held_bytes", MAX_BYTES),
        (StoreConfig, "queue_entries", MAX_COUNT),
        (BreakerConfig, "failures", MAX_COUNT),
        (BreakerConfig, "timeout_failures", MAX_COUNT),
        (make_memory, "capacity_bytes", MAX_BYTES),
        (make_memory, "quota_bytes", MAX_BYTES),
        (make_disk, "capacity_bytes", MAX_BYTES),
        (make_disk, "slab_bytes", MAX_BYTES),
        (make_remote, "max_in_flight_bytes", MAX_BYTES),
        (make_remote, "max_requests", MAX_COUNT),
        (make_remote, "max_retries", MAX_COUNT),
    ],
)
def test_refuses_what_is_no_whole_number_in_range(make, name, most):
    make(**{name: most})
    for value in (math.inf, math.nan, 5.5, -1, True):
        with pytest.raises(ConfigError, match=rf"^{name}: expected an integer of at least "):
            make(**{name: value})
    with pytest.raises(ConfigError, match=rf"^{name}: expected at most {most}, got "):
        make(**{name: most + 1})


@pytest.mark.parametrize(
    "url",
    [
        "disk://{}/second?timeout=99999999999999d",
        "disk://{}/second?ttl=999999999d",
        "disk://{}/second?max_bytes=99999999999TiB",
        "memory://99999999999TiB",
        "s3://bucket?region=x&request_timeout=99999999999999d",
        "s3://bucket?region=x&max_retries=99999999999999999999",
        "file://{}/second?timeout=999999999d",
        "redis://host?timeout=999999999d",
        "redis://host?ttl=999999999d",
        "memory://1MiB?negative_ttl=999999999d",
    ],
)
def test_refuses_urls_that_say_more(tmp_path, url):
    with pytest.raises(ConfigError, match=r": expected at most \d+, got "):
        open_tiers([url.format(tmp_path)])
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("disk://{}/a%00b", "tiers: expected no zero character"),
        ("disk://{}/second?threads=" + "9" * 5000, "threads: expected a whole number"),
        ("memory://4GiB/second", "tiers: memory: expected memory://SIZE, got 'memory://4GiB/"),
    ],
)
def test_refuses_urls_that_make_no_sense(tmp_path, url, message):
    with pytest.raises(ConfigError, match=message):
        open_tiers([url.format(tmp_path)])


def test_says_which_tier_there_is_no_memory_for():
    with pytest.raises(TierUnavailable, match=r"^big: expected room for \d+ bytes of memory"):
        open_tiers(["memory://1000000TiB?name=big"])


@pytest.mark.parametrize("value", ["inf", "nan", "1e300", "'999999999d'"])
@pytest.mark.parametrize("name", ["queue_bytes", *STORE_WAITS])
def test_refuses_files_that_say_more(tmp_path, name, value):
    path = tmp_path / "kv.toml"
    path.write_text(f"[store]\n{name} = {value}\n")
    with pytest.raises(ConfigError, match=rf"^{name}: expected "):
        CacheConfig.from_toml(path)


@pytest.mark.parametrize("kind", ["disk", "file", "memory"])
def test_works_with_the_longest_times_there_are(tmp_path, make_store, kind):
    options = {"disk": "&timeout=24d", "file": "&timeout=24d&request_timeout=24d", "memory": ""}
    place = "1MiB" if kind == "memory" else f"{tmp_path}/tier"
    tiers, policies = open_tiers([f"{kind}://{place}?ttl=36500d&write=through{options[kind]}"])
    waits = dict.fromkeys(STORE_WAITS, MAX_WAIT_S)
    store = make_store(*tiers, policies=policies, **waits)
    (key,) = make_keys(1)
    save(store, [key])
    assert store.flush(MAX_WAIT_S)
    assert load(store, key) == tiers[0].name


def test_redis_works_with_the_longest_times_there_are(redis_server, tmp_path):
    url = f"{redis_server.url}?ttl=36500d&timeout=24d&connect_timeout=24d&prefix={tmp_path.name}"
    (tier,), _ = open_tiers([url])
    with closing(tier):
        (key,) = make_keys(1)
        put(tier, key)
        assert get(tier, key) is not None
        assert tier.delete(key.name)


def is_open(path: Path) -> bool:
    """Whether any process, also this one, has the disk tier open."""
    with (path / "tier.lock").open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_closes_what_it_opened_whatever_a_later_tier_raises(tmp_path, monkeypatch):
    def fail(config):
        raise OverflowError("int too large")

    good = f"disk://{tmp_path}/good?max_bytes=1MiB"
    (tier,), _ = open_tiers([good])
    with closing(tier):
        assert is_open(tmp_path / "good")
    with pytest.raises(StoreError):
        open_tiers([good, "disk:///dev/null/nothing"])
    assert not is_open(tmp_path / "good")
    failing = replace(tier_urls._KINDS["memory"], open=fail)
    monkeypatch.setitem(tier_urls._KINDS, "memory", failing)
    with pytest.raises(OverflowError):
        open_tiers([good, "memory://1MiB"])
    assert not is_open(tmp_path / "good")
