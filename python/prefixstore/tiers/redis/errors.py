"""What a server's error replies and a client's exceptions mean for a tier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from prefixstore.errors import (
    BlockCorrupted,
    TierError,
    TierFull,
    TierPartTimeout,
    TierTimeout,
    TierUnavailable,
)
from prefixstore.tiers.redis.wire import ErrorReply

T = TypeVar("T")

# What another try, perhaps at another server, may get over.
_PASSING = ("READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN")


class PassingTrouble(TierUnavailable):
    """The server was the wrong one, or not ready: asking who is the right one may help."""


class ConnectionLost(PassingTrouble):
    """A connection ended during a call; what it had been sent may or may not have been done."""


class ServerSilent(TierTimeout):
    """A server had time for an answer, and gave none."""


def no_answer(tier_name: str) -> TierTimeout:
    """The time is over."""
    return TierTimeout(f"{tier_name}: expected an answer before the deadline, got none")


def of_a_part(outcomes: Iterable[T]) -> list[T | TierPartTimeout]:
    """The outcomes of a call, of which nothing was late but what servers have that were silent
    where others answered.
    """
    return [TierPartTimeout(str(o)) if isinstance(o, TierTimeout) else o for o in outcomes]


def tier_error(tier_name: str, reply: ErrorReply) -> TierError:
    """The error of ours that a server's error stands for."""
    text = str(reply)
    message = f"{tier_name}: the server says: {text:.200}"
    if reply.code == "OOM":
        return TierFull(message)
    if reply.code == "WRONGTYPE":
        return BlockCorrupted(message)
    if reply.code in _PASSING:
        return PassingTrouble(message)
    if reply.code in ("MOVED", "ASK"):
        return PassingTrouble(f"{message} (a cluster needs a redis+cluster:// URL)")
    return TierUnavailable(message)
