"""Tiers by URL: `memory://4GiB`, `disk:///var/kv?max_bytes=100GiB&ttl=7d`, `redis://host/0`,
`s3://bucket/prefix?ttl=30d`, `gs://`, `az://`, `file:///shared/kv`.

Beside a tier's own options every URL may say `name=` (default its kind) and what goes into it:
`write=through|second_touch|back|never`, `promote=true|false`, `negative_ttl=1s`; and whose records
are taken for right: `auth_key=FILE` or `seal_key=FILE`, several with colons between them. Where a
URL names no key, those of the environment (keys.py) protect every tier but that in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlencode

from prefixstore.errors import ConfigError
from prefixstore.keys import ProtectionConfig, split_paths
from prefixstore.settings import (
    check_known,
    check_user_info,
    parse_bytes,
    parse_seconds,
    parse_switch,
    parse_text,
    parse_whole,
    split_options,
    split_url,
)
from prefixstore.store import TierPolicy
from prefixstore.tiers.base import Tier
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig
from prefixstore.tiers.protected import ProtectedTier
from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.redis.url import SCHEMES as REDIS_SCHEMES
from prefixstore.tiers.remote import RemoteTier
from prefixstore.tiers.remote.config import RemoteTierConfig

_WRITES = {
    "through": "write_through",
    "second_touch": "write_second_touch",
    "back": "write_back",
    "never": "never",
}
_COMMON_OPTIONS = ("name", "write", "promote", "negative_ttl", "auth_key", "seal_key")

Options = dict[str, str]


@dataclass(frozen=True)
class TierUrl:
    """A URL taken apart.

    Attributes:
        parts: As `urlsplit` has them.
        name: Of the tier.
        options: Its own ones.
        policy: What goes into it.
        protection: Whose records it gives; None for everybody's.
    """

    parts: SplitResult = field(repr=False)  # it may have a password
    name: str
    options: Options = field(repr=False)  # where one that nobody reads may be a secret
    policy: TierPolicy
    protection: ProtectionConfig | None = None

    @property
    def plain(self) -> str:
        """The URL without what is not the tier's own."""
        base = f"{self.parts.scheme}://{self.parts.netloc}{self.parts.path}"
        return f"{base}?{urlencode(self.options)}" if self.options else base

    @property
    def shown(self) -> str:
        """The URL without options, user and password: to be printed."""
        return f"{self.parts.scheme}://{self.parts.netloc.rpartition('@')[2]}{self.parts.path}"


@dataclass(frozen=True)
class _Kind:
    name: str
    configure: Callable[[TierUrl], Any]
    open: Callable[[Any], Tier]  # gets what `configure` gives
    write: str = "write_through"
    is_shared: bool = True  # whether others can reach what it holds


def open_tiers(urls: Sequence[str]) -> tuple[list[Tier], dict[str, TierPolicy]]:
    """Open the tiers of these URLs, fastest first, and say what goes into each, by name.

    Raises:
        ConfigError: If a URL is of no known kind, or has an option that nobody reads or whose
            value is out of range; or a key is not to be had.
        TierUnavailable: If a tier of this machine cannot be opened. What lies on others may come
            later.
    """
    parsed = [parse_tier_url(url) for url in urls]
    with ExitStack() as opened:  # closed again where a later one fails
        tiers = [opened.enter_context(closing(open_tier(url))) for url in parsed]
        opened.pop_all()
    return tiers, {url.name: url.policy for url in parsed}


def check_tiers(urls: Sequence[str]) -> None:
    """Look for what `open_tiers` and a store would refuse in these URLs, and open nothing.

    Raises:
        ConfigError: If a URL is wrong, or two tiers have one name.
    """
    parsed = [parse_tier_url(url) for url in urls]
    for url in parsed:
        _KINDS[url.parts.scheme].configure(url)
    names = [url.name for url in parsed]
    if len(set(names)) != len(names):
        raise ConfigError(f"tiers: expected distinct names, got {names}")


def open_tier(url: TierUrl) -> Tier:
    """Open one tier, under its keys.

    Raises:
        ConfigError: As `open_tiers`.
        TierUnavailable: As `open_tiers`.
    """
    kind = _KINDS[url.parts.scheme]
    return under_keys(kind.open(kind.configure(url)), url)


def under_keys(tier: Tier, url: TierUrl) -> Tier:
    """The tier under the keys that its URL or the environment names, if any; closed where that
    fails.

    Raises:
        ConfigError: If `cryptography` is not installed.
    """
    if url.protection is None:
        return tier
    with ExitStack() as opened:
        opened.enter_context(closing(tier))
        protected = ProtectedTier(tier, url.protection)
        opened.pop_all()
    return protected


