"""Walks through all keys of a tier (SCAN): for records that lack parts, and for what is left over.

A walk costs the servers about a microsecond a key; they serve others between its steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from prefixstore.errors import BlockCorrupted, TierError, TierUnavailable
from prefixstore.tiers.base import Held, Swept
from prefixstore.tiers.outcomes import raise_first
from prefixstore.tiers.redis.address import Address
from prefixstore.tiers.redis.calls import Caller
from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.redis.lanes import Operation
from prefixstore.tiers.redis.pins import find_ended, find_pinned, forget_ended
from prefixstore.tiers.redis.records import (
    Keys,
    delete_record,
    fetch_generation,
    fetch_manifest,
    holds,
)
from prefixstore.tiers.redis.wire import Command

T = TypeVar("T")

_SCAN_COUNT = b"1000"
_BATCH = 1000  # operations of one exchange
# Parts are written before their manifest: one younger than this may belong to a write under way.
_WRITE_GRACE_S = 60


@dataclass
class Survey:
    """What SCAN found under a prefix, by key."""

    manifests: dict[bytes, bytes] = field(default_factory=dict)  # a record's key: its identity
    # A part's key: the record's key, and the write's id.
    parts: dict[bytes, tuple[bytes, bytes]] = field(default_factory=dict)
    stale: list[bytes] = field(default_factory=list)  # keys of ended generations


def scan(address: Address, pattern: bytes) -> Operation[list[bytes]]:
    """Every key of one server that fits a pattern."""
    cursor, keys = b"0", set()
    mark, num_steps = b"", 0  # one of the cursors before
    while True:
        args = (b"SCAN", cursor, b"MATCH", pattern, b"COUNT", _SCAN_COUNT)
        ((cursor, found),) = yield [Command(args, address=address)]
        keys.update(found)
        if cursor == b"0":
            return sorted(keys)
        # No walk comes by a place again: that of a faulty server would never end.
        if cursor == mark:
            raise TierUnavailable(f"{address}: expected another cursor of SCAN, got {cursor!r:.50}")
        num_steps += 1
        if num_steps & (num_steps - 1) == 0:  # after 1, 2, 4, ... steps, so any circle is found
            mark = cursor


class Sweeper:
    """Looks after the keys of one tier.

    Args:
        config: Of the tier.
        caller: Makes the calls.
        keys: Names of keys.
        deadline: Of the whole walk.
    """

    def __init__(
        self, config: RedisTierConfig, caller: Caller, keys: Keys, deadline: float
    ) -> None:
        self._config = config
        self._caller = caller
        self._keys = keys
        self.deadline = deadline
        prefix = re.escape(config.prefix.encode())
        self._pattern = re.compile(
            prefix + rb":1:([0-9a-f]{32}):([0-9a-f]{16}):"
            rb"(?:pinned|(\{[0-9a-f]{32}\})(?::([0-9a-f]{16}):\d+)?)"
        )

    def survey(self, primaries: list[Address]) -> Survey:
        """All keys there are."""
        pattern = self._config.prefix.encode() + b":1:*"
        keys = [
            key
            for found in self._run([scan(address, pattern) for address in primaries])
            for key in found
        ]
        matches = [match for key in keys if (match := self._pattern.fullmatch(key))]
        identities = sorted({match[1] for match in matches})
        names = [self._keys.generation(bytes.fromhex(text.decode())) for text in identities]
        found = self._run([fetch_generation(name) for name in names])
        current = dict(zip(identities, found, strict=True))
        survey = Survey()
        for match in matches:
            key = match[0]
            if match[2] != current[match[1]]:
                survey.stale.append(key)
            elif match[4] is not None:
                record_key = key[: match.end(3)]
                survey.parts[key] = record_key, match[4]
            elif match[3] is not None:
                survey.manifests[key] = bytes.fromhex(match[1].decode())
        return survey

    def find_broken(self, keys: list[bytes]) -> list[bytes]:
        """The records among those that are there but lack a part, or have no manifest."""
        answers = self._run(map(_is_broken, keys))
        return [key for key, is_broken in zip(keys, answers, strict=True) if is_broken]

    def weigh(self, survey: Survey) -> dict[bytes, Held]:
        """Records and bytes of each identity; what is not whole counts as well."""
        sizes = self._run(map(_record_bytes, survey.manifests))
        held: dict[bytes, Held] = {}
        for identity, num_bytes in zip(survey.manifests.values(), sizes, strict=True):
            if num_bytes is not None:
                before = held.get(identity, Held(0, 0))
                held[identity] = Held(before.num_records + 1, before.num_bytes + num_bytes)
        return held

    def drop(self, keys: list[bytes]) -> None:
        """Forget records."""
        self._run([delete_record(key, key[: key.index(b"{")] + b"pinned") for key in keys])

    def drop_ended(self, identity: bytes) -> None:
        """Forget the pinned records of an identity's ended generations; the others expire."""
        (ended,) = self._run([find_ended(self._keys, identity)])
        for generation in ended:
            (pinned,) = self._run([find_pinned(self._keys.pinned(identity, generation))])
            self.drop(pinned)
            self._run([forget_ended(self._keys, identity, generation)])

    def reclaim(self, survey: Survey) -> Swept:
        """Delete parts that no manifest names, and what is of an ended generation."""
        record_keys = sorted({record_key for record_key, _ in survey.parts.values()})
        write_ids = dict(zip(record_keys, self._run(map(_write_id, record_keys)), strict=True))
        orphans = [
            key
            for key, (record_key, write_id) in survey.parts.items()
            if write_ids[record_key] != write_id
        ]
        oldest_ttl_s = self._config.ttl_s - _WRITE_GRACE_S
        sizes = self._run(
            [
                *(_reclaim(key, None) for key in survey.stale),
                *(_reclaim(key, oldest_ttl_s) for key in orphans),
            ]
        )
        gone = [size for size in sizes if size is not None]
        return Swept(num_orphans=len(gone), num_bytes=sum(gone))

    def _run(self, operations: Iterable[Operation[T]]) -> list[T]:
        """What operations return, a batch at a time.

        Raises:
            TierError: The first that one of them met.
        """
        outcomes: list[T | TierError] = []
        pending = list(operations)
        for first in range(0, len(pending), _BATCH):
            outcomes += self._caller.exchange(pending[first : first + _BATCH], self.deadline)
        return raise_first(outcomes)


