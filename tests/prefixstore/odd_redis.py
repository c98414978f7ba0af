"""A small Redis in this process, which can be told to answer a command with anything at all."""

from __future__ import annotations

import fnmatch
import socketserver
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

Value = bytes | set[bytes]

WRONG_TYPE = b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"
INFO = (
    "maxmemory:0\r\nused_memory:9\r\nevicted_keys:0\r\nexpired_keys:0\r\ndb0:keys=3,expires=2\r\n"
)


class OddRedis(socketserver.ThreadingTCPServer):
    """Serves one database over TCP, as a server of its own, a cluster's only node, and a sentinel.

    Attributes:
        data: What it keeps, by key. Nothing expires.
        counts: How often each command came since it was last cleared.
        oddity: Which reply each command gets in the place of the right one, which is made all the
            same; None for the right one. It is given the command, how often it came before, and
            the right reply.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Client)
        self.data: dict[bytes, Value] = {}
        self.counts: Counter[bytes] = Counter()
        self.oddity: Callable[[bytes, int, bytes], bytes | None] = lambda *_: None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def answer(self, words: list[bytes]) -> bytes:
        with self._lock:
            name = words[0].upper()
            try:
                right = encode(getattr(self, f"do_{name.decode().lower()}")(*words[1:]))
            except TypeError:  # a set where a string is expected, or the other way round
                right = WRONG_TYPE
            odd = self.oddity(name, self.counts[name], right)
            self.counts[name] += 1
        return right if odd is None else odd

    # ---- commands ------------------------------------------------------------------------------

    def do_get(self, key: bytes) -> bytes | None:
        return self._string(key)

    def do_getrange(self, key: bytes, first: bytes, last: bytes) -> bytes:
        return (self._string(key) or b"")[int(first) : int(last) + 1]

    def do_strlen(self, key: bytes) -> int:
        return len(self._string(key) or b"")

    def do_set(self, key: bytes, value: bytes, *options: bytes) -> object:
        before = self._string(key) if b"GET" in options else None
        if b"NX" in options and key in self.data:
            return None
        self.data[key] = value
        return before if b"GET" in options else "OK"

    def do_exists(self, key: bytes) -> int:
        return int(key in self.data)

    def do_unlink(self, key: bytes) -> int:
        return int(self.data.pop(key, None) is not None)

    def do_sadd(self, key: bytes, member: bytes) -> int:
        members = self._set(key)
        is_new = member not in members
        self.data[key] = members | {member}
        return int(is_new)

    def do_srem(self, key: bytes, member: bytes) -> int:
        members = self._set(key)
        if member in members:
            self.data[key] = members - {member}
        return int(member in members)

    def do_smembers(self, key: bytes) -> list[bytes]:
        return sorted(self._set(key))

    def do_expire(self, key: bytes, *_: bytes) -> int:
        return int(key in self.data)

    do_persist = do_expire

    def do_ttl(self, key: bytes) -> int:
        return -1 if key in self.data else -2

    def do_scan(self, cursor: bytes, _: bytes, pattern: bytes, *__: bytes) -> list[Any]:
        keys, half = sorted(self.data), len(self.data) // 2
        some = keys[:half] if cursor == b"0" else keys[half:]
        found = [key for key in some if fnmatch.fnmatchcase(key.decode(), pattern.decode())]
        return [b"7" if cursor == b"0" else b"0", found]

    def do_info(self, _: bytes) -> bytes:
        return INFO.encode()

    def do_cluster(self, _: bytes) -> list[Any]:
        return [[0, 16383, [b"127.0.0.1", self.port, b"id"]]]

    def do_sentinel(self, *_: bytes) -> list[bytes]:
        return [b"127.0.0.1", b"%d" % self.port]

    def do_client(self, *_: bytes) -> str:
        return "OK"

    do_asking = do_client

    def _string(self, key: bytes) -> bytes | None:
        value = self.data.get(key)
        if isinstance(value, set):
            raise TypeError
        return value

    def _set(self, key: bytes) -> set[bytes]:
        value = self.data.get(key, set())
        if not isinstance(value, set):
            raise TypeError
        return value


def encode(reply: object) -> bytes:
    """A reply as Redis sends it; a str is one of its short texts."""
    match reply:
        case None:
            return b"$-1\r\n"
        case str():
            return f"+{reply}\r\n".encode()
        case int():
            return b":%d\r\n" % reply
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case list():
            return b"*%d\r\n" % len(reply) + b"".join(map(encode, reply))
    raise AssertionError(f"expected a reply, got {reply!r}")


class _Client(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True  # else a reply waits for the acknowledgement of the one before
    server: OddRedis

    def handle(self) -> None:
        try:
            while line := self.rfile.readline():
                words = [
                    self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2]
                    for _ in range(int(line[1:]))
                ]
                self.wfile.write(self.server.answer(words))
        except OSError:
            return  # the tier has closed the connection
