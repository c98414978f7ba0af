"""`kvkernels verify`: checks every byte of every record of a store."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from prefixstore.block_key import RecordName
from prefixstore.errors import BlockCorrupted, TierError, TierUnavailable
from prefixstore.protection import RecordKey
from prefixstore.record import verify
from prefixstore.record_header import read_fixed
from prefixstore.records.opening import KeyNeeded, key_option, plain_record, read_keys
from prefixstore.records.places import open_store, read_record
from prefixstore.tiers.disk import DiskTier


@dataclass
class Verification:
    """What was found in a store.

    Attributes:
        num_records: Records that were read.
        num_bytes: Their bytes.
        seconds: How long that took.
        num_gone: Records that were evicted or replaced before their turn came.
        num_locked: Records that are protected with a key that was not given: not verified.
        damaged: By block hash, what is wrong, or why the disk does not give it.
        problems: What the tier's own books say that does not add up, and what could not be done.
        num_deleted: Damaged records that were deleted.
    """

    num_records: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    num_gone: int = 0
    num_locked: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_deleted: int = 0


@click.command("verify")
@click.argument("store", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--delete", is_flag=True, help="Delete damaged records: they become misses.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@key_option
def verify_store(store: Path, delete: bool, as_json: bool, key_files: Sequence[Path]) -> None:
    """Check every byte of every record in STORE, the directory of a disk tier.

    Other processes may serve from it meanwhile. Ends with status 1 where something is wrong, also
    if it was deleted. Protected records are verified with their key, and left alone without.
    """
    keys = read_keys(key_files)
    console = Console(stderr=True)
    with open_store(store) as tier:
        found = _verify(tier, console, delete, keys)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
    else:
        _print(found)
    if found.damaged or found.problems:
        raise SystemExit(1)


def _verify(
    tier: DiskTier, console: Console, delete: bool, keys: Sequence[RecordKey]
) -> Verification:
    found = Verification()
    started = time.perf_counter()
    records = tier.list_records()
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(num_bytes for _, num_bytes in records))
        for name, num_bytes in records:
            with _go_on(found, f"{name.block_hash.hex()}  "):
                problem = _check(tier, name, num_bytes, keys, found)
                if problem is not None:
                    found.damaged[name.block_hash.hex()] = problem
                    found.num_deleted += delete and tier.delete(name)
            progress.advance(task, num_bytes)
    found.seconds = time.perf_counter() - started
    with _go_on(found, ""):
        found.problems += tier.check()
    return found


@contextmanager
def _go_on(found: Verification, where: str) -> Iterator[None]:
    """What the tier cannot do is told beside what was found, and ends nothing."""
    try:
        yield
    except TierError as error:
        found.problems.append(f"{where}{error}")


def _check(
    tier: DiskTier,
    name: RecordName,
    num_bytes: int,
    keys: Sequence[RecordKey],
    found: Verification,
) -> str | None:
    """What is wrong with a record, or None."""
    try:
        data = read_record(tier, name, num_bytes)
    except TierUnavailable as error:
        return str(error)
    if data is None:
        found.num_gone += 1
        return None
    found.num_records += 1
    found.num_bytes += len(data)
    try:
        fixed = read_fixed(memoryview(data))
        verify(plain_record(data, keys))
    except KeyNeeded:
        found.num_locked += 1
    except BlockCorrupted as error:
        return str(error)
    if (fixed.identity, fixed.block_hash) != name:
        return (
            f"name: expected {name.block_hash.hex()} of identity {name.identity.hex()},"
            f" got {fixed.block_hash.hex()} of identity {fixed.identity.hex()}"
        )
    return None


def _print(found: Verification) -> None:
    for block_hash, problem in found.damaged.items():
        click.echo(f"{block_hash}  {problem}")
    for problem in found.problems:
        click.echo(problem)
    rate = found.num_bytes / max(found.seconds, 1e-9) / 1e9
    click.echo(
        f"{found.num_records} records, {found.num_bytes:,} bytes, {rate:.1f} GB/s:"
        f" {len(found.damaged)} damaged, {found.num_deleted} deleted"
    )
    if found.num_locked:
        click.echo(f"{found.num_locked} protected and not verified: their key is needed (--key)")
