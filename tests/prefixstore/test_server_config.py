"""`kvkernels serve`: its options, its file, where it listens, and a server mounted elsewhere."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
from chat_model import chat_tokenizer
from click.testing import CliRunner
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from scripted_engine import ScriptedEngine
from serving import MODEL

from prefixstore.commands import kvkernels
from prefixstore.config import CacheConfig
from prefixstore.engine import EngineConfig
from prefixstore.errors import ConfigError
from prefixstore.server import command
from prefixstore.server.app import create_app
from prefixstore.server.config import ServeConfig, ServerConfig
from prefixstore.server.run import DrainingServer, bind_address, serve_until_signal

FILE = """
[server]
port = 9000
drain_timeout_s = "2m"
retry_after_s = "2s"
max_body_bytes = "1MiB"

[engine]
max_running = 4

[cache]
tiers = ["memory://1GiB"]
codec = "l12"

[cache.store]
load_timeout_s = "2s"
"""


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Run the command up to loading the model; returns what it would serve."""
    seen = []
    monkeypatch.setattr(command, "run_server", lambda *arguments: seen.append(arguments))
    path = tmp_path / "serve.toml"
    path.write_text(FILE)

    def run(*arguments):
        arguments = [str(path) if one == "FILE" else one for one in arguments]
        result = CliRunner().invoke(kvkernels, ["serve", *arguments])
        return (seen[-1] if seen and result.exit_code == 0 else None), result

    return run


def test_serves_with_what_the_parts_have_by_default(serve):
    (model, dtype, device, config), _ = serve("smollm2")
    assert (model, dtype, device) == ("smollm2", "auto", "auto")
    assert config == ServeConfig(ServerConfig(), EngineConfig(), CacheConfig())
    assert config.server.host == "127.0.0.1"


def test_reads_a_file(serve):
    (*_, config), _ = serve("model", "--config", "FILE")
    assert (config.server.port, config.server.drain_timeout_s) == (9000, 120)
    assert config.server.retry_after_s == 2
    assert config.server.max_body_bytes == 1 << 20
    assert config.engine.max_running == 4
    assert config.cache.tier_urls == ["memory://1GiB"]
    assert config.cache.codec == "l12"
    assert config.cache.store.load_timeout_s == 2


def test_options_come_before_the_file(serve):
    (*_, config), _ = serve(
        *("model", "--config", "FILE", "--port", "0", "--host", "::1", "--max-running", "2"),
        *("--max-batch-tokens", "64", "--max-queued", "3", "--max-model-len", "1000"),
        *("--tier", "memory://2GiB", "--tier", "disk:///var/kv", "--codec", "q8"),
        *("--pool-tokens", "4096", "--block-size", "16", "--model-name", "m"),
        *("--drain-timeout", "5", "--api-keys", "keys.toml", "--allow-anonymous"),
        "--no-cuda-graphs",
    )
    assert config.server == ServerConfig(
        host="::1",
        port=0,
        model_name="m",
        api_keys_file=Path("keys.toml"),
        allow_anonymous=True,
        drain_timeout_s=5,
        retry_after_s=2,
        max_body_bytes=1 << 20,
    )
    assert config.engine == EngineConfig(
        max_running=2, max_batch_tokens=64, max_queued=3, max_model_len=1000, cuda_graphs=False
    )
    assert config.cache.tier_urls == ["memory://2GiB", "disk:///var/kv"]
    assert (config.cache.codec, config.cache.pool_tokens) == ("q8", 4096)
    assert config.cache.block_size == 16


def test_the_cache_can_be_left_out(serve):
    (*_, config), _ = serve("model", "--config", "FILE", "--no-cache")
    assert config.cache.tier_urls == []
    assert not config.engine.reuses_prefixes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-cache", "--tier", "memory://1GiB"], "--tier: expected none with --no-cache"),
        (["--port", "70000"], "port: expected 0 to 65535, got 70000"),
        (["--max-running", "0"], "max_running: expected a positive integer, got 0"),
        (["--codec", "zip"], "codec: expected one of"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--drain-timeout", "0"], "drain_timeout_s: expected more than 0"),
        (["--config", "nowhere.toml"], "config: nowhere.toml: No such file"),
    ],
)
def test_refuses_wrong_options(serve, arguments, message):
    config, result = serve("model", *arguments)
    assert config is None
    assert result.exit_code != 0
    assert message in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[servers]", "did you mean server"),
        ("server = 5", "server: expected a table, got int"),
        ("[server]\nprot = 5", "did you mean port"),
        ("[engine]\nmax_runing = 5", "did you mean max_running"),
        ("[cache]\ntier = []", "did you mean tiers"),
        ("[cache.stor]", "did you mean store"),
        ("[server]\nport = 'http'", "port: expected 0 to 65535, got 'http'"),
        ("[server]\nhost = 5", "host: expected a string"),
        ("[server]\nmodel_name = ''", "model_name: expected a string that is not empty"),
        ("[server]\nallow_anonymous = 'yes'", "allow_anonymous: expected a boolean"),
        ("[server]\napi_keys_file = 5", "api_keys_file: expected a path"),
        ("[server]\nmax_tokens = 0", "max_tokens: expected a positive integer"),
        ("[server]\nmax_choices = true", "max_choices: expected a positive integer"),
        ("[server]\nbody_timeout_s = -1", "body_timeout_s: expected a time"),
        ("[server]\nidle_timeout_s = 1e30", "idle_timeout_s: expected at most 2073600, got 1e.30"),
        ("[server]\nbody_timeout_s = inf", "body_timeout_s: expected a time"),
        ("[server", "config:"),
    ],
)
def test_refuses_a_wrong_file(tmp_path, content, message):
    path = tmp_path / "serve.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        ServeConfig.from_toml(path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_listens_to_others_only_with_keys_or_when_told(host):
    with pytest.raises(ConfigError, match="expected a loopback address where there are no API"):
        bind_address(ServerConfig(host=host, port=0))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_listens_on_a_port_that_the_kernel_chooses(host):
    with bind_address(ServerConfig(host=host, port=0)) as listener:
        assert listener.getsockname()[1] > 0


