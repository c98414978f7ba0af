"""What each command of the tier is answered with, so that all else is refused in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from prefixstore.errors import TierUnavailable
from prefixstore.tiers.redis.wire import Command, Reply

_Check: TypeAlias = Callable[[Any], bool]


def _is_integer(reply: object) -> bool:
    return isinstance(reply, int)


def _is_string(reply: object) -> bool:
    return isinstance(reply, bytes)


def _is_string_or_nothing(reply: object) -> bool:
    return reply is None or isinstance(reply, bytes)


def _are_strings(reply: object) -> bool:
    return isinstance(reply, list) and all(isinstance(one, bytes) for one in reply)


def _is_scan(reply: object) -> bool:
    """A cursor, and keys."""
    return (
        isinstance(reply, list)
        and len(reply) == 2
        and isinstance(reply[0], bytes)
        and _are_strings(reply[1])
    )


_CHECKS: dict[bytes, _Check] = {
    b"GET": _is_string_or_nothing,
    b"GETRANGE": _is_string,
    b"SET": _is_string_or_nothing,  # with NX nothing where something is; with GET what was there
    b"SMEMBERS": _are_strings,
    b"SCAN": _is_scan,
    **dict.fromkeys(
        (b"EXISTS", b"UNLINK", b"SADD", b"SREM", b"EXPIRE", b"PERSIST", b"TTL", b"STRLEN"),
        _is_integer,
    ),
}


def refuse_odd(tier_name: str, command: Command, reply: Reply) -> TierUnavailable | None:
    """The error that a reply is where the command has no such replies; None for any other.

    Args:
        tier_name: For the message.
        command: What was asked.
        reply: No error of the server's, which any command may meet. Of a string that was read into
            the caller's memory it is the length, and nothing else is an integer then.
    """
    name = command.args[0]
    assert isinstance(name, bytes)
    if command.into is not None:
        is_right = isinstance(reply, int) or (reply is None and name == b"GET")
    else:
        is_right = _CHECKS[name](reply)
    if is_right:
        return None
    return TierUnavailable(
        f"{tier_name}: expected a reply to {name.decode()} as Redis gives it, got {reply!r:.100}"
    )
