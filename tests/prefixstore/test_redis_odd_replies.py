"""A server whose replies are of another type than its commands' costs a tier error, no other."""

import socketserver
import threading

import pytest
from redis_tiers import make_names, open_tier

from prefixstore.errors import TierError

GENERATION = b"$16\r\n0123456789abcdef\r\n"
SLOTS_AS_TEXT = b"*1\r\n*3\r\n$1\r\n0\r\n$5\r\n16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:1\r\n"
ODD = {
    "an array for a value": ("redis", {b"GET": GENERATION, b"GETRANGE": b"*0\r\n"}),
    "a number for a generation": ("redis", {b"GET": b":5\r\n", b"SET": b":5\r\n"}),
    "short ranges": ("redis+cluster", {b"CLUSTER": b"*1\r\n*1\r\n:0\r\n"}),
    "slots as text": ("redis+cluster", {b"CLUSTER": SLOTS_AS_TEXT}),
    "numbers for an address": ("redis+sentinel", {b"SENTINEL": b"*2\r\n:1\r\n:2\r\n"}),
    "text for a port": ("redis+sentinel", {b"SENTINEL": b"*2\r\n$1\r\na\r\n$1\r\nx\r\n"}),
}


class OddServer(socketserver.ThreadingTCPServer):
    """Answers each command by its name, with `+OK` where nothing is said."""

    daemon_threads = True

    def __init__(self, replies: dict[bytes, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Client)
        self.replies = replies


class _Client(socketserver.StreamRequestHandler):
    server: OddServer

    def handle(self) -> None:
        try:
            while line := self.rfile.readline():
                words = [
                    self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2]
                    for _ in range(int(line[1:]))
                ]
                self.wfile.write(self.server.replies.get(words[0].upper(), b"+OK\r\n"))
        except OSError:
            return  # the tier has closed the connection


@pytest.mark.parametrize(("scheme", "replies"), ODD.values(), ids=ODD)
@pytest.mark.parametrize("call", ["contains_many", "delete_many", "scan"])
def test_an_odd_reply_is_the_tiers_error(scheme, replies, call):
    with OddServer(replies) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        master = "/primary" if scheme == "redis+sentinel" else ""
        tier = open_tier(f"{scheme}://127.0.0.1:{server.server_address[1]}{master}", timeout_s=1)
        try:
            if call == "scan":
                tier.list_identities()
            else:
                outcomes = getattr(tier, call)(make_names(2))
                assert all(one is False or isinstance(one, TierError) for one in outcomes)
        except TierError:
            pass
        finally:
            tier.close()
            server.shutdown()
