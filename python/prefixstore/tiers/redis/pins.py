"""Records that do not expire: pinning them, and finding them when their identity is deleted.

An identity is deleted by giving it another generation. What expires of the old one is left to
expire. What is pinned would stay for ever, and there may be much of it: so the old generation is
entered into the set of the ended ones before it ends, and stays there until none is left. Whoever
deletes the identity next finishes what a deletion before it did not.
"""

from __future__ import annotations

import re
from typing import cast

from prefixstore.errors import BlockCorrupted
from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.redis.lanes import Operation
from prefixstore.tiers.redis.records import (
    Keys,
    as_generation,
    fetch_generation,
    fetch_manifest,
    hash_of,
    replace_generation,
    unlinks,
    unpin,
)
from prefixstore.tiers.redis.wire import Command

_PINNED = b"pinned"
_HASH = re.compile(rb"[0-9a-f]{32}")


def pin_record(
    key: bytes, pinned_key: bytes, generation_key: bytes, generation: bytes
) -> Operation[bool]:
    """Keep a record from expiry; False where there is none.

    It is entered into the set of the pinned first: from then on whoever deletes the identity finds
    it there. One whose identity was deleted before that is deleted here.
    """
    manifest = yield from fetch_manifest(key)
    if manifest is None:
        return False
    yield from _add(pinned_key, hash_of(key))
    keys = [key, *manifest.part_keys(key)]
    replies = yield [Command((word, each)) for word in (b"PERSIST", b"EXISTS") for each in keys]
    now = yield from fetch_generation(generation_key)
    if now == generation and all(replies[len(keys) :]):
        return True
    yield [*unlinks(keys), unpin(pinned_key, key)]
    return False


def unpin_record(key: bytes, pinned_key: bytes, config: RedisTierConfig) -> Operation[bool]:
    """Let a record expire again, from now on; False where there is none."""
    manifest = yield from fetch_manifest(key)
    if manifest is None:
        return False
    keys, ttl = [key, *manifest.part_keys(key)], b"%d" % config.ttl_s
    replies = yield [Command((b"EXPIRE", each, ttl)) for each in keys]
    yield [unpin(pinned_key, key)]
    return all(replies)


def end_generation(keys: Keys, identity: bytes) -> Operation[None]:
    """From here on nothing that was kept of an identity is found."""
    generation_key, ended_key = keys.generation(identity), keys.ended(identity)
    known = yield from fetch_generation(generation_key)
    if known is not None:
        yield from _add(ended_key, known)
    last = yield from replace_generation(generation_key)
    # Somebody else has started another generation meanwhile: that one ends too.
    if last not in (None, known):
        yield from _add(ended_key, last)


def find_ended(keys: Keys, identity: bytes) -> Operation[list[bytes]]:
    """An identity's ended generations of which something may be left.

    The set names one that is only about to end as well: the generation is asked for last, and what
    is another one by then has ended for good.
    """
    members = yield from _members(keys.ended(identity))
    ended = {member for member in members if as_generation(member) is not None}
    current = yield from fetch_generation(keys.generation(identity))
    return sorted(ended - {current})


def find_pinned(pinned_key: bytes) -> Operation[list[bytes]]:
    """Keys of the records that a set of the pinned names."""
    members = yield from _members(pinned_key)
    stem = pinned_key.removesuffix(_PINNED)
    return [b"%b{%b}" % (stem, each) for each in sorted(members) if _HASH.fullmatch(each)]


def forget_ended(keys: Keys, identity: bytes, generation: bytes) -> Operation[None]:
    """Nothing is left of an ended generation that does not expire."""
    yield [Command((b"SREM", keys.ended(identity), generation), is_optional=True)]


def _add(key: bytes, member: bytes) -> Operation[None]:
    """Enter something into a set, which begins anew where something else has its place."""
    try:
        yield [Command((b"SADD", key, member))]
    except BlockCorrupted:
        yield unlinks([key])
        yield [Command((b"SADD", key, member))]


def _members(key: bytes) -> Operation[list[bytes]]:
    """What is in a set: nothing where something else has its place."""
    try:
        (members,) = yield [Command((b"SMEMBERS", key))]
    except BlockCorrupted:
        return []
    return cast("list[bytes]", members)
