"""`kvkernels store`: what tiers hold, whether it adds up, and giving it back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from prefixstore.config import CacheConfig
from prefixstore.errors import ConfigError
from prefixstore.records.places import open_store
from prefixstore.tier_urls import open_tiers, parse_tier_url
from prefixstore.tiers.base import Tier


@dataclass(frozen=True)
class _Target:
    """A tier that a command is asked about.

    Attributes:
        url: As it was given, without options and password.
        tier: Open.
    """

    url: str
    tier: Tier


@click.group("store")
def store() -> None:
    """Look after tiers: directories of disk tiers, URLs, or TOML files that list URLs.

    Other processes may serve from them meanwhile. Looking at a disk tier evicts nothing, whatever
    its URL says of max_bytes.
    """


def _command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A subcommand on targets, with `--json`."""

    def decorate(function: Callable[..., None]) -> click.Command:
        function = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)
        function = click.argument("targets", nargs=-1, required=True, metavar="TARGET...")(function)
        return store.command(name)(function)

    return decorate


@_command("stats")
def print_stats(targets: tuple[str, ...], as_json: bool) -> None:
    """Print what each tier holds, and of which identities."""
    found: dict[str, Any] = {}
    for target in _open(targets):
        identities = {
            identity.hex(): asdict(held) for identity, held in target.tier.list_identities().items()
        }
        found[target.url] = {**asdict(target.tier.stats()), "identities": identities}
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    table = Table(box=SIMPLE_HEAD)
    for column, justify in (("", "left"), ("records", "right"), ("bytes", "right")):
        table.add_column(column, justify=justify, no_wrap=column != "")  # type: ignore[arg-type]
    for url, stats in found.items():
        bound = f" of {decimal(stats['capacity_bytes'])}" if stats["capacity_bytes"] else ""
        used = decimal(stats["used_bytes"]) + bound
        table.add_row(f"[bold]{url}", f"{stats['num_records']:,}", used)
        for identity, held in stats["identities"].items():
            table.add_row(f"  {identity}", f"{held['num_records']:,}", decimal(held["num_bytes"]))
    Console().print(table)


@_command("check")
@click.option("--fix", is_flag=True, help="Mend what can be mended; drop what cannot be trusted.")
def check_tiers(targets: tuple[str, ...], as_json: bool, fix: bool) -> None:
    """Recount each tier's books. Ends with status 1 where something does not add up.

    `kvkernels verify` reads every byte of the records as well.
    """
    found = {target.url: target.tier.check(fix) for target in _open(targets)}
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        for url, problems in found.items():
            click.echo(f"{url}: {len(problems) or 'no'} problems")
            for problem in problems:
                click.echo(f"  {problem}")
    if any(found.values()):
        raise SystemExit(1)


@_command("sweep")
def sweep_tiers(targets: tuple[str, ...], as_json: bool) -> None:
    """Give back what expired, and what processes that died left behind."""
    found = {target.url: asdict(target.tier.sweep()) for target in _open(targets)}
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for url, swept in found.items():
        click.echo(
            f"{url}: {swept['num_expired']} expired, {swept['num_orphans']} orphans,"
            f" {decimal(swept['num_bytes'])}"
        )


@_command("clear")
@click.option(
    "--identity",
    "identities",
    multiple=True,
    metavar="HEX",
    help="Only this one, by its digits or the first of them; `stats` lists them.",
)
@click.option("--all", "is_all", is_flag=True, help="Every identity.")
def clear_tiers(
    targets: tuple[str, ...], as_json: bool, identities: tuple[str, ...], is_all: bool
) -> None:
    """Forget the records of some identities (a model and a salt), or all."""
    if bool(identities) == is_all:
        raise click.UsageError("expected --identity or --all, and not both")
    found: dict[str, list[str]] = {}
    for target in _open(targets):
        chosen = _choose(list(target.tier.list_identities()), identities)
        for identity in chosen:
            target.tier.delete_identity(identity)
        found[target.url] = [identity.hex() for identity in chosen]
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for url, forgotten in found.items():
        click.echo(f"{url}: {len(forgotten)} identities forgotten")
        for name in forgotten:
            click.echo(f"  {name}")


def _choose(there: list[bytes], prefixes: tuple[str, ...]) -> list[bytes]:
    """The identities that begin with these digits; all where none are given.

    Raises:
        ConfigError: If digits fit more than one.
    """
    if not prefixes:
        return there
    chosen = []
    for prefix in prefixes:
        fitting = [one for one in there if one.hex().startswith(prefix.lower())]
        if len(fitting) > 1:
            raise ConfigError(
                f"identity: expected digits of one, got {prefix!r}, which {len(fitting)} have"
            )
        chosen += fitting
    return chosen


def _open(targets: tuple[str, ...]) -> Iterator[_Target]:
    """Open one tier after the other.

    Raises:
        ConfigError: If one is none.
        TierError: If one cannot be opened.
    """
    for url in _list_urls(targets):
        with _open_one(url) as tier:
            yield _Target(parse_tier_url(url).shown if "://" in url else url, tier)


@contextmanager
def _open_one(url: str) -> Iterator[Tier]:
    path = Path(url) if "://" not in url else _disk_path(url)
    if path is not None:
        with open_store(path) as disk:
            yield disk
        return
    ((tier,), _) = open_tiers([url])
    with closing(tier):
        yield tier


def _disk_path(url: str) -> Path | None:
    """The directory of a disk tier; None for another kind."""
    parts = parse_tier_url(url).parts
    if parts.scheme == "memory":
        raise ConfigError(f"targets: expected tiers outside a process, got {url}")
    return Path(unquote(parts.path)) if parts.scheme == "disk" else None


def _list_urls(targets: tuple[str, ...]) -> Iterator[str]:
    """Directories and URLs; those in files, but for memory tiers."""
    for target in targets:
        if target.endswith(".toml"):
            urls = CacheConfig.from_toml(target).tier_urls
            yield from (url for url in urls if not url.startswith("memory:"))
        else:
            yield target
