"""A server that answers with anything at all costs tier errors and misses, no other exceptions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from odd_redis import OddRedis, encode
from redis_tiers import make_names, open_tier, random_bytes

from prefixstore.block_key import RecordName
from prefixstore.errors import TierError, TierUnavailable
from prefixstore.record_header import MAX_RECORD_BYTES
from prefixstore.tiers.redis import RedisTier
from prefixstore.tiers.redis.records import Manifest

PART = 4096
LENGTHS = [100, 3000, 3 * PART]
RECORDS = [random_bytes(num_bytes, seed=num_bytes) for num_bytes in LENGTHS]
HEX = b"0123456789abcdef"

ODD = [
    *(encode(one) for one in (None, "OK", "", 0, 1, -1, 5, 32, 132, 1 << 40, -(1 << 63))),
    *(encode(one) for one in (b"", b"0", b"OK", b"\xff\xfe", HEX, b"9" * 5000, bytes(32))),
    *(encode(one) for one in ([], [1], [b"1"], [None, None], [b"0", None], [b"0", b"abc"])),
    *(encode(one) for one in ([b"0", [1]], [b"0", [[]]], [b"1", []], [[], []], [0, [b"a"]])),
    *(encode(one) for one in ([[b"a"]], [b"{", b"}x"], [b"a{b}c{"], [HEX, b"\xff"], [HEX * 2])),
    b"*-1\r\n",
    b"*2\r\n-ERR a\r\n-ERR b\r\n",
    b"-\r\n",
    b"-ERR what\r\n",
    b"-WRONGTYPE no\r\n",
    b"-OOM full\r\n",
    b"-READONLY no\r\n",
    b"-MOVED 5\r\n",
    b"-MOVED 5 /tmp/none:0\r\n",
    b"-MOVED 5 127.0.0.1:99999\r\n",
    b"-MOVED 5 127.0.0.1:%b\r\n" % (b"9" * 5000),
    b"-MOVED %b 127.0.0.1:1\r\n" % (b"9" * 5000),
    b"-ASK 99999 a\x00b:1\r\n",
    b"%1\r\n+a\r\n+b\r\n",
]
SLOTS = [
    [[0]],
    [[0, 16383]],
    [[b"0", b"16383", [b"127.0.0.1", 1]]],
    [[5, 3, [b"127.0.0.1", 1]]],
    [[-5, 16383, [b"127.0.0.1", 1]]],
    [[0, 16384, [b"127.0.0.1", 1]]],
    [[0, 1 << 62, [b"127.0.0.1", 1]]],
    [[0, 9000, [b"127.0.0.1", 1]], [9000, 16383, [b"127.0.0.1", 2]]],
    [[0, 16383, [b"127.0.0.1", 0]]],
    [[0, 16383, [b"/tmp/none", 0]]],
    [[0, 16383, [b"127.0.0.1", 65536]]],
    [[0, 16383, [b"127.0.0.1", b"1"]]],
    [[0, 16383, [b"127.0.0.1", None]]],
    [[0, 16383, [b"127.0.0.1"]]],
    [[0, 16383, [127, 1]]],
    [[0, 16383, [b"a\x00b", 1]]],
    [[0, 16383, [b"\xff", 1]]],
    [[0, 16383, [b"." * 70, 1]]],
    [[0, 16383, b"127.0.0.1"]],
    [0, 16383, [b"127.0.0.1", 1]],
]
PRIMARIES = [
    [b"127.0.0.1", b"0"],
    [b"/tmp/none", b"0"],
    [b"127.0.0.1", b"65536"],
    [b"127.0.0.1", b"-1"],
    [b"127.0.0.1", b"9" * 5000],
    [b"127.0.0.1", 1],
    [b"", b"1"],
    [b"a\x00b", b"1"],
    [b"a" * 300, b"1"],
    [b"\xff", b"1"],
    [1, 2],
]


def get(tier: RedisTier, names: list[RecordName], begin: int | None = None) -> None:
    """Read all records, or parts of them; what is a hit must be right."""
    outs = [bytearray(b"\xee" * (num_bytes - (begin or 0))) for num_bytes in LENGTHS]
    views = [memoryview(out) for out in outs]
    offsets = None if begin is None else [begin] * len(names)
    outcomes = tier.get_many(names, views, offsets=offsets)
    for outcome, out, record in zip(outcomes, outs, RECORDS, strict=True):
        if outcome is not None and not isinstance(outcome, TierError):
            assert outcome == len(out) and out == record[begin or 0 :]


def put(tier: RedisTier, names: list[RecordName]) -> None:
    outcomes = tier.put_many(names, [memoryview(record) for record in RECORDS])
    assert all(outcome is None or isinstance(outcome, TierError) for outcome in outcomes)


def answer(call: Callable[..., list]) -> Callable[[RedisTier, list[RecordName]], None]:
    def run(tier: RedisTier, names: list[RecordName]) -> None:
        outcomes = call(tier, names)
        assert all(isinstance(outcome, bool | TierError) for outcome in outcomes)

    return run


CALLS: dict[str, Callable[[RedisTier, list[RecordName]], object]] = {
    "get": get,
    "get small": lambda tier, names: get_small(tier, names, None),
    "get ranges": lambda tier, names: get(tier, names, 50),
    "get small ranges": lambda tier, names: get_small(tier, names, 50),
    "put": lambda tier, names: put(tier, make_names(3)),
    "put small": lambda tier, names: tier.put_many(make_names(1), [memoryview(RECORDS[0])]),
    "put of another identity": lambda tier, names: put(tier, make_names(3, b"j" * 16)),
    "put again": put,
    "contains": answer(RedisTier.contains_many),
    "delete": answer(RedisTier.delete_many),
    "delete identity": lambda tier, names: tier.delete_identity(names[0].identity),
    "pin": answer(lambda tier, names: tier.pin_many(names)),
    "unpin": answer(lambda tier, names: tier.pin_many(names, False)),
    "list": lambda tier, names: tier.list_identities(),
    "stats": lambda tier, names: tier.stats(),
    "check": lambda tier, names: (put(tier, make_names(3)), tier.check()),
    "check and fix": lambda tier, names: tier.check(fix=True),
    "sweep": lambda tier, names: tier.sweep(),
}


def get_small(tier: RedisTier, names: list[RecordName], begin: int | None) -> None:
    """Read records of one part each, whose memory has no room for more."""
    outs = [bytearray(b"\xee" * (num_bytes - (begin or 0))) for num_bytes in LENGTHS[:2]]
    offsets = None if begin is None else [begin] * 2
    outcomes = tier.get_many(names[:2], [memoryview(out) for out in outs], offsets=offsets)
    for outcome, out, record in zip(outcomes, outs, RECORDS, strict=False):
        if outcome is not None and not isinstance(outcome, TierError):
            assert outcome == len(out) and out == record[begin or 0 :]


@pytest.fixture(scope="module")
def server() -> Iterator[OddRedis]:
    server = OddRedis()
    yield server
    server.close()


class Trial:
    """A tier that others have filled, at a server that answers rightly but for what it is told."""

    def __init__(self, server: OddRedis, scheme: str = "redis") -> None:
        self.server = server
        master = "/primary" if scheme == "redis+sentinel" else ""
        url = f"{scheme}://127.0.0.1:{server.port}{master}"
        self.names = make_names(3)
        server.data.clear()
        server.oddity = lambda *_: None
        settings = {"part_bytes": PART, "prefix": "t", "timeout_s": 60, "connect_timeout_s": 60}
        other = open_tier(url, **settings)
        put(other, self.names)
        other.pin_many(self.names[1:])
        other.close()
        self.tier = open_tier(url, **settings)

    def run(self, call: Callable[[RedisTier, list[RecordName]], object]) -> Counter[bytes]:
        """Make a call; which commands the server got."""
        self.server.counts.clear()
        with suppress(TierError):
            call(self.tier, self.names)
        return self.server.counts.copy()

    def end(self) -> None:
        """The server answers rightly again: then so does the tier, at once."""
        self.server.oddity = lambda *_: None
        names = make_names(3)
        assert self.tier.put_many(names, [memoryview(record) for record in RECORDS]) == [None] * 3
        assert self.tier.contains_many(names) == [True] * 3
        outs = [bytearray(num_bytes) for num_bytes in LENGTHS]
        assert self.tier.get_many(names, [memoryview(out) for out in outs]) == LENGTHS
        assert outs == RECORDS
        self.tier.close()


def answering(
    command: bytes, reply: bytes, first: int, last: int
) -> Callable[[bytes, int, bytes], bytes | None]:
    """Give those of a command's replies that have these numbers another content."""
    return lambda name, number, right: (
        reply if name == command and first <= number <= last else None
    )


