"""Which requests are allowed: API keys and their file, hosts, pages for operators."""

from hashlib import sha256

import pytest
from chat_model import chat_tokenizer
from scripted_engine import ScriptedEngine
from serving import CHAT, MODEL, PATHS, serving

from prefixstore.errors import ConfigError
from prefixstore.server.keys import ApiKeys

HOSTS = ("127.0.0.1", "localhost:80", "[::1]:80", "127.8.8.8", "LOCALHOST")
OTHER_HOSTS = ("evil.example", "localhost.evil.example:80", "10.0.0.1", "[::2]", "[", "", "a b")
KEYS = """
[[keys]]
tenant = "research"
key = "kvk-of-research-1"
[[keys]]
tenant = "research"
sha256 = "{digest}"
[[keys]]
tenant = "operations"
salt = "other"
key = "kvk-of-operations"
is_operator = true
"""


@pytest.fixture(scope="module")
def engine():
    engine = ScriptedEngine(chat_tokenizer())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine) as running:
        yield running


@pytest.mark.parametrize("host", [*HOSTS, *OTHER_HOSTS])
def test_a_page_of_another_site_cannot_ask_through_a_browser(server, host):
    answer = server.get("/v1/models", headers={"host": host})
    if host in HOSTS:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "host_not_allowed"


def test_any_host_name_will_do_where_anyone_may_ask(engine):
    with serving(engine, allow_anonymous=True) as server:
        answer = server.get("/v1/models", headers={"host": "models.example"})
        assert answer.status_code == 200


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(KEYS.format(digest=sha256(b"kvk-of-research-2").hexdigest()))
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def locked_server(engine, key_file):
    with serving(engine, api_keys_file=key_file) as running:
        yield running


@pytest.mark.parametrize(
    ("key", "tenant", "salt"),
    [
        ("kvk-of-research-1", "research", "research"),
        ("kvk-of-research-2", "research", "research"),
        ("kvk-of-operations", "operations", "other"),
    ],
)
def test_a_key_decides_tenant_and_salt(engine, locked_server, key, tenant, salt):
    locked_server.client(key).completions.create(model=MODEL, prompt="Hello")
    assert (engine.asked[-1].tenant, engine.asked[-1].salt) == (tenant, salt)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "Bearer",
        "Bearer wrong",
        "Basic a3ZrLW9mLXJlc2VhcmNoLTE=",
        "kvk-of-research-1",
        "Bearer kvk-of-research-1x",
        "Bearer " + "x" * 20_000,
        "Bearer \xe9\xff",
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing", PATHS[0], PATHS[1]])
def test_without_its_key_nothing_is_answered(engine, locked_server, authorization, path):
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    num_asked = len(engine.asked)
    for answer in (
        locked_server.get(path, headers=headers),
        locked_server.post(path, CHAT, headers=headers),
    ):
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert len(engine.asked) == num_asked


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/metrics"])
def test_health_and_metrics_need_no_key(locked_server, path):
    assert locked_server.get(path).status_code == 200


def test_pages_are_for_operators(locked_server):
    page = "/openapi.json"
    assert locked_server.get(page).headers["www-authenticate"].startswith("Basic ")
    for key, status in [("kvk-of-research-1", 401), ("kvk-of-operations", 200)]:
        assert locked_server.get(page, auth=("anyone", key)).status_code == status
        headers = {"authorization": f"Bearer {key}"}
        assert locked_server.get(page, headers=headers).status_code == status
    assert locked_server.get(page, headers={"authorization": "Basic ?"}).status_code == 401


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"expected one \[\[keys\]\] or more"),
        ("keys = ['secret-secret-secret']", r"keys\[0\]: expected a table"),
        ("[[keys]]\nkey = 'secret-secret-secret'", r"keys\[0\].tenant: expected 1 to 64"),
        ("[[keys]]\ntenant = 'a'", "expected either key or sha256"),
        ("[[keys]]\ntenant = 'a'\nkey = 'secret'", "expected 16 characters or more"),
        ("[[keys]]\ntenant = 'a'\nsha256 = 'secret'", "expected 64 hexadecimal digits"),
        ("[[keys]]\ntenant = 'a'\nsha256 = 5", "expected 64 hexadecimal digits"),
        ("[[keys]]\ntenant = 'a'\nkey = 'secret-secret-secret'\nsalt = ''", "salt: expected"),
        ("[[keys]]\ntenant = 'a'\nkey = 'secret-secret-secret'\nsalts = 'a'", "did you mean salt"),
        ("[[keys]]\ntenant = 'a'\nkey = 'secret-secret-secret'\nis_operator = 1", "is_operator"),
        ("[[key]]", "did you mean keys"),
        (
            "[[keys]]\ntenant = 'a'\nkey = 'secret-secret-secret'\n"
            "[[keys]]\ntenant = 'b'\nkey = 'secret-secret-public'\nsalt = 'a'",
            r"keys\[1\].salt: expected one of its own for tenant 'b', got that of 'a'",
        ),
        (
            "[[keys]]\ntenant = 'a'\nkey = 'secret-secret-secret'\n"
            "[[keys]]\ntenant = 'b'\nkey = 'secret-secret-secret'",
            "expected a key of its own",
        ),
    ],
)
def test_refuses_a_wrong_key_file_without_showing_keys(tmp_path, content, message):
    path = tmp_path / "keys.toml"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys.from_file(path)
    assert "secret" not in str(caught.value)


def test_refuses_a_key_file_that_others_may_read(key_file):
    key_file.chmod(0o640)
    with pytest.raises(ConfigError, match=r"only its owner may read.*got mode 640"):
        ApiKeys.from_file(key_file)
