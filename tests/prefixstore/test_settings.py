"""Settings as people write them, tiers' URLs, and configuration files."""

import math
import re
from pathlib import Path

import pytest

from prefixstore.config import GIB, CacheConfig
from prefixstore.errors import ConfigError
from prefixstore.settings import (
    check_known,
    parse_bytes,
    parse_seconds,
    parse_switch,
    parse_whole,
)
from prefixstore.store import TierPolicy
from prefixstore.tier_urls import check_tiers, open_tiers, parse_tier_url
from prefixstore.tiers.disk import DiskTier
from prefixstore.tiers.memory import MemoryTier

INFINITE = (math.inf, -math.inf, math.nan)  # a TOML file may say any of them


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (parse_bytes, 4096, 4096),
        (parse_bytes, "4096", 4096),
        (parse_bytes, "4096.0 B", 4096),
        (parse_bytes, "1.3KiB", 1331),
        (parse_bytes, "64KiB", 65536),
        (parse_bytes, "1.5 GiB", 3 * GIB // 2),
        (parse_bytes, "10GB", 10**10),
        (parse_bytes, "2tib", 2 << 40),
        (parse_seconds, "500ms", 0.5),
        (parse_seconds, "24h", 86400),
        (parse_seconds, "7d", 604800),
        (parse_seconds, 2.5, 2.5),
        (parse_whole, "8", 8),
        (parse_switch, "Yes", True),
        (parse_switch, "off", False),
        (parse_switch, True, True),
    ],
)
def test_reads_what_people_write(parse, text, expected):
    assert math.isclose(parse("name", text), expected)


@pytest.mark.parametrize("size", ["1.5", "4096.5", "1.5B"])
@pytest.mark.parametrize(
    "url", ["memory://{}", "disk:///kv?max_bytes={}", "redis://h?part_bytes={}"]
)
def test_refuses_a_part_of_a_byte(url, size):
    name = "memory" if "?" not in url else url.partition("?")[2].partition("=")[0]
    message = f"{name}: expected whole bytes, or a unit as in \"4GiB\", got '{size}'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_tiers([url.format(size)])


@pytest.mark.parametrize(
    ("parse", "value"),
    [
        *(
            (parse_bytes, value)
            for value in (
                "",
                "GiB",
                "4 gigs",
                "-1",
                -1,
                True,
                None,
                "1e9",
                1.5,
                4e9,
                "9" * 400,
                *INFINITE,
            )
        ),
        *(
            (parse_seconds, value)
            for value in ("soon", "4w", -0.1, False, [], "9" * 400, *INFINITE)
        ),
        *((parse_whole, value) for value in ("1.5", "x", 1.5, True)),
        *((parse_switch, value) for value in ("maybe", 1, None)),
    ],
)
def test_names_what_it_cannot_read(parse, value):
    with pytest.raises(ConfigError, match=r"^size: expected .*, got "):
        parse("size", value)


def test_offers_the_nearest_name():
    check_known("option", ["ttl"], ["ttl", "io"])
    with pytest.raises(
        ConfigError, match=r"one of io, max_bytes, got 'maxbytes'; did you mean max_bytes\?"
    ):
        check_known("option", ["maxbytes"], ["io", "max_bytes"])
    with pytest.raises(ConfigError, match=r"got 'zzz'$"):
        check_known("option", ["zzz"], ["io", "max_bytes"])


def test_opens_tiers_by_url(tmp_path):
    directory = tmp_path / "with space"
    urls = [
        "memory://64KiB?ttl=1h",
        f"disk://{directory.as_posix().replace(' ', '%20')}?max_bytes=1MiB&ttl=7d&write=back",
        f"disk://{tmp_path}/second?max_bytes=1MiB&name=slow&write=second_touch&promote=no"
        "&negative_ttl=1500ms",
    ]
    tiers, policies = open_tiers(urls)
    memory, disk, _ = tiers
    assert isinstance(memory, MemoryTier) and isinstance(disk, DiskTier)
    assert [tier.name for tier in tiers] == ["memory", "disk", "slow"]
    assert memory.stats().capacity_bytes == 65536
    assert disk.stats().capacity_bytes == 1 << 20
    assert directory.is_dir() and (tmp_path / "second").is_dir()
    assert policies == {
        "memory": TierPolicy(),
        "disk": TierPolicy("write_back"),
        "slow": TierPolicy("write_second_touch", False, 1.5),
    }
    for tier in tiers:
        tier.close()


def test_the_plain_url_is_without_what_is_not_the_tiers_own():
    url = parse_tier_url("disk:///var/kv?write=through&ttl=7d&name=cold")
    assert (url.plain, url.name) == ("disk:///var/kv?ttl=7d", "cold")
    assert parse_tier_url("disk:///var/kv@home?name=a@b").plain == "disk:///var/kv@home"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memroy://4GiB", r"tiers: kind: .* got 'memroy'; did you mean memory\?"),
        ("/var/kv", "tiers: kind: expected one of .*, got ''"),
        ("memory://", "memory: expected a size"),
        ("memory://4GiB?tll=1h", r"tiers: memory: option: .* got 'tll'; did you mean ttl\?"),
        ("memory://4GiB?ttl=1h&ttl=2h", "expected each option once, got ttl twice$"),
        ("memory://4GiB?write=thru", "tiers: memory: write: .* got 'thru'"),
        ("memory://4GiB?promote=perhaps", "promote: expected true or false"),
        ("memory://1KiB", "capacity_bytes: expected an integer of at least 4096"),
        ("disk://var/kv", "tiers: disk: expected an absolute path"),
        ("disk:///tmp/x?max_bytes=much", "max_bytes: expected a size"),
        ("disk:///tmp/x#1?ttl=7d", "tiers: expected no #"),
        ("memory://4GiB#ttl=7d", "tiers: expected no #"),
        ("memory://[4GiB", "tiers: expected a URL, got one with a broken host"),
    ],
)
def test_refuses_urls_that_are_wrong(url, message):
    with pytest.raises(ConfigError, match=message):
        open_tiers([url])


