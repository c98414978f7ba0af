"""What a prefix cache is built from; each part's own options lie beside that part.

A TOML file says the same as the fields here, sizes and times as numbers or as people write them::

    block_size = 64
    codec = "q8"
    tiers = ["memory://4GiB", "disk:///var/kv?max_bytes=100GiB&ttl=7d", "redis://host/0?ttl=24h"]

    [store]
    load_timeout_s = "2s"

    [store.breaker]
    failures = 3
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from kvkernels import CODECS
from prefixstore.errors import ConfigError
from prefixstore.planner import POLICIES
from prefixstore.settings import check_known, parse_bytes, parse_seconds
from prefixstore.store import BreakerConfig, StoreConfig
from prefixstore.tiers.base import check_bytes
from prefixstore.tiers.pages import PAGE_BYTES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GIB = 1 << 30
_NOT_IN_FILES = ("policies",)  # they stand in the tiers' URLs

T = TypeVar("T")


@dataclass(frozen=True)
class CacheConfig:
    """Sizes and places of a `PrefixCache`.

    Attributes:
        block_size: Tokens in a block; one of 16, 32, 64, 128, 256.
        pool_tokens: Tokens the device pool holds, cached and in use together; None for four
            times the model's context, at most a quarter of the memory there.
        window_pool_tokens: Tokens it holds of layers with a sliding window, which see no more than
            the last window of a sequence: at least two windows and two blocks, at most
            `pool_tokens`. None for an eighth of those, at least 16 windows and what is computed.
        tiers: URLs of the tiers, fastest first, see tier_urls.py; in place of the next three.
        memory_bytes: Size of the host memory tier, at least 4096; 0 for none. Default 1 GiB.
        disk_path: Directory of the disk tier, shared by processes; None for none.
        disk_bytes: Bound of the disk tier, at least 4096. Default 4 GiB. Only with `disk_path`.
        salt: Namespace; sessions of different salts never share blocks.
        codec: How blocks are written into the tiers: one of `kvkernels.CODECS` for all layers, or
            one for each of the model's layers. "raw" and "l12" change nothing; the others are
            smaller and cost some precision.
        exact_blocks: So many blocks at the start of a sequence are written without loss, whatever
            the codec: attention leans on the first tokens more than on others.
        restore_policy: Of sessions. "planned": what tiers hold is loaded as far as that is expected
            to be faster than computing it; "load" and "recompute": always. An engine goes by its
            own, see `EngineConfig`.
        store: Queues, deadlines, and when a failing tier is left alone. By default as many blocks
            may wait to be written as the pool holds.
    """

    block_size: int = 64
    pool_tokens: int | None = None
    window_pool_tokens: int | None = None
    tiers: Sequence[str] | None = field(default=None, repr=False)  # a URL may have a password
    memory_bytes: int | None = None
    disk_path: str | Path | None = None
    disk_bytes: int | None = None
    salt: str = ""
    codec: str | Sequence[str] = "raw"
    exact_blocks: int = 0
    restore_policy: str = "planned"
    store: StoreConfig | None = None

    def __post_init__(self) -> None:
        if type(self.block_size) is not int or self.block_size not in (16, 32, 64, 128, 256):
            raise ConfigError(
                f"block_size: expected one of 16, 32, 64, 128, 256, got {self.block_size!r}"
            )
        for name in ("pool_tokens", "window_pool_tokens", "memory_bytes", "disk_bytes"):
            value = getattr(self, name)
            if type(value) is not int and value is not None:
                raise ConfigError(f"{name}: expected an integer, got {value!r}")
        if not isinstance(self.salt, str):
            raise ConfigError(f"salt: expected a string, got {self.salt!r}")
        if not isinstance(self.codec, str):
            if not isinstance(self.codec, Sequence):
                raise ConfigError(f"codec: expected a name or a list of them, got {self.codec!r}")
            object.__setattr__(self, "codec", tuple(self.codec))
        for name in (self.codec,) if isinstance(self.codec, str) else self.codec:
            if name not in CODECS:
                raise ConfigError(f"codec: expected one of {tuple(CODECS)}, got {name!r}")
        if type(self.exact_blocks) is not int or self.exact_blocks < 0:
            raise ConfigError(f"exact_blocks: expected 0 or more, got {self.exact_blocks!r}")
        if self.restore_policy not in POLICIES:
            raise ConfigError(
                f"restore_policy: expected one of {POLICIES}, got {self.restore_policy!r}"
            )
        for name in ("pool_tokens", "window_pool_tokens"):
            value = getattr(self, name)
            if value is not None and value < self.block_size:
                raise ConfigError(
                    f"{name}: expected at least one block of {self.block_size}, got {value!r}"
                )
        if self.tiers is not None:
            self._check_tiers()
        if self.memory_bytes and self.memory_bytes < PAGE_BYTES:
            raise ConfigError(
                f"memory_bytes: expected 0 or at least {PAGE_BYTES}, got {self.memory_bytes!r}"
            )
        if self.disk_path is not None:
            if not isinstance(self.disk_path, (str, Path)) or self.disk_path == "":
                raise ConfigError(f"disk_path: expected a directory, got {self.disk_path!r}")
            object.__setattr__(self, "disk_path", Path(self.disk_path))
        if self.disk_bytes is not None:
            check_bytes("disk_bytes", self.disk_bytes, PAGE_BYTES)
            if self.disk_path is None:
                raise ConfigError(
                    f"disk_bytes: expected none without disk_path, got {self.disk_bytes!r}"
                )

    @classmethod
    def from_toml(cls, path: str | Path) -> CacheConfig:
        """Read a file.

        Raises:
            ConfigError: If it cannot be read, is no TOML, or says what nobody reads; the message
                has the nearest name that there is.
        """
        return cls.from_table("config", read_toml(path))

    @classmethod
    def from_table(cls, name: str, values: Mapping[str, Any]) -> CacheConfig:
        """What a file, or the table `name` of one, says.

        Raises:
            ConfigError: As `from_toml`.
        """
        values = dict(values)
        store = values.pop("store", None)
        if store is not None:
            store = dict(as_table("store", store))
            breaker = as_table("store.breaker", store.pop("breaker", {}))
            store["breaker"] = from_table(BreakerConfig, "store.breaker", breaker)
            values["store"] = from_table(StoreConfig, "store", store)
        return from_table(cls, name, values)

    @property
    def tier_urls(self) -> list[str]:
        """The tiers, whichever way they were given."""
        if self.tiers is not None:
            return list(self.tiers)
        urls = []
        memory_bytes = GIB if self.memory_bytes is None else self.memory_bytes
        if memory_bytes:
            urls.append(f"memory://{memory_bytes}")
        if self.disk_path is not None:
            path = quote(str(Path(self.disk_path).absolute()))
            urls.append(f"disk://{path}?max_bytes={self.disk_bytes or 4 * GIB}")
        return urls

    def _check_tiers(self) -> None:
        if isinstance(self.tiers, str) or not isinstance(self.tiers, Sequence):
            got = "one without brackets" if isinstance(self.tiers, str) else _kind_of(self.tiers)
            raise ConfigError(f"tiers: expected a list of URLs, got {got}")
        for url in self.tiers:
            if not isinstance(url, str):
                raise ConfigError(f"tiers: expected a list of URLs, got {_kind_of(url)} among them")
        object.__setattr__(self, "tiers", tuple(self.tiers))
        for name in ("memory_bytes", "disk_path", "disk_bytes"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}: expected none beside tiers, got {getattr(self, name)!r}"
                )


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a file.

    Raises:
        ConfigError: If it cannot be read or is no TOML.
    """
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"config: {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path}: {error}") from error


def as_table(name: str, value: Any) -> Mapping[str, Any]:
    """`value`, if it is a table.

    Raises:
        ConfigError: If it is anything else.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: expected a table, got {_kind_of(value)}")
    return value


def from_table(kind: type[T], name: str, values: Mapping[str, Any]) -> T:
    """A configuration from a table of a file; sizes and times may be words.

    Raises:
        ConfigError: If the table says what nobody reads, or a value is of the wrong type or out of
            range.
    """
    known = [one.name for one in fields(kind) if one.name not in _NOT_IN_FILES]  # type: ignore[arg-type]
    check_known(name, values, known)
    given = dict(values)
    for key, value in given.items():
        if key.endswith("_bytes"):
            given[key] = parse_bytes(key, value)
        elif key.endswith("_s"):
            given[key] = parse_seconds(key, value)
    try:
        return kind(**given)
    except TypeError as error:  # a comparison with a value of another type
        got = ", ".join(f"{key}: {_kind_of(value)}" for key, value in values.items())
        raise ConfigError(f"{name}: expected values of the right types, got {got}") from error


def _kind_of(value: Any) -> str:
    """What a value is, for messages where the value itself may be a URL with a password."""
    return type(value).__name__


def physical_memory_bytes() -> int:
    """This machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
