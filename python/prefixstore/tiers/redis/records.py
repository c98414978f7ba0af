"""How a record lies in Redis, and the operations on one record.

    {prefix}:1:{identity}:generation                     the identity's generation, 16 hex digits
    {prefix}:1:{identity}:ended                          set of generations of which pins are left
    {prefix}:1:{identity}:{generation}:pinned            set of the hashes that are pinned
    {prefix}:1:{identity}:{generation}:{{hash}}          manifest | first part
    {prefix}:1:{identity}:{generation}:{{hash}}:{write id}:{k}     part k = 1, 2, ...

    manifest, 32 bytes, little endian:
    0  magic "KVR1"   4  parts u32   8  record bytes u64   16  part bytes u64   24  write id [8]

A record is there only if its manifest is, and all parts that it names. Parts bear their writer's
random id in their names, so those of two writers never mix, and they are written before the
manifest: a writer that dies leaves parts that nobody looks for, until they expire. The braces make
all keys of a record one slot of a cluster. Every command names one key, so all work there. Pins and
ended generations: see pins.py.
"""

from __future__ import annotations

import re
import secrets
import struct
from binascii import hexlify
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from prefixstore.block_key import RecordName
from prefixstore.errors import BlockCorrupted, TierError
from prefixstore.record_header import MAX_RECORD_BYTES, TRAILER_BYTES
from prefixstore.tiers.redis.config import MIN_PART_BYTES, RedisTierConfig
from prefixstore.tiers.redis.lanes import Operation
from prefixstore.tiers.redis.wire import Command

_SCHEMA = 1
MAX_STORED_BYTES = MAX_RECORD_BYTES + TRAILER_BYTES
MAGIC = b"KVR1"
MANIFEST = struct.Struct("<4sIQQ8s")
MANIFEST_BYTES = MANIFEST.size
WRITE_ID_BYTES = 8
_GENERATION = re.compile(rb"[0-9a-f]{16}")
# More would be as many commands, whoever asks for the record: parts of long records get longer.
MAX_PARTS = 1024
MANIFEST_RANGE = (b"0", b"%d" % (MANIFEST_BYTES - 1))  # of GETRANGE


def new_generation() -> bytes:
    """A generation's name. Random and not a count: a count that the server evicted would begin
    anew, and bring back what was deleted.
    """
    return secrets.token_hex(8).encode()


def as_generation(value: object) -> bytes | None:
    """What the server has as a generation's name; None if that is nothing, or no such name."""
    is_one = isinstance(value, bytes) and _GENERATION.fullmatch(value) is not None
    return cast(bytes, value) if is_one else None


@dataclass(frozen=True)
class Keys:
    """The names of one tier's keys."""

    prefix: str

    def generation(self, identity: bytes) -> bytes:
        """The key that holds an identity's current generation."""
        return f"{self.prefix}:{_SCHEMA}:{identity.hex()}:generation".encode()

    def ended(self, identity: bytes) -> bytes:
        """The set of ended generations of which pins are left."""
        return f"{self.prefix}:{_SCHEMA}:{identity.hex()}:ended".encode()

    def pinned(self, identity: bytes, generation: bytes) -> bytes:
        """The set of pinned records of a generation."""
        return b"%b:pinned" % _stem(self.prefix, identity, generation)

    def record(self, name: RecordName, generation: bytes) -> bytes:
        """The key of a record: of its manifest and its first part."""
        stem = _stem(self.prefix, name.identity, generation)
        return b"%b:{%b}" % (stem, hexlify(name.block_hash))

    def records(
        self, names: Iterable[tuple[int, RecordName]], generations: Mapping[bytes, bytes]
    ) -> dict[int, bytes]:
        """Those of numbered records by number, where their identity's generation is given."""
        starts = {
            identity: _stem(self.prefix, identity, generation) + b":{"
            for identity, generation in generations.items()
        }
        return {
            number: starts[identity] + hexlify(block_hash) + b"}"
            for number, (identity, block_hash) in names
            if identity in starts
        }


@lru_cache(maxsize=256)  # every record of a call has the same
def _stem(prefix: str, identity: bytes, generation: bytes) -> bytes:
    return f"{prefix}:{_SCHEMA}:{identity.hex()}:".encode() + generation


