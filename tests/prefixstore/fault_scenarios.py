"""What breaks, and how: each a store with traffic on it, and a fault in the middle.

A scenario is a context: it sets its servers and tiers up, yields them, and takes them down. Its
`run` breaks something, waits, and mends it, while requests go on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from certificates import make_certificates
from redis import Redis
from redis_proxy import Proxy
from redis_servers import FLAVOURS, Cluster, Server, wait_until

from prefixstore.store import BreakerConfig
from prefixstore.tiers.base import Tier
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig
from prefixstore.tiers.redis import RedisTier
from prefixstore.tiers.redis.config import RedisTierConfig

MEMORY_BYTES = 8 << 20  # about four prompts, so that most requests reach the next tier
DISK_BYTES = 256 << 20
LOAD_TIMEOUT_S = 0.5
BREAKER = BreakerConfig(failures=3, window_s=10, pause_s=0.2, max_pause_s=1)

Break = Callable[[float], None]  # for so many seconds


@dataclass
class Scene:
    """What a scenario has set up.

    Attributes:
        tier: The tier after the memory tier.
        run: Breaks it for some seconds, and mends it.
        comes_back: Whether it serves again afterwards.
    """

    tier: Tier
    run: Break
    comes_back: bool = True
    memory: MemoryTier = field(
        default_factory=lambda: MemoryTier(MemoryTierConfig(MEMORY_BYTES, 1 << 20))
    )


Scenario = Callable[[Path], "contextlib.AbstractContextManager[Scene]"]
SCENARIOS: dict[str, Scenario] = {}


class Unavailable(Exception):
    """This machine cannot play a scenario; says why."""


def scenario(name: str) -> Callable[[Callable[[Path], Iterator[Scene]]], Scenario]:
    """Add a scenario to the table."""

    def decorate(function: Callable[[Path], Iterator[Scene]]) -> Scenario:
        SCENARIOS[name] = contextmanager(function)
        return SCENARIOS[name]

    return decorate


# ---- Redis ---------------------------------------------------------------------------------------


def find_program(flavour: str = "valkey") -> Path:
    if flavour not in FLAVOURS:
        raise Unavailable(f"no {flavour} server is installed")
    return FLAVOURS[flavour]


def redis_tier(url: str, **settings: object) -> RedisTier:
    return RedisTier(RedisTierConfig.from_url(url, **settings))


@contextmanager
def server(directory: Path, options: dict[str, str] | None = None) -> Iterator[Server]:
    one = Server(find_program(), directory, options)
    try:
        yield one
    finally:
        one.kill()


@scenario("redis: kill -9, restarted empty")
def killed_redis(directory: Path) -> Iterator[Scene]:
    with server(directory) as redis:

        def run(seconds: float) -> None:
            redis.kill()
            time.sleep(seconds)
            redis.start()

        yield Scene(redis_tier(redis.url), run)


@scenario("redis: SIGSTOP")
def stopped_redis(directory: Path) -> Iterator[Scene]:
    with server(directory) as redis:

        def run(seconds: float) -> None:
            with redis.stopped():
                time.sleep(seconds)

        yield Scene(redis_tier(redis.url), run)


@scenario("redis: emptied")
def emptied_redis(directory: Path) -> Iterator[Scene]:
    with server(directory) as redis:

        def run(seconds: float) -> None:
            with redis.client() as client:
                client.flushall()
            time.sleep(seconds)

        yield Scene(redis_tier(redis.url), run)


@scenario("redis: maxmemory, noeviction")
def full_redis(directory: Path) -> Iterator[Scene]:
    with server(directory, {"maxmemory-policy": "noeviction"}) as redis:

        def run(seconds: float) -> None:
            with redis.client() as client:
                client.config_set("maxmemory", 1 << 20)
                time.sleep(seconds)
                client.config_set("maxmemory", 0)

        yield Scene(redis_tier(redis.url), run)


@scenario("redis: maxmemory, allkeys-lru")
def evicting_redis(directory: Path) -> Iterator[Scene]:
    with server(directory, {"maxmemory-policy": "allkeys-lru"}) as redis:

        def run(seconds: float) -> None:
            with redis.client() as client:
                client.config_set("maxmemory", 16 << 20)
                time.sleep(seconds)
                client.config_set("maxmemory", 0)

        yield Scene(redis_tier(redis.url), run)


@scenario("redis: wrong password")
def locked_redis(directory: Path) -> Iterator[Scene]:
    with server(directory, {"requirepass": "right"}) as redis:

        def run(seconds: float) -> None:
            with Redis(port=redis.port, password="right") as client:
                client.config_set("requirepass", "another")
                client.client_kill_filter(_type="normal", skipme=True)
                time.sleep(seconds)
                client.config_set("requirepass", "right")

        yield Scene(redis_tier(redis.url, password="right"), run)


@scenario("redis: 10 KB/s")
def slow_redis(directory: Path) -> Iterator[Scene]:
    with server(directory) as redis:
        proxy = Proxy(redis.port)

        def run(seconds: float) -> None:
            proxy.bytes_per_s = 10_000
            time.sleep(seconds)
            proxy.bytes_per_s = None

        try:
            yield Scene(redis_tier(proxy.url), run)
        finally:
            proxy.close()


@scenario("redis: TLS certificate of another CA")
def foreign_redis(directory: Path) -> Iterator[Scene]:
    files = make_certificates(directory)
    own = str(files["foreign"])
    options = {"tls-cert-file": own, "tls-key-file": own, "tls-ca-cert-file": str(files["ca"])}
    options["tls-auth-clients"] = "no"
    tls = {"ssl": True, "ssl_cert_reqs": "none"}
    redis = Server(find_program("redis"), directory, options, tls)
    try:
        url = redis.url.replace("redis://", "rediss://") + f"?tls_ca_file={files['ca']}"
        yield Scene(redis_tier(url), time.sleep, comes_back=False)
    finally:
        redis.kill()


@scenario("redis cluster: a primary killed")
def failing_cluster(directory: Path) -> Iterator[Scene]:
    cluster = Cluster(find_program(), directory)

    def run(seconds: float) -> None:
        wait_until(cluster.nodes[0].is_replicated)
        cluster.nodes[0].kill()
        time.sleep(seconds)

    try:
        yield Scene(redis_tier(cluster.url), run)
    finally:
        cluster.kill()


# ---- disk ----------------------------------------------------------------------------------------


def disk_tier(path: Path) -> DiskTier:
    return DiskTier(DiskTierConfig(path, DISK_BYTES, slab_bytes=8 << 20))


def slab_files(path: Path) -> list[Path]:
    return sorted(path.glob("slab-v*.kvb"))


@scenario("disk: full")
def full_disk(directory: Path) -> Iterator[Scene]:
    """A file system smaller than the tier's bound, which then fills up."""
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(directory)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        raise Unavailable(f"no file system can be mounted here: {mounted.stderr.strip()}")
    filler = directory / "filler"

    def run(seconds: float) -> None:
        free = shutil.disk_usage(directory).free
        with contextlib.suppress(OSError), filler.open("wb") as file:
            file.write(bytes(free))
        time.sleep(seconds)
        filler.unlink()

    try:
        # the tier itself fills the disk, so its index cannot be written or checked
        yield Scene(disk_tier(directory / "tier"), run, comes_back=False)
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


