"""`kvkernels store`: what tiers hold, whether it adds up, and giving it back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from prefixstore.block_key import DIGEST_BYTES
from prefixstore.errors import ConfigError, StoreError
from prefixstore.records.targets import Target, list_targets
from prefixstore.tiers.base import Tier
from prefixstore.tiers.protected import ProtectedTier

_DIGITS = re.compile(rf"[0-9a-f]{{1,{2 * DIGEST_BYTES}}}")

Result = dict[str, Any]
"""What came of one target, and the error that ended it, if one did."""


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

    def look(target: Target, tier: Tier, result: Result) -> None:
        held = tier.list_identities()
        result["num_records"] = sum(one.num_records for one in held.values())
        result["num_bytes"] = sum(one.num_bytes for one in held.values())
        result["capacity_bytes"] = target.capacity_bytes(tier)
        result["identities"] = {identity.hex(): asdict(one) for identity, one in held.items()}

    results = _run(targets, as_json, look, lambda result: None)
    if not as_json:
        _print_table([result for result in results if "identities" in result])
    _end(results)


@_command("check")
@click.option("--fix", is_flag=True, help="Mend what can be mended; drop what cannot be trusted.")
def check_tiers(targets: tuple[str, ...], as_json: bool, fix: bool) -> None:
    """Recount each tier's books. Ends with status 1 where something does not add up.

    `kvkernels verify` reads every byte of the records as well.
    """

    def check(target: Target, tier: Tier, result: Result) -> None:
        result["problems"] = tier.check(fix)

    def show(result: Result) -> None:
        click.echo(f"{result['target']}: {len(result['problems']) or 'no'} problems")
        for problem in result["problems"]:
            click.echo(f"  {problem}")

    results = _run(targets, as_json, check, show)
    _end(results, is_wrong=any(result.get("problems") for result in results))


@_command("sweep")
def sweep_tiers(targets: tuple[str, ...], as_json: bool) -> None:
    """Give back what expired, and what processes that died left behind."""

    def sweep(target: Target, tier: Tier, result: Result) -> None:
        result.update(asdict(tier.sweep()))

    def show(result: Result) -> None:
        click.echo(
            f"{result['target']}: {result['num_expired']} expired, {result['num_orphans']} orphans,"
            f" {decimal(result['num_bytes'])}"
        )

    _end(_run(targets, as_json, sweep, show))


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
    """Forget the records of some identities (a model and a salt), or all.

    Ends with status 1 where an identity that was asked for is in none of the targets.
    """
    if bool(identities) == is_all:
        raise click.UsageError("expected --identity or --all, and not both")
    prefixes = [_check_digits(digits) for digits in identities]
    missing = set(prefixes)

    def clear(target: Target, tier: Tier, result: Result) -> None:
        there = list(tier.list_identities())
        found = {prefix: _find(tier, there, prefix) for prefix in prefixes}
        missing.difference_update(prefix for prefix, chosen in found.items() if chosen)
        result["forgotten"] = []
        for identity in there if is_all else dict.fromkeys(chain(*found.values())):
            tier.delete_identity(identity)
            result["forgotten"].append(identity.hex())

    def show(result: Result) -> None:
        click.echo(f"{result['target']}: {len(result['forgotten'])} identities forgotten")
        for name in result["forgotten"]:
            click.echo(f"  {name}")

    results = _run(targets, as_json, clear, show)
    for prefix in sorted(missing):
        click.echo(f"identity: expected digits of one that is there, got {prefix!r}", err=True)
    _end(results, is_wrong=bool(missing))


def _check_digits(digits: str) -> str:
    if not _DIGITS.fullmatch(digits.lower()):
        raise ConfigError(
            f"identity: expected 1 to {2 * DIGEST_BYTES} hexadecimal digits, got {digits!r}"
        )
    return digits.lower()


def _find(tier: Tier, there: list[bytes], prefix: str) -> list[bytes]:
    """The identity that begins with these digits, if there is one.

    Raises:
        ConfigError: If there are several.
    """
    fitting = [one for one in there if one.hex().startswith(prefix)]
    if len(fitting) > 1:
        raise ConfigError(
            f"identity: expected digits of one, got {prefix!r}, which {len(fitting)} have"
        )
    if not fitting and len(prefix) == 2 * DIGEST_BYTES and isinstance(tier, ProtectedTier):
        # what an older key wrote is listed under another name, and forgotten with this one
        whole = bytes.fromhex(prefix)
        fitting = [whole] if set(tier.listed_as(whole)) & set(there) else []
    return fitting


def _run(
    targets: tuple[str, ...],
    as_json: bool,
    act: Callable[[Target, Tier, Result], None],
    show: Callable[[Result], None],
) -> list[Result]:
    """Act on one target after the other, and show what came of each as soon as it is done.

    One that fails is told, with what was done of it before, and the others are done all the same.
    """
    results: list[Result] = []
    for target in list_targets(targets):
        result: Result = {}
        try:
            with target.open() as tier:
                act(target, tier, result)
        except StoreError as error:
            result["error"] = str(error)
        results.append({"target": target.shown, **result})
        if as_json:
            continue
        if result.keys() - {"error"}:
            show(results[-1])
        if "error" in result:
            click.echo(f"{target.shown}: {result['error']}", err=True)
    if as_json:
        click.echo(json.dumps(results, indent=1))
    return results


def _end(results: list[Result], is_wrong: bool = False) -> None:
    """End with status 1 where something is wrong, or a target failed."""
    if is_wrong or any("error" in result for result in results):
        raise SystemExit(1)


def _print_table(results: list[Result]) -> None:
    table = Table(box=SIMPLE_HEAD)
    for column, justify in (("", "left"), ("records", "right"), ("bytes", "right")):
        table.add_column(column, justify=justify, no_wrap=column != "")  # type: ignore[arg-type]
    for result in results:
        bound = f" of {decimal(result['capacity_bytes'])}" if result["capacity_bytes"] else ""
        used = decimal(result["num_bytes"]) + bound
        table.add_row(f"[bold]{escape(result['target'])}", f"{result['num_records']:,}", used)
        for identity, held in result["identities"].items():
            table.add_row(f"  {identity}", f"{held['num_records']:,}", decimal(held["num_bytes"]))
    Console().print(table)