def disk_config(url: TierUrl) -> DiskTierConfig:
    """What a URL says of a disk tier.

    Raises:
        ConfigError: If it has a host or no path, or an option is unknown or out of range.
    """
    if url.parts.netloc or not url.parts.path:
        raise ConfigError(
            f"tiers: disk: expected an absolute path, disk:///path, got {url.shown!r}"
        )
    path = Path(unquote(url.parts.path))
    fields = {"capacity_bytes": _DISK_BYTES, **_fields_of(url, _DISK)}
    return DiskTierConfig(path, **fields)


def parse_tier_url(url: str) -> TierUrl:
    """Take a URL apart, and check what is common to all kinds.

    Raises:
        ConfigError: If it is of no known kind, or an option is not as it must be; without showing
            a password.
    """
    parts = split_url("tiers", url)
    check_known("tiers: kind", [parts.scheme], _KINDS)
    kind = _KINDS[parts.scheme]
    if parts.scheme not in _WITHOUT_USERS:
        check_user_info(f"tiers: {kind.name}", parts)
    options = split_options(f"tiers: {kind.name}", parts.query)
    common = {name: options.pop(name) for name in _COMMON_OPTIONS if name in options}
    write = common.get("write")
    if write is not None:
        check_known(f"tiers: {kind.name}: write", [write], _WRITES)
    policy = TierPolicy(
        write=_WRITES[write] if write is not None else kind.write,  # type: ignore[arg-type]
        promote=parse_switch("promote", common.get("promote", True)),
        negative_ttl_s=parse_seconds("negative_ttl", common.get("negative_ttl", 0)),
    )
    protection = None
    if "auth_key" in common or "seal_key" in common:
        auth, seal = (split_paths(common.get(name, "")) for name in ("auth_key", "seal_key"))
        protection = ProtectionConfig(auth, seal)
    elif kind.is_shared:
        protection = ProtectionConfig.from_environment()
    return TierUrl(parts, common.get("name", kind.name), options, policy, protection)


def _memory_config(url: TierUrl) -> MemoryTierConfig:
    if url.parts.path:
        raise ConfigError(f"tiers: memory: expected memory://SIZE, got {url.shown!r}")
    num_bytes = parse_bytes("memory", url.parts.netloc)
    return MemoryTierConfig(num_bytes, **_fields_of(url, _MEMORY))


def _redis_config(url: TierUrl) -> RedisTierConfig:
    return RedisTierConfig.from_url(url.plain, name=url.name)


def _open_redis(config: RedisTierConfig) -> Tier:
    from prefixstore.tiers.redis import RedisTier  # with the client library

    return RedisTier(config)


def _remote_config(url: TierUrl) -> RemoteTierConfig:
    return RemoteTierConfig.from_url(url.plain, name=url.name)


def _fields_of(url: TierUrl, known: Mapping[str, tuple[str, Callable[..., Any]]]) -> dict[str, Any]:
    """The fields of a tier's configuration that its options set."""
    check_known(f"tiers: {url.parts.scheme}: option", url.options, known)
    fields = {"name": url.name}
    for name, text in url.options.items():
        field, parse = known[name]
        fields[field] = parse(name, text)
    return fields


_DISK_BYTES = 4 << 30
_MEMORY = {
    "ttl": ("ttl_s", parse_seconds),
    "quota_bytes": ("quota_bytes", parse_bytes),
    "slab_bytes": ("slab_bytes", parse_bytes),
}
_DISK = {
    "max_bytes": ("capacity_bytes", parse_bytes),
    "slab_bytes": ("slab_bytes", parse_bytes),
    "ttl": ("ttl_s", parse_seconds),
    "refresh_ttl": ("refresh_ttl", parse_switch),
    "quota_bytes": ("quota_bytes", parse_bytes),
    "timeout": ("timeout_s", parse_seconds),
    "io": ("io", parse_text),
    "threads": ("num_threads", parse_whole),
}
_REDIS = _Kind("redis", _redis_config, _open_redis, write="write_second_touch")
_REMOTE = _Kind("remote", _remote_config, RemoteTier, write="write_second_touch")
_WITHOUT_USERS = ("memory", "disk", "file")  # in their paths an @ is one like any letter
_KINDS = {
    "memory": _Kind("memory", _memory_config, MemoryTier, is_shared=False),
    "disk": _Kind("disk", disk_config, DiskTier),
    **dict.fromkeys(REDIS_SCHEMES, _REDIS),
    **dict.fromkeys(("s3", "gs", "az", "file"), _REMOTE),
}
