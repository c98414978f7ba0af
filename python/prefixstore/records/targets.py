"""The tiers that a command is asked about: directories, URLs, and files that list URLs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from prefixstore.config import CacheConfig, as_table, read_toml
from prefixstore.errors import ConfigError
from prefixstore.records.places import open_disk
from prefixstore.tier_urls import TierUrl, disk_config, open_tier, parse_tier_url, under_keys
from prefixstore.tiers.base import Tier


@dataclass(frozen=True)
class Target:
    """A tier, not opened yet.

    Attributes:
        shown: As it was given, without options, user and password; where that goes for several,
            with the tier's name and a number.
        url: All of it.
        is_directory: Whether it was given as a directory alone, of which no bound is known.
    """

    shown: str
    url: TierUrl
    is_directory: bool = False

    @contextmanager
    def open(self) -> Iterator[Tier]:
        """The tier, under the keys that a store would use.

        Raises:
            ConfigError: If an option is wrong, a key is not to be had, or there is no disk tier.
            TierError: If it cannot be opened.
        """
        if self.url.parts.scheme == "disk":
            tier = under_keys(open_disk(disk_config(self.url)), self.url)
        else:
            tier = open_tier(self.url)
        with closing(tier):
            yield tier

    def capacity_bytes(self, tier: Tier) -> int:
        """The bound that a store has with it; 0 for none, or one that is not known."""
        if self.is_directory:
            return 0
        if self.url.parts.scheme == "disk":
            return disk_config(self.url).capacity_bytes
        return tier.stats().capacity_bytes


def list_targets(given: tuple[str, ...]) -> list[Target]:
    """Directories and URLs, and those in files but for memory tiers; none is opened.

    Raises:
        ConfigError: If one is none.
    """
    found: list[Target] = []
    for text in given:
        if text.endswith(".toml"):
            urls = [parse_tier_url(url) for url in _read_config(text).tier_urls]
            found += [Target(url.shown, url) for url in urls if url.parts.scheme != "memory"]
        elif "://" in text:
            url = parse_tier_url(text)
            if url.parts.scheme == "memory":
                raise ConfigError(f"targets: expected tiers outside a process, got {url.shown}")
            found.append(Target(url.shown, url))
        else:
            path = quote(str(Path(text).absolute()))
            found.append(Target(text, parse_tier_url(f"disk://{path}"), is_directory=True))
    return _told_apart(found)


def _read_config(path: str) -> CacheConfig:
    values = read_toml(path)
    if "cache" in values:  # a server's file, in which this is one table of several
        return CacheConfig.from_table("cache", as_table("cache", values["cache"]))
    return CacheConfig.from_table("config", values)


def _told_apart(targets: list[Target]) -> list[Target]:
    """With names and numbers where only what is not shown differs, as a bucket's endpoint."""
    alike = Counter(target.shown for target in targets)
    seen: Counter[str] = Counter()
    told = []
    for target in targets:
        seen[target.shown] += 1
        if alike[target.shown] > 1:
            number = f"{target.url.name} {seen[target.shown]}"
            target = replace(target, shown=f"{target.shown} ({number})")
        told.append(target)
    return told