def _is_broken(key: bytes) -> Operation[bool]:
    try:
        manifest = yield from fetch_manifest(key)
        return manifest is not None and not (yield from holds(key))
    except BlockCorrupted:
        return True


def _write_id(record_key: bytes) -> Operation[bytes | None]:
    """The write id in a record's manifest, in hexadecimal."""
    try:
        manifest = yield from fetch_manifest(record_key)
    except BlockCorrupted:
        return None
    return None if manifest is None else manifest.write_id.hex().encode()


def _record_bytes(record_key: bytes) -> Operation[int | None]:
    """Length of a record; None if it is gone."""
    try:
        manifest = yield from fetch_manifest(record_key)
    except BlockCorrupted:
        return None
    return None if manifest is None else manifest.record_bytes


def _reclaim(key: bytes, at_most_ttl_s: int | None) -> Operation[int | None]:
    """Delete a key; returns its bytes, or None if it still has longer to live than that."""
    ttl_s, num_bytes = yield [
        Command((b"TTL", key)),
        Command((b"STRLEN", key), is_optional=True),  # a set has no STRLEN
    ]
    if at_most_ttl_s is not None and ttl_s > at_most_ttl_s:
        return None
    yield [Command((b"UNLINK", key))]
    return num_bytes or 0


def list_problems(name: str, keys: list[bytes]) -> Iterator[str]:
    """In words what `find_broken` found."""
    for key in keys:
        record = key.decode(errors="backslashreplace")
        yield f"{name}: record {record} is not whole: expected all its parts"
