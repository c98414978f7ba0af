"""Where a Redis or Valkey is and how it is used; read from a URL or set field by field."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from prefixstore.errors import ConfigError
from prefixstore.settings import MAX_WAIT_S, check_seconds
from prefixstore.tiers.base import check_bytes
from prefixstore.tiers.redis.address import Address, TlsConfig, Topology, can_be_looked_up
from prefixstore.tiers.redis.url import read_url

USERNAME_VARIABLE = "KVKERNELS_REDIS_USERNAME"
PASSWORD_VARIABLE = "KVKERNELS_REDIS_PASSWORD"

MIN_PART_BYTES = 4096
# Replies of some 4 MiB come fastest; the rest is for a record's header.
DEFAULT_PART_BYTES = (4 << 20) + (64 << 10)
MAX_PART_BYTES = 256 << 20  # servers refuse strings of 512 MiB unless told otherwise
_NAME = re.compile(r"[!-~]+")  # what CLIENT SETNAME takes


@dataclass(frozen=True)
class RedisTierConfig:
    """A tier in a Redis (7 or newer) or Valkey.

    Attributes:
        addresses: Of the server; of the sentinels; of some of the cluster's nodes.
        topology: Which of these they are.
        sentinel_master: The name under which sentinels know the primary.
        db: Number of the database; a cluster has only 0.
        username: ACL user; None for the environment's KVKERNELS_REDIS_USERNAME, or the default
            user.
        password: None for the environment's KVKERNELS_REDIS_PASSWORD, or none. Never shown.
        tls: None for plain connections.
        prefix: Begins every key.
        ttl_s: Seconds after which a record expires that is not pinned.
        refresh_ttl: Whether a hit begins them anew, give or take a sixteenth.
        part_bytes: Records longer than this are split into equal values of at most this length.
        num_connections: Connections to each server that share a batch; one over a unix socket.
        connect_timeout_s: Longest that a connection may take to open.
        timeout_s: Longest that a call may take which names no deadline.
        name: In messages and statistics, and to the servers: ASCII without spaces.
    """

    addresses: tuple[Address, ...] = (Address("127.0.0.1", 6379),)
    topology: Topology = Topology.STANDALONE
    sentinel_master: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: TlsConfig | None = None
    prefix: str = "kvk"
    ttl_s: int = 24 * 3600
    refresh_ttl: bool = True
    part_bytes: int = DEFAULT_PART_BYTES
    num_connections: int = 2
    connect_timeout_s: float = 1.0
    timeout_s: float = 2.0
    name: str = "redis"

    def __post_init__(self) -> None:
        if not self.addresses:
            raise ConfigError("addresses: expected at least one, got none")
        if self.topology is Topology.STANDALONE and len(self.addresses) != 1:
            raise ConfigError(f"addresses: expected one server, got {len(self.addresses)}")
        for address in self.addresses:
            if address.port != 0 and not can_be_looked_up(address.host):
                raise ConfigError(
                    "addresses: expected hosts whose labels have 1 to 63 characters,"
                    f" got {address.host!r}"
                )
        if (self.topology is Topology.SENTINEL) != bool(self.sentinel_master):
            raise ConfigError(
                "sentinel_master: expected a name with sentinels and none without,"
                f" got {self.sentinel_master!r}"
            )
        if self.topology is Topology.CLUSTER and self.db != 0:
            raise ConfigError(f"db: expected 0, the only one of a cluster, got {self.db}")
        if not self.prefix or not self.prefix.isascii() or set(self.prefix) & set("{}*?[]\\ \r\n"):
            raise ConfigError(
                f"prefix: expected ASCII without spaces, braces or wildcards, got {self.prefix!r}"
            )
        check_bytes("part_bytes", self.part_bytes, MIN_PART_BYTES)
        if self.part_bytes > MAX_PART_BYTES:
            raise ConfigError(
                f"part_bytes: expected at most {MAX_PART_BYTES}, got {self.part_bytes}"
            )
        for name, least in (("db", 0), ("ttl_s", 1), ("num_connections", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}: expected an integer of at least {least}, got {value!r}")
        check_seconds("ttl_s", self.ttl_s)
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"name: expected printable ASCII without spaces, got {self.name!r}")
        for name in ("connect_timeout_s", "timeout_s"):
            check_seconds(name, getattr(self, name), MAX_WAIT_S)

    @classmethod
    def from_url(cls, url: str, **settings: object) -> RedisTierConfig:
        """What a URL says: see url.py for its forms and options.

        Args:
            url: Such as `redis://user:password@host:6379/0?ttl=24h`.
            settings: Fields that the URL is not to decide.

        Raises:
            ConfigError: If the URL is none, or one of its options is unknown or out of range. The
                message does not show the password.
        """
        return cls(**{**read_url(url), **settings})

    @property
    def credentials(self) -> tuple[str | None, str | None]:
        """User and password, from here or from the environment."""
        username = self.username or os.environ.get(USERNAME_VARIABLE)
        password = self.password or os.environ.get(PASSWORD_VARIABLE)
        return username or None, password or None
