"""What servers say of themselves (INFO)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from prefixstore.errors import TierUnavailable
from prefixstore.tiers.redis.address import Address
from prefixstore.tiers.redis.pool import Pool

# Others begin like it: Redis 8 has `db0_distrib_strings_sizes:2=3,1K=20`.
_KEYSPACE = re.compile(r"db[0-9]+")


@dataclass(frozen=True)
class ServerUse:
    """Of a server as a whole, whoever uses it.

    Attributes:
        max_bytes: Its bound, `maxmemory`; 0 for none.
        used_bytes: Memory that it has taken.
        num_keys: In all its databases.
        num_evicted: Keys evicted since it runs.
        num_expired: Keys expired since it runs.
    """

    max_bytes: int = 0
    used_bytes: int = 0
    num_keys: int = 0
    num_evicted: int = 0
    num_expired: int = 0

    @staticmethod
    def sum(uses: Iterable[ServerUse]) -> ServerUse:
        """Of several servers together."""
        rows = [tuple(vars(use).values()) for use in uses]
        return ServerUse(*(sum(column) for column in zip(*rows, strict=True)))


def fetch_use(pool: Pool, address: Address, deadline: float) -> ServerUse:
    """Ask one server.

    Raises:
        TierError: If it cannot be asked, or says something else.
    """
    reply = pool.ask(address, (b"INFO", b"everything"), deadline)
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    try:
        keyspaces = [value for name, value in lines.items() if _KEYSPACE.fullmatch(name)]
        return ServerUse(
            max_bytes=int(lines["maxmemory"]),
            used_bytes=int(lines["used_memory"]),
            num_keys=sum(int(dict(_pairs(text))["keys"]) for text in keyspaces),
            num_evicted=int(lines["evicted_keys"]),
            num_expired=int(lines["expired_keys"]),
        )
    except (KeyError, ValueError) as error:
        raise TierUnavailable(f"{address}: expected INFO with {error!s:.100}") from error


def _pairs(text: str) -> Iterable[tuple[str, str]]:
    """`keys=3,expires=2` as pairs."""
    for item in text.split(","):
        name, _, value = item.partition("=")
        yield name, value
