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