@scenario("disk: files truncated")
def truncated_disk(directory: Path) -> Iterator[Scene]:
    def run(seconds: float) -> None:
        for path in slab_files(directory):
            os.truncate(path, path.stat().st_size // 2 + 100)
        time.sleep(seconds)

    yield Scene(disk_tier(directory), run)


@scenario("disk: bits flipped in 1 % of the records")
def flipped_disk(directory: Path) -> Iterator[Scene]:
    random = np.random.default_rng(0)

    def run(seconds: float) -> None:
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            for path in slab_files(directory):
                _, _, shape = path.stem.rpartition("-")
                slot_bytes, num_slots = (int(word) for word in shape.split("x"))
                for slot in np.flatnonzero(random.random(num_slots) < 0.01).tolist():
                    _flip_bit(path, slot * slot_bytes + int(random.integers(slot_bytes)), random)
            time.sleep(0.2)

    yield Scene(disk_tier(directory), run)


def _flip_bit(path: Path, position: int, random: np.random.Generator) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(position)
        byte = file.read(1)
        if byte:
            file.seek(position)
            file.write(bytes([byte[0] ^ 1 << int(random.integers(8))]))


@scenario("disk: folder removed")
def removed_disk(directory: Path) -> Iterator[Scene]:
    def run(seconds: float) -> None:
        while directory.exists():  # a put under way can make a file just before its folder goes
            shutil.rmtree(directory, ignore_errors=True)
        time.sleep(seconds)

    yield Scene(disk_tier(directory), run, comes_back=False)