def run_odd(server: OddRedis, scheme: str, name: str, odd: list[bytes], only: bytes | None) -> None:
    """Make a call once for each of its commands and each odd reply to one of those, or to one and
    all that follow.
    """
    trial = Trial(server, scheme)
    commands = trial.run(CALLS[name])
    trial.end()
    draw = random.Random(name)
    most = 20 * sum(commands.values()) + 100
    for command in sorted(commands if only is None else {only} & commands.keys()):
        for reply in odd:
            trial = Trial(server, scheme)
            first = draw.randrange(commands[command])
            last = draw.choice([first, 1 << 60])
            server.oddity = answering(command, reply, first, last)
            counts = trial.run(CALLS[name])
            assert counts.total() < most, (command, reply, counts)
            trial.end()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", CALLS)
def test_an_odd_reply_to_any_command_is_the_tiers_error_or_a_miss(server, name):
    run_odd(server, "redis", name, ODD, None)


@pytest.mark.parametrize("begin", [None, 50], ids=["whole", "ranges"])
def test_a_number_in_the_place_of_bytes_is_no_count_of_them(server, begin):
    """The very number of bytes that were asked for, of which not one came."""
    trial = Trial(server)

    def oddity(name: bytes, number: int, right: bytes) -> bytes | None:
        num_bytes = int(right[1 : right.index(b"\r\n")]) if right[:1] == b"$" else -1
        # Generations are 16 bytes long, manifests 32; there the right reply is given.
        return encode(num_bytes) if num_bytes > 32 else None

    server.oddity = oddity
    outs = [memoryview(bytearray(num_bytes - (begin or 0))) for num_bytes in LENGTHS]
    offsets = None if begin is None else [begin] * 3
    refusal = r"expected a reply to GET(RANGE)? as Redis gives it, got b':"
    with pytest.raises(TierUnavailable, match=refusal):  # of all three records: the tier's
        trial.tier.get_many(trial.names, outs, offsets=offsets)
    assert not any(map(any, outs))
    trial.end()


