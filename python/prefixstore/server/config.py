"""What a server lets in, and the one file that configures server, engine and cache together.

[server]
port = 8000
api_keys_file = "keys.toml"

[engine]
max_running = 32

[cache]
tiers = ["memory://4GiB", "disk:///var/kv?max_bytes=100GiB"]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from prefixstore.config import CacheConfig, as_table, from_table, read_toml
from prefixstore.engine import EngineConfig
from prefixstore.errors import ConfigError
from prefixstore.settings import MAX_WAIT_S, check_known, check_seconds

_TIMES = (
    *("header_timeout_s", "body_timeout_s", "idle_timeout_s", "write_timeout_s"),
    *("drain_timeout_s", "flush_timeout_s", "retry_after_s"),
)
_COUNTS = ("max_body_bytes", "max_choices", "max_connections")


@dataclass(frozen=True)
class ServerConfig:
    """Where a server listens and what it accepts.

    Attributes:
        host: Address to listen on.
        port: 0 for one that the kernel chooses.
        model_name: What requests call the model; None for the name of its folder.
        api_keys_file: Who may ask, see keys.py; None for anyone on this machine.
        allow_anonymous: Whether anyone may ask from other machines too where there are no keys, and
            under whatever host name.
        max_body_bytes: Of one request; checked while it is read.
        max_tokens: The most a request may ask for; None for as many as fit the model's context.
        max_choices: Answers of one request: its prompts times `n`; never more than an idle engine
            takes.
        max_connections: Open at once; one more is told 503.
        header_timeout_s: For a request's line and headers, from the first byte on.
        body_timeout_s: For a request's body.
        idle_timeout_s: Between requests of one connection.
        write_timeout_s: A client that takes nothing of its answer for so long is cut off.
        drain_timeout_s: For accepted requests, once the server is told to end; the rest are
            cancelled.
        flush_timeout_s: For what the tiers have still to write then.
        retry_after_s: What a refused client is told to wait, in whole seconds.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_keys_file: str | Path | None = None
    allow_anonymous: bool = False
    max_body_bytes: int = 4 << 20
    max_tokens: int | None = None
    max_choices: int = 32
    max_connections: int = 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    drain_timeout_s: float = 60.0
    flush_timeout_s: float = 60.0
    retry_after_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("host", "model_name"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and (name == "host" or value is not None):
                raise ConfigError(f"{name}: expected a string that is not empty, got {value!r}")
        if self.api_keys_file is not None and not isinstance(self.api_keys_file, str | Path):
            raise ConfigError(f"api_keys_file: expected a path, got {self.api_keys_file!r}")
        if not isinstance(self.allow_anonymous, bool):
            raise ConfigError(f"allow_anonymous: expected a boolean, got {self.allow_anonymous!r}")
        if not _is_whole(self.port) or not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port: expected 0 to 65535, got {self.port!r}")
        for name in _COUNTS if self.max_tokens is None else (*_COUNTS, "max_tokens"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ConfigError(f"{name}: expected a positive integer, got {value!r}")
        for name in _TIMES:
            check_seconds(name, getattr(self, name), MAX_WAIT_S)


@dataclass(frozen=True)
class ServeConfig:
    """Everything `kvkernels serve` is told, but for the model."""

    server: ServerConfig = field(default_factory=ServerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    @classmethod
    def from_toml(cls, path: str | Path) -> ServeConfig:
        """Read a file with the tables `server`, `engine` and `cache`, none of them needed.

        Raises:
            ConfigError: If it cannot be read, is no TOML, or says what nobody reads; the message
                has the nearest name that there is.
        """
        values = read_toml(path)
        check_known("config", values, ("server", "engine", "cache"))
        tables = {name: as_table(name, value) for name, value in values.items()}
        return cls(
            from_table(ServerConfig, "server", tables.get("server", {})),
            from_table(EngineConfig, "engine", tables.get("engine", {})),
            CacheConfig.from_table("cache", tables.get("cache", {})),
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