def test_finds_what_is_wrong_in_tiers_without_opening_them(tmp_path):
    good = [f"disk://{tmp_path}/kv", "redis://host.invalid/0", "s3://bucket/kv"]
    check_tiers(["memory://4GiB", *good])
    assert list(tmp_path.iterdir()) == []
    for urls, message in (
        (["disk://kv"], "tiers: disk: expected an absolute path"),
        (["memory://1KiB"], "capacity_bytes: expected an integer of at least 4096"),
        (["redis://host/0?tll=1h"], "did you mean ttl"),
        (["memory://1GiB", *good, "memory://2GiB"], "tiers: expected distinct names, got"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_tiers(urls)


def test_closes_what_it_opened_when_a_later_tier_fails(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(Exception, match="file"):
        open_tiers([f"disk://{tmp_path}/good?max_bytes=1MiB", f"disk://{tmp_path}/file"])
    (tmp_path / "good").rename(tmp_path / "moved")  # it is not open any more


# ---- files ---------------------------------------------------------------------------------------

TOML = """
block_size = 32
codec = ["l12", "q8"]
salt = "team"
tiers = ["memory://1GiB", "disk:///var/kv?max_bytes=10GiB&ttl=7d"]

[store]
queue_bytes = "64MiB"
load_timeout_s = "500ms"

[store.breaker]
failures = 2
max_pause_s = "5m"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "kv.toml"
    path.write_text(text)
    return path


def test_a_file_says_what_the_fields_say(tmp_path):
    config = CacheConfig.from_toml(write(tmp_path, TOML))
    assert (config.block_size, config.codec, config.salt) == (32, ("l12", "q8"), "team")
    assert config.tier_urls == ["memory://1GiB", "disk:///var/kv?max_bytes=10GiB&ttl=7d"]
    assert config.store is not None
    assert (config.store.queue_bytes, config.store.load_timeout_s) == (64 << 20, 0.5)
    assert (config.store.breaker.failures, config.store.breaker.max_pause_s) == (2, 300)
    assert CacheConfig.from_toml(write(tmp_path, "")) == CacheConfig()


def test_sizes_stand_for_tiers():
    assert CacheConfig().tier_urls == [f"memory://{GIB}"]
    assert CacheConfig(memory_bytes=0).tier_urls == []
    config = CacheConfig(memory_bytes=8192, disk_path="/a b", disk_bytes=4096)
    assert config.tier_urls == ["memory://8192", "disk:///a%20b?max_bytes=4096"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block_sise = 64", r"config: .* got 'block_sise'; did you mean block_size\?"),
        ("[store]\nqueue_byte = 1", r"store: .* did you mean queue_bytes\?"),
        ("[store.breaker]\nfailure = 1", r"store.breaker: .* did you mean failures\?"),
        ("[store]\npolicies = {}", "store: expected one of .*, got 'policies'"),
        ("store = 3", "store: expected a table, got int"),
        ("[store]\nqueue_bytes = 'lots'", "queue_bytes: expected a size"),
        ("[store]\nqueue_bytes = 1.5", "queue_bytes: expected a size .*, got 1.5"),
        ("[store.breaker]\nfailures = 'two'", "failures: expected an integer of at least 1"),
        ("codec = [['raw']]", "config: expected values of the right types, got codec: list"),
        ("codec = 8", "codec: expected a name or a list of them, got 8"),
        ("block_size = 65", "block_size: expected one of 16, 32"),
        ("tiers = 'memory://1GiB'", "tiers: expected a list of URLs, got one without brackets"),
        ("tiers = ['memory://1GiB', 5]", "tiers: expected a list of URLs, got int among them"),
        ("tiers = 5", "tiers: expected a list of URLs, got int"),
        ("tiers = []\nmemory_bytes = 4096", "memory_bytes: expected none beside tiers, got 4096"),
        ("tiers = [", "kv.toml: "),
    ],
)
def test_refuses_files_that_are_wrong(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        CacheConfig.from_toml(write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "tiers = 'redis://user:hidden@host/0'",
        "tiers = [['redis://user:hidden@host/0']]",
        "tiers = ['redis://user:hidden@host/0']\ncodec = 8",
        "tiers = ['redis://user:hidden@host/0']\nmemory_bytes = 4096",
        "tiers = ['redis://user:hidden@host/0']\npool_tokens = 'many'",
        "tiers = ['redis://user:hidden@host/0']\ncodec = [['raw']]",
        "store = 'redis://user:hidden@host/0'",
    ],
)
def test_does_not_show_passwords_of_what_it_refuses(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        CacheConfig.from_toml(write(tmp_path, text))
    assert "hidden" not in str(caught.value)


def test_shows_no_passwords():
    url = "redis://user:hidden@host/0"
    assert "hidden" not in repr(CacheConfig(tiers=[url]))
    assert "hidden" not in repr(parse_tier_url(url))


def test_names_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        CacheConfig.from_toml(tmp_path / "none.toml")