@pytest.mark.parametrize("name", ["get", "put", "list", "stats"])
@pytest.mark.parametrize("scheme", ["redis+cluster", "redis+sentinel"])
def test_an_odd_map_of_servers_is_refused(server, scheme, name):
    odd, command = (SLOTS, b"CLUSTER") if scheme == "redis+cluster" else (PRIMARIES, b"SENTINEL")
    run_odd(server, scheme, name, [*map(encode, odd), *ODD], command)


@pytest.mark.parametrize("slots", SLOTS, ids=repr)
def test_slots_that_nobody_can_have_are_no_map(server, slots):
    trial = Trial(server, "redis+cluster")
    server.oddity = answering(b"CLUSTER", encode(slots), 0, 1 << 60)
    with pytest.raises(TierError, match="no node helps"):
        trial.tier.contains_many(trial.names)
    trial.end()


@pytest.mark.parametrize("place", [b":ended", b":pinned"])
@pytest.mark.parametrize("value", [b"text", {b"{", b"a}b{", b"\xff", b""}], ids=["text", "set"])
def test_what_is_no_set_of_ours_is_in_nobodys_way(server, place, value):
    trial = Trial(server)
    tier, names = trial.tier, trial.names
    generation = next(v for k, v in server.data.items() if k.endswith(b":generation"))
    stem = b"t:1:" + names[0].identity.hex().encode()
    key = stem + b":ended" if place == b":ended" else stem + b":" + generation + b":pinned"
    server.data[key] = value
    assert tier.pin_many(names) == [True] * 3
    assert tier.pin_many(names, False) == [True] * 3
    assert tier.delete_many(names[:1]) == [True]
    server.data[key] = value
    tier.delete_identity(names[0].identity)
    assert tier.contains_many(names) == [False] * 3
    trial.end()


@pytest.mark.parametrize("name", CALLS)
def test_a_value_that_names_very_many_parts_costs_few_commands(server, name):
    trial = Trial(server)
    for key in [key for key in server.data if key.endswith(b"}")]:
        server.data[key] = Manifest(MAX_RECORD_BYTES, 2049, bytes(8)).encode()
    assert trial.run(CALLS[name]).total() < 100
    trial.end()