def test_nobody_can_connect_before_it_is_served():
    with bind_address(ServerConfig(port=0)) as bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname(), 10)


def test_refuses_its_key_file_before_it_looks_for_the_model(tmp_path):
    server = ServerConfig(port=0, api_keys_file=tmp_path / "keys.toml")
    with pytest.raises(ConfigError, match=r"keys\.toml: No such file"):
        command.run_server("no such model", "auto", "cpu", ServeConfig(server))


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        (("disk://kv",), "tiers: disk: expected an absolute path"),
        (("memory://1GiB", "memory://2GiB"), "tiers: expected distinct names"),
    ],
)
def test_refuses_its_tiers_before_it_looks_for_the_model(tiers, message):
    config = ServeConfig(ServerConfig(port=0), cache=CacheConfig(tiers=tiers))
    with pytest.raises(ConfigError, match=message):
        command.run_server("no such model", "auto", "cpu", config)


@pytest.mark.parametrize("device", ["foo", "cuda:99", ""])
def test_refuses_a_device_that_is_not_there_before_it_looks_for_the_model(device):
    with pytest.raises(ConfigError, match=f"device: expected one of this machine, got '{device}'"):
        command.run_server("no such model", "auto", device, ServeConfig(ServerConfig(port=0)))


def test_answers_wait_for_no_acknowledgement():
    """asyncio sets TCP_NODELAY only on sockets created with an explicit protocol."""
    with bind_address(ServerConfig(port=0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_says_when_an_address_cannot_be_had():
    with bind_address(ServerConfig(port=0)) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port}: Address already in use"):
            bind_address(ServerConfig(port=port))
    for host in ("no such host", "a" * 64):  # the second is longer than a name's parts may be
        with pytest.raises(ConfigError, match="host: expected an address"):
            bind_address(ServerConfig(host=host, port=0))


def test_refuses_an_address_that_another_has_before_it_looks_for_the_model():
    """Whose model may be loading just then."""
    with bind_address(ServerConfig(port=0)) as bound:
        server = ServerConfig(port=bound.getsockname()[1])
        with pytest.raises(ConfigError, match=f"port {server.port}: Address already in use"):
            command.run_server("no such model", "auto", "cpu", ServeConfig(server))


def end_with_a_connection(listener):
    """Serve one client, and leave the connection's end to the system."""
    with socket.create_connection(listener.getsockname(), 60) as client:
        listener.accept()[0].close()
        assert client.recv(1) == b""
    listener.close()


def test_has_the_address_of_a_server_that_has_just_ended(monkeypatch):
    engine = ScriptedEngine(chat_tokenizer())
    config, served = ServerConfig(port=0), []

    def serve(server, sockets):
        served.extend(sockets)
        end_with_a_connection(*sockets)

    monkeypatch.setattr(DrainingServer, "run", serve)
    for _ in range(3):
        listener = bind_address(config)
        config = replace(config, port=listener.getsockname()[1])
        with pytest.raises(ConfigError, match="Address already in use"):
            bind_address(config)
        serve_until_signal(create_app(engine, config), engine, config, listener)
    assert len(served) == 3


def test_says_when_another_took_the_address_meanwhile():
    engine = ScriptedEngine(chat_tokenizer())
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", 0) if one is first else first.getsockname())
        first.listen()
        config = ServerConfig(port=first.getsockname()[1])
        message = f"127.0.0.1 port {config.port}: Address already in use"
        with pytest.raises(ConfigError, match=message):
            serve_until_signal(create_app(engine, config), engine, config, second)
    assert engine.was_flushed and engine.is_closed


@pytest.fixture(scope="module")
def engine():
    engine = ScriptedEngine(chat_tokenizer())
    yield engine
    engine.close()


@pytest.mark.parametrize("is_mounted", [False, True], ids=["alone", "mounted"])
def test_an_application_can_mount_it(engine, is_mounted):
    app = create_app(engine, ServerConfig(model_name=MODEL))
    if is_mounted:
        outer = FastAPI()
        outer.mount("/llm", app)
        app = outer
    prefix = "/llm" if is_mounted else ""
    client = TestClient(app, base_url="http://localhost")
    body = {"model": MODEL, "prompt": "Hello"}
    assert client.post(f"{prefix}/v1/completions", json=body).status_code == 200
    assert client.get(f"{prefix}/health").json() == {"status": "ok"}
    assert client.get(f"{prefix}/metrics").status_code == 200
    assert client.post(f"{prefix}/v1/completions", content=b"x" * 5).status_code == 415


def test_a_dashboard_is_served_from_the_root(engine):
    router = APIRouter()

    @router.get("/")
    def page():
        return "the page"

    client = TestClient(create_app(engine, dashboard=router), base_url="http://localhost")
    assert client.get("/").json() == "the page"
    assert client.get("/v1/models").json()["data"][0]["id"] == "default"


def test_refuses_its_key_file_at_once(engine, tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        create_app(engine, ServerConfig(api_keys_file=tmp_path / "keys.toml"))
