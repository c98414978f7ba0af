"""URLs and settings of the Redis tier: their meaning, and refusals."""

import pytest

from prefixstore.errors import ConfigError
from prefixstore.tier_urls import open_tiers
from prefixstore.tiers.redis.address import Address, TlsConfig, Topology
from prefixstore.tiers.redis.config import RedisTierConfig

LOCAL = Address("127.0.0.1", 6379)


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        ("redis://", {"addresses": (LOCAL,), "topology": Topology.STANDALONE, "db": 0}),
        ("redis://cache.example", {"addresses": (Address("cache.example", 6379),), "tls": None}),
        ("redis://h:1/5", {"addresses": (Address("h", 1),), "db": 5}),
        ("redis://cache.example.:1", {"addresses": (Address("cache.example.", 1),)}),
        (f"redis://{'a' * 63}", {"addresses": (Address("a" * 63, 6379),)}),
        ("redis://bücher.example", {"addresses": (Address("bücher.example", 6379),)}),
        ("redis://[::1]:7000", {"addresses": (Address("::1", 7000),)}),
        ("redis://me:p%40ss%3A@h", {"username": "me", "password": "p@ss:"}),
        ("redis://me:p@ss@h", {"username": "me", "password": "p@ss"}),
        ("redis://:%2F%3F%23@h?prefix=a%40b", {"password": "/?#", "prefix": "a@b"}),
        ("redis://:secret@h", {"username": None, "password": "secret"}),
        ("rediss://h", {"tls": TlsConfig()}),
        ("rediss://h?tls_verify=no", {"tls": TlsConfig(verify=False)}),
        ("unix:///run/redis.sock?db=2", {"addresses": (Address("/run/redis.sock", 0),), "db": 2}),
        ("unix://me:pw@/run/redis.sock", {"username": "me", "password": "pw"}),
        (
            "redis+sentinel://a,b:1/primary/3",
            {
                "addresses": (Address("a", 26379), Address("b", 1)),
                "topology": Topology.SENTINEL,
                "sentinel_master": "primary",
                "db": 3,
            },
        ),
        (
            "redis+cluster://a:1,b",
            {"addresses": (Address("a", 1), Address("b", 6379)), "topology": Topology.CLUSTER},
        ),
        ("rediss+cluster://a", {"topology": Topology.CLUSTER, "tls": TlsConfig()}),
        (
            "redis://h?ttl=1.5h&refresh_ttl=no&part_bytes=2MiB&connections=3&prefix=p&name=n",
            {
                "ttl_s": 5400,
                "refresh_ttl": False,
                "part_bytes": 2 << 20,
                "num_connections": 3,
                "prefix": "p",
                "name": "n",
            },
        ),
        ("redis://h?timeout=250ms&connect_timeout=3", {"timeout_s": 0.25, "connect_timeout_s": 3}),
    ],
)
def test_reads_urls(url, fields):
    config = RedisTierConfig.from_url(url)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://h", "scheme: expected one of"),
        ("redis+clutser://h", r"did you mean redis\+cluster\?"),
        ("redis://h?tll=1h", "got 'tll'; did you mean ttl"),
        ("redis://h?ttl=1h&ttl=2h", "url: expected each option once, got ttl twice$"),
        ("redis://h?ttl=soon", "ttl: expected a time such as .* got 'soon'"),
        ("redis://h?ttl=1y", "ttl: expected"),
        ("redis://h?ttl=0", "ttl_s: expected an integer of at least 1"),
        ("redis://h?ttl=999999999999999d", "ttl_s: expected at most 3153600000, got 8639"),
        ("redis://h?name=my%20tier", "name: expected printable ASCII without spaces, got 'my"),
        ("redis://h?name=caf%C3%A9", "name: expected printable ASCII"),
        ("redis://h?name=", "name: expected printable ASCII"),
        ("redis://cache..example", r"addresses: expected hosts .* got 'cache\.\.example'"),
        (f"redis://{'a' * 64}.example", "addresses: expected hosts"),
        ("redis://a\x00b", "url: expected no zero character"),
        ("redis+cluster://a,.b:1", r"addresses: expected hosts .* got '\.b'"),
        ("redis://h?refresh_ttl=maybe", "refresh_ttl: expected true or false"),
        ("redis://h?part_bytes=1KiB", "part_bytes: expected an integer of at least 4096"),
        ("redis://h?part_bytes=1GiB", "part_bytes: expected at most"),
        ("redis://h?connections=0", "num_connections"),
        ("redis://h?timeout=0s", "timeout_s: expected more than 0"),
        ("redis://h?prefix=a{b", "prefix: expected ASCII"),
        ("redis://h?tls_verify=no", "expected a rediss:// URL"),
        ("rediss://h?tls_ca_file=/no/such/file", "tls_ca_file: expected a file"),
        ("redis://h/0/1", "expected nothing after the database"),
        ("redis://h/x", "db: expected a whole number"),
        ("redis://a,b", "addresses: expected one server, got 2"),
        ("redis://h?ttl=1h#prefix=x", "url: expected no #"),
        ("redis://:1234#5@h", "url: expected no #"),
        ("redis://:12/34@h", "url: expected no @ after the host"),
        ("redis://h?prefix=a@b", "url: expected no @ after the host"),
        ("redis://h:99999", "expected a port of 1 to 65535"),
        ("redis://h:port", "expected host:port"),
        ("redis://[::1", "broken host"),
        ("unix://run/redis.sock", "expected unix:///path"),
        ("redis+sentinel://a", "expected the master's name"),
        ("redis+cluster://a/1", "db: expected 0"),
    ],
)
def test_refuses_urls(url, message):
    with pytest.raises(ConfigError, match=message):
        RedisTierConfig.from_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:hunter2@h:x",
        "http://u:hunter2@h",
        "redis://u:hunter2@h?tll=1",
        "redis://:hunter2/x@cache.example:6379/0",  # characters that end a host
        "redis://:x/hunter2@cache.example:6379/0",
        "redis://:6380/hunter2@cache.example:6379",
        "redis://:6380/0/hunter2@cache.example:6379",
        "redis://me:6380?hunter2@cache.example/0",
        "redis://me:6380?hunter2=1@cache.example/0",
        "redis://:hunter2?x@cache.example/0",
        "redis://me:hunter2#x@cache.example/0",
        "redis://:1234#hunter2@cache.example/0",
        "redis://:[hunter2@cache.example/0",
        "unix://:hunter2/x@/run/redis.sock",
        "redis://:hunter2",  # without an @
        "redis://:6380/hunter2",
        "redis://:6380/0/hunter2",
        "unix://:hunter2/run/redis.sock",
        "redis+sentinel://a:1,me:hunter2/x@b/primary",
        "redis+cluster://a,me:hunter2",
    ],
)
@pytest.mark.parametrize("read", [RedisTierConfig.from_url, lambda url: open_tiers([url])])
def test_never_shows_passwords(url, read):
    with pytest.raises(ConfigError) as caught:
        read(url)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(RedisTierConfig.from_url("redis://u:hunter2@h"))


def test_credentials_come_from_the_environment_where_the_url_has_none(monkeypatch):
    monkeypatch.setenv("KVKERNELS_REDIS_USERNAME", "from-environment")
    monkeypatch.setenv("KVKERNELS_REDIS_PASSWORD", "its-password")
    assert RedisTierConfig.from_url("redis://h").credentials == ("from-environment", "its-password")
    assert RedisTierConfig.from_url("redis://me:mine@h").credentials == ("me", "mine")
