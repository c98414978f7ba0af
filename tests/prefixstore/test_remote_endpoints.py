"""Which server a remote tier uses: its URL's, or else the environment's, also by plain HTTP."""

import json
import os

import pytest
from faulty_network import ScriptedServer
from sample_blocks import make_keys

from prefixstore.errors import ConfigError, TierUnavailable
from prefixstore.tiers.remote import RemoteTier
from prefixstore.tiers.remote.config import RemoteTierConfig

(KEY,) = make_keys(1)
NOWHERE = "http://127.0.0.1:1"
SETTINGS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "hidden",
    "AWS_REGION": "us-east-1",
    "AZURE_STORAGE_ACCOUNT_NAME": "tester",
    "AZURE_STORAGE_ACCOUNT_KEY": "aGlkZGVu",
    "GOOGLE_SKIP_SIGNATURE": "true",
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture
def set_environment(monkeypatch):
    """Sets the given variables, and removes all others of the three clouds."""

    def set_all(**variables: str) -> None:
        for name in list(os.environ):
            if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
                monkeypatch.delenv(name)
        for name, value in (SETTINGS | variables).items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.fixture
def server():
    server = ScriptedServer()
    yield server
    server.close()


def ask(kind: str, **fields: object) -> bool:
    tier = RemoteTier(RemoteTierConfig(kind, "bucket", max_retries=0, **fields))
    try:
        return tier.contains(KEY.name)
    finally:
        tier.close()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("s3", "AWS_ENDPOINT"),
        ("s3", "AWS_ENDPOINT_URL"),
        ("s3", "AWS_ENDPOINT_URL_S3"),
        ("az", "AZURE_ENDPOINT"),
        ("az", "AZURE_STORAGE_ENDPOINT"),
        ("gs", "GOOGLE_BASE_URL"),
    ],
)
def test_asks_the_server_of_the_environment(server, set_environment, kind, name):
    set_environment(**{name: server.endpoint})
    assert not ask(kind)
    assert [method for method, _, _ in server.requests] == ["HEAD"]


def test_asks_one_that_has_a_path(server, set_environment):
    set_environment(AWS_ENDPOINT_URL=f"{server.endpoint}/storage/v1")
    assert not ask("s3")
    assert server.requests[0][1].startswith("/storage/v1/bucket/")


def test_goes_by_the_strongest_variable(server, set_environment):
    set_environment(AWS_ENDPOINT_URL_S3=server.endpoint, AWS_ENDPOINT_URL="", AWS_ENDPOINT="odd")
    assert not ask("s3")
    assert server.requests


@pytest.mark.parametrize("name", ["AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_goes_by_its_url_before_the_environment(server, set_environment, name):
    set_environment(**{name: NOWHERE})
    assert not ask("s3", endpoint=server.endpoint)
    assert server.requests


@pytest.mark.parametrize(
    "endpoint",
    [
        *("", "127.0.0.1:9000", "localhost", "ftp://host", "http://", "http://a:b:c"),
        *("http://a:99999", "http://a b", "http://user:hidden@host"),
    ],
)
@pytest.mark.parametrize(("kind", "name"), [("s3", "AWS_ENDPOINT_URL"), ("gs", "GOOGLE_BASE_URL")])
def test_refuses_an_endpoint_that_is_none(set_environment, kind, name, endpoint):
    set_environment(**{name: endpoint})
    with pytest.raises(ConfigError, match=rf"{name}: expected http://host:port") as caught:
        ask(kind)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(("says", "is_asked"), [("TRUE", True), ("0", False), (None, False)])
def test_asks_by_plain_http_where_the_environment_allows_it(
    server, set_environment, says, is_asked
):
    account = {"gcs_base_url": server.endpoint, "disable_oauth": True}  # as emulators have it
    account |= dict.fromkeys(("private_key", "private_key_id", "client_email"), "")
    allows = {} if says is None else {"GOOGLE_ALLOW_HTTP": says}
    set_environment(GOOGLE_SERVICE_ACCOUNT_KEY=json.dumps(account), **allows)
    if is_asked:
        assert not ask("gs")
    else:
        with pytest.raises(TierUnavailable, match="expected a server's address by https://"):
            ask("gs")
    assert bool(server.requests) == is_asked
