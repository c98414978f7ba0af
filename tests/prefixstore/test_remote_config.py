"""URLs and bounds of remote tiers, and secrets that are never shown."""

import subprocess
import sys

import pytest

from prefixstore.errors import ConfigError, TierUnavailable
from prefixstore.store import TierPolicy
from prefixstore.tier_urls import open_tiers
from prefixstore.tiers.remote import RemoteTier
from prefixstore.tiers.remote.config import RemoteTierConfig


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        ("s3://bucket", {"kind": "s3", "bucket": "bucket", "prefix": "", "root": "1"}),
        (
            "s3://bucket/kv/cache/?region=eu-central-1&endpoint=http://127.0.0.1:8333&ttl=7d",
            {
                "prefix": "kv/cache",
                "root": "kv/cache/1",
                "region": "eu-central-1",
                "endpoint": "http://127.0.0.1:8333",
                "ttl_s": 604800,
            },
        ),
        (
            "gs://bucket/kv?timeout=5s&connect_timeout=500ms&request_timeout=2&sweep_timeout=1h",
            {
                "kind": "gs",
                "timeout_s": 5,
                "connect_timeout_s": 0.5,
                "request_timeout_s": 2,
                "sweep_timeout_s": 3600,
            },
        ),
        (
            "az://container/kv?account=ours&max_requests=8&max_in_flight_bytes=64MiB&name=cold",
            {
                "kind": "az",
                "account": "ours",
                "max_requests": 8,
                "max_in_flight_bytes": 64 << 20,
                "name": "cold",
            },
        ),
        ("file:///var/kv@home", {"bucket": "/var/kv@home"}),
        ("file:///var/kv%20cache", {"kind": "file", "bucket": "/var/kv cache", "prefix": ""}),
        (
            "s3://bucket?anonymous=true&max_retries=0&part_bytes=8MiB",
            {"anonymous": True, "max_retries": 0, "part_bytes": 8 << 20},
        ),
    ],
)
def test_reads_urls(url, fields):
    config = RemoteTierConfig.from_url(url)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket", "kind: expected one of az, file, gs, s3, got 's4'; did you mean s3"),
        ("s3://bucket?regoin=x", "got 'regoin'; did you mean region"),
        ("s3://bucket?account=x", "s3: option: expected one of .*, got 'account'"),
        ("file:///kv?region=x", "file: option: expected one of .*, got 'region'"),
        ("s3://bucket?ttl=1h&ttl=2h", "s3: expected each option once, got ttl twice$"),
        ("s3://bucket?ttl=soon", "ttl: expected a time"),
        ("s3://bucket?ttl=0", "ttl_s: expected more than 0, got 0"),
        ("s3://bucket?max_requests=0", "max_requests: expected an integer of at least 1, got 0"),
        ("s3://bucket?part_bytes=1MiB", "part_bytes: expected an integer of at least 5242880"),
        ("s3://bucket?endpoint=127.0.0.1:8333", "endpoint: expected http://host:port"),
        ("s3://bucket?endpoint=http://a:b:c", "endpoint: expected http://host:port"),
        ("s3://bucket?endpoint=http://a:99999", "endpoint: expected http://host:port"),
        ("s3://bucket?endpoint=http://a%20b", "endpoint: expected http://host:port"),
        ("s3://bucket?endpoint=http://host/path", "endpoint: expected http://host:port"),
        ("s3:///prefix", "bucket: expected the name of a bucket, got ''"),
        ("s3://bucket/a//b", "prefix: expected letters"),
        ("s3://bucket/a/../b", "prefix: expected letters"),
        ("s3://bucket/a%20b", "prefix: expected letters"),
        ("file://host/kv", "expected file:///directory"),
        ("file:kv", "expected file:///directory"),
        ("file:///kv#1?ttl=7d", "url: expected no #"),
        ("s3://bucket#kv", "url: expected no #"),
        ("s3://[bucket/kv", "url: expected a URL, got one with a broken host"),
        ("s3://bucket:80/kv", "url: expected the name of a bucket alone"),
        ("s3://bucket/a@b", "url: expected no @ after the host"),
    ],
)
def test_refuses_urls(url, message):
    with pytest.raises(ConfigError, match=message):
        RemoteTierConfig.from_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hidden@bucket/kv",
        "s3://key:hid/hidden@bucket/kv",
        "s3://key:hidden/x@bucket/kv",
        "s3://key:x?hidden@bucket/kv",
        "s3://key:hidden#x@bucket/kv",
        "s3://key:[hidden@bucket/kv",
        "s3://key:hidden/bucket",
        "s3://bucket?secret_access_key=hidden",
        "s3://bucket?endpoint=http://key:hidden@127.0.0.1:1",
        "az://container?endpoint=https://host/?sig=hidden",
    ],
)
@pytest.mark.parametrize("read", [RemoteTierConfig.from_url, lambda url: open_tiers([url])])
def test_does_not_show_secrets_that_it_refuses(url, read):
    with pytest.raises(ConfigError) as caught:
        read(url)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/kv?region=eu-central-1",
        "gs://bucket/kv?anonymous=true",
        "az://container/kv?account=ours",
        "az://container/kv?account=ours&endpoint=http://127.0.0.1:1/",
    ],
)
def test_opens_without_a_server(url, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ours")
    tier = RemoteTier(RemoteTierConfig.from_url(url))
    assert tier.pin_many([]) == []
    tier.close()


def test_says_that_the_environment_lacks_something(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ConfigError, match="the environment's settings for az:// are refused"):
        RemoteTier(RemoteTierConfig.from_url("az://container"))


def test_says_what_a_directory_met(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TierUnavailable, match=r"remote: .*file/kv: cannot be made"):
        RemoteTier(RemoteTierConfig("file", str(tmp_path / "file" / "kv")))


def test_names_the_extra_where_obstore_is_missing():
    program = (
        "import sys; sys.modules['obstore'] = None\n"
        "from prefixstore.tiers.remote import RemoteTier\n"
        "from prefixstore.tiers.remote.config import RemoteTierConfig\n"
        "RemoteTier(RemoteTierConfig('s3', 'bucket'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ConfigError: remote tier: expected the package obstore, got none" in done.stderr
    assert "pip install kvkernels[remote]" in done.stderr


def test_a_url_opens_one_that_is_spared_blocks_used_once(tmp_path):
    urls = ["memory://1MiB", f"file://{tmp_path}/kv?ttl=7d&max_requests=4&name=shared"]
    tiers, policies = open_tiers(urls)
    assert isinstance(tiers[1], RemoteTier) and tiers[1].name == "shared"
    assert policies["shared"] == TierPolicy("write_second_touch")
    for tier in tiers:
        tier.close()
