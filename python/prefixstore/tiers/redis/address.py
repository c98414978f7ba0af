"""Where a server of Redis is, who names it, and how it is known to be the right one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from prefixstore.errors import ConfigError


class Address(NamedTuple):
    """Host and port of a server; or the path of its unix socket, and port 0."""

    host: str
    port: int

    def __str__(self) -> str:
        if self.port == 0:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address_told(host: object, port: object) -> Address | None:
    """The address that one server tells of another; None for what can be none.

    Never a unix socket's: nobody is to say which files of this machine are opened.
    """
    if not isinstance(host, bytes) or not host:
        return None
    if not isinstance(port, int) or not 0 < port < 65536:
        return None
    # A name that is no ASCII would only be looked up in vain, for as long as the call has.
    is_name = host.isascii() and can_be_looked_up(host.decode())
    return Address(host.decode(), port) if is_name else None


def can_be_looked_up(host: str) -> bool:
    """Whether Python asks a resolver at all; what it refuses is no error of a connection."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return host.isprintable()


class Topology(Enum):
    """Who says which server is to be asked."""

    STANDALONE = "standalone"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True)
class TlsConfig:
    """How servers are known.

    Attributes:
        ca_file: Certificates that servers' own must be signed by; None for the system's.
        cert_file: This client's certificate, where the server asks for one.
        key_file: Its key; None where the certificate's file has it.
        verify: Whether a server must show a valid certificate of its own host name. Without,
            whoever sits between can read and change everything.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        for name in ("ca_file", "cert_file", "key_file"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ConfigError(f"tls_{name}: expected a file, got {str(path)!r}")
        if self.key_file is not None and self.cert_file is None:
            raise ConfigError("tls_key_file: expected a tls_cert_file as well")