@dataclass(frozen=True)
class Manifest:
    """What stands before a record's first part."""

    record_bytes: int
    part_bytes: int
    write_id: bytes

    @classmethod
    def of_new(cls, record_bytes: int, max_part_bytes: int) -> Manifest:
        """Of a record to be written: of as few parts as may be, all of about one length."""
        num_parts = min(max(1, -(-record_bytes // max_part_bytes)), MAX_PARTS)
        return cls(
            record_bytes, max(1, -(-record_bytes // num_parts)), secrets.token_bytes(WRITE_ID_BYTES)
        )

    @property
    def num_parts(self) -> int:
        """Values that the record is split into."""
        return max(1, -(-self.record_bytes // self.part_bytes))

    @property
    def is_possible(self) -> bool:
        """Whether a writer may have made it. `of_new` makes few parts, each longer than half of
        what it may have; else one value could name billions of them.
        """
        is_single = self.num_parts == 1
        is_split_so = 2 * self.part_bytes > MIN_PART_BYTES and self.num_parts <= MAX_PARTS
        return (is_single or is_split_so) and self.record_bytes <= MAX_STORED_BYTES

    @property
    def first_bytes(self) -> int:
        """Length of the first part, which follows the manifest."""
        return min(self.record_bytes, self.part_bytes)

    def encode(self) -> bytes:
        """Its bytes, `MANIFEST_BYTES` of them."""
        return MANIFEST.pack(
            MAGIC, self.num_parts, self.record_bytes, self.part_bytes, self.write_id
        )

    def part_keys(self, key: bytes) -> list[bytes]:
        """Of the second part and all others."""
        write_id = self.write_id.hex().encode()
        return [b"%b:%b:%d" % (key, write_id, part) for part in range(1, self.num_parts)]

    def part_range(self, part: int) -> tuple[int, int]:
        """Where in the record a part begins and ends."""
        begin = part * self.part_bytes
        return begin, min(begin + self.part_bytes, self.record_bytes)


def read_manifest(head: bytes | bytearray, num_bytes: int) -> Manifest | None:
    """The manifest at the start of a value; None for no value.

    Args:
        head: Where `MANIFEST_BYTES` were read to.
        num_bytes: How long the server's answer was; 0 for a key that is not there.

    Raises:
        BlockCorrupted: If it is none.
    """
    if num_bytes == 0:
        return None
    if num_bytes >= MANIFEST_BYTES:
        magic, num_parts, record_bytes, part_bytes, write_id = MANIFEST.unpack(head)
        if magic == MAGIC and part_bytes > 0:
            manifest = Manifest(record_bytes, part_bytes, write_id)
            if manifest.num_parts == num_parts and manifest.is_possible:
                return manifest
    raise BlockCorrupted(f"expected a manifest, got {bytes(head[:num_bytes])!r}")


def fetch_manifest(key: bytes) -> Operation[Manifest | None]:
    """The manifest alone."""
    head = bytearray(MANIFEST_BYTES)
    command = Command((b"GETRANGE", key, *MANIFEST_RANGE), [memoryview(head)])
    (num_bytes,) = yield [command]
    return read_manifest(head, num_bytes)


def holds(key: bytes) -> Operation[bool]:
    """Whether a record is there and whole."""
    manifest = yield from fetch_manifest(key)
    if manifest is None or manifest.num_parts == 1:
        return manifest is not None
    found = yield [Command((b"EXISTS", part_key)) for part_key in manifest.part_keys(key)]
    return all(found)


def read_record(
    key: bytes, out: memoryview, config: RedisTierConfig, renews: bool
) -> Operation[int | None]:
    """A whole record, whose time to live begins anew if `renews`; None where it is not whole.

    Raises:
        BlockCorrupted: If it is longer than `out`, or has no manifest.
    """
    head = bytearray(MANIFEST_BYTES)
    commands = [Command((b"GET", key), [memoryview(head), out]), *renewals([key], config, renews)]
    num_bytes, *_ = yield commands
    manifest = read_manifest(head, num_bytes or 0)
    if manifest is None:
        return None
    if manifest.record_bytes > len(out):
        raise BlockCorrupted(
            f"{config.name}: expected a record of at most {len(out)} bytes,"
            f" got {manifest.record_bytes}"
        )
    if num_bytes != MANIFEST_BYTES + manifest.first_bytes:
        raise BlockCorrupted(
            f"{config.name}: expected a first part of {manifest.first_bytes} bytes,"
            f" got {num_bytes - MANIFEST_BYTES}"
        )
    if manifest.num_parts == 1:
        return manifest.record_bytes
    keys = manifest.part_keys(key)
    ranges = [manifest.part_range(part) for part in range(1, manifest.num_parts)]
    reads = [
        Command((b"GET", part_key), [out[begin:end]])
        for part_key, (begin, end) in zip(keys, ranges, strict=True)
    ]
    replies = yield [*reads, *renewals(keys, config, renews)]
    wanted = [end - begin for begin, end in ranges]
    return manifest.record_bytes if replies[: len(reads)] == wanted else None


def read_range(
    key: bytes, out: memoryview, offset: int, config: RedisTierConfig, renews: bool
) -> Operation[int | None]:
    """As much of a record from `offset` on as `out` has room for; None where a part is missing."""
    manifest = yield from fetch_manifest(key)
    if manifest is None:
        return None
    keys = [key, *manifest.part_keys(key)]
    reads, wanted = [], []
    for part, begin, end in _ranges(manifest, offset, offset + len(out)):
        shift = MANIFEST_BYTES if part == 0 else 0
        first = begin - part * manifest.part_bytes + shift
        args = (b"GETRANGE", keys[part], b"%d" % first, b"%d" % (first + end - begin - 1))
        reads.append(Command(args, [out[begin - offset : end - offset]]))
        wanted.append(end - begin)
    if not reads:
        return 0
    replies = yield [*reads, *renewals(keys, config, renews)]
    return sum(wanted) if replies[: len(reads)] == wanted else None


def _ranges(manifest: Manifest, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Each part that bytes `begin` to `end` touch, and which of them lie there."""
    for part in range(begin // manifest.part_bytes, manifest.num_parts):
        part_begin, part_end = manifest.part_range(part)
        if max(begin, part_begin) < min(end, part_end):
            yield part, max(begin, part_begin), min(end, part_end)


def renewals(keys: list[bytes], config: RedisTierConfig, renews: bool) -> list[Command]:
    """Begin the time to live of keys anew; GT leaves alone those that are pinned."""
    if not renews:
        return []
    ttl = b"%d" % config.ttl_s
    return [Command((b"EXPIRE", key, ttl, b"GT"), is_optional=True) for key in keys]


def write_record(
    key: bytes, record: memoryview, config: RedisTierConfig, is_known: bool = False
) -> Operation[bool]:
    """Keep a record; False where one of that name was there, whole, already.

    Args:
        key: The record's.
        record: Its bytes.
        config: The tier's.
        is_known: Whether something of that name is known to be there.

    Raises:
        TierFull: If the server has no room; what was written of it is taken back.
    """
    manifest = Manifest.of_new(len(record), config.part_bytes)
    keys, ttl = manifest.part_keys(key), (b"EX", b"%d" % config.ttl_s)
    head: tuple[bytes, memoryview] = (manifest.encode(), record[: manifest.first_bytes])
    try:
        if keys:
            ranges = [manifest.part_range(part) for part in range(1, manifest.num_parts)]
            yield [
                Command((b"SET", part_key, (record[begin:end],), *ttl))
                for part_key, (begin, end) in zip(keys, ranges, strict=True)
            ]
        if not is_known:
            (reply,) = yield [Command((b"SET", key, head, *ttl, b"NX"))]
            if reply is not None:
                return True
        if not (yield from _holds_readable(key)):
            yield [Command((b"SET", key, head, *ttl))]
            return True
    except TierError:
        if keys:
            yield unlinks(keys, is_optional=True)
        raise
    if keys:
        yield unlinks(keys, is_optional=True)
    return False


def _holds_readable(key: bytes) -> Operation[bool]:
    try:
        return (yield from holds(key))
    except BlockCorrupted:
        return False


def unlinks(keys: list[bytes], is_optional: bool = False) -> list[Command]:
    """Forget keys."""
    return [Command((b"UNLINK", key), is_optional=is_optional) for key in keys]


def delete_record(key: bytes, pinned_key: bytes) -> Operation[bool]:
    """Forget a record and its pin; False where there was none."""
    try:
        manifest = yield from fetch_manifest(key)
        keys = [key] if manifest is None else [key, *manifest.part_keys(key)]
    except BlockCorrupted:
        keys = [key]
    num_deleted, *_ = yield [*unlinks(keys), unpin(pinned_key, key)]
    return bool(num_deleted)


def unpin(pinned_key: bytes, key: bytes) -> Command:
    """Take a record out of the set of the pinned; if there is something else, it is not in it."""
    return Command((b"SREM", pinned_key, hash_of(key)), is_optional=True)


def hash_of(key: bytes) -> bytes:
    """The hash in a record's key, in hexadecimal: what the set of the pinned holds."""
    return key[key.index(b"{") + 1 : key.index(b"}")]


def fetch_generation(generation_key: bytes) -> Operation[bytes | None]:
    """An identity's generation; None for one of which nothing was ever kept, and where the key
    holds something else: then whatever was kept is lost.
    """
    try:
        (generation,) = yield [Command((b"GET", generation_key))]
    except BlockCorrupted:
        return None
    return as_generation(generation)


def make_generation(generation_key: bytes) -> Operation[bytes | None]:
    """An identity's generation, which begins now if it has none."""
    try:
        _, generation = yield [
            Command((b"SET", generation_key, new_generation(), b"NX")),
            Command((b"GET", generation_key)),
        ]
        if generation is None or as_generation(generation) is not None:
            return generation
    except BlockCorrupted:
        pass
    # Something else is there.
    yield from replace_generation(generation_key)
    return (yield from fetch_generation(generation_key))


def replace_generation(generation_key: bytes) -> Operation[bytes | None]:
    """Begin another generation; returns the one that ends with that, if there was any."""
    generation = new_generation()
    try:
        (last,) = yield [Command((b"SET", generation_key, generation, b"GET"))]
    except BlockCorrupted:  # with GET the server replaces nothing but a value
        yield [Command((b"SET", generation_key, generation))]
        return None
    return as_generation(last)
