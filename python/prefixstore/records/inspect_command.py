"""`kvkernels inspect`: prints a record, or lists those of a store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefixstore.errors import BlockCorrupted, ConfigError, TierError
from prefixstore.protection import RecordKey, protection_of
from prefixstore.record import read_header
from prefixstore.records.describe import describe, print_layers, print_record
from prefixstore.records.opening import KeyNeeded, key_option, plain_record, read_keys
from prefixstore.records.places import find_record, open_store, read_record
from prefixstore.tiers.disk import DiskTier


@click.command("inspect")
@click.argument("record", type=click.Path(exists=True, path_type=Path))
@click.option("--block", help="First digits of a block's hash, where RECORD is a store.")
@click.option("--layers", is_flag=True, help="Print the layer table too.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the record's bytes to this file, as the store has them.",
)
@key_option
def inspect_record(
    record: Path,
    block: str | None,
    layers: bool,
    as_json: bool,
    save: Path | None,
    key_files: Sequence[Path],
) -> None:
    """Print what RECORD, a file or the directory of a store, says of itself.

    Without --block a store's records are listed. Ends with status 1 where a byte of the record is
    not as it was written.
    """
    keys = read_keys(key_files)
    if record.is_dir() and block is None:
        with open_store(record) as tier:
            _list_records(tier, as_json, keys)
        return
    data = _read(record, block)
    try:
        described = describe(plain_record(data, keys))
        described["protection"] = str(protection_of(memoryview(data)) or "none")
    except (BlockCorrupted, KeyNeeded) as error:
        raise ConfigError(f"record: {error}") from None
    if save is not None:
        save.write_bytes(data)
    if as_json:
        click.echo(json.dumps(described, indent=1))
    else:
        console = Console()
        print_record(console, described)
        if layers:
            print_layers(console, described)
    if described["problem"] is not None:
        raise SystemExit(1)


def _read(record: Path, block: str | None) -> bytes:
    if not record.is_dir():
        if block is not None:
            raise ConfigError(f"block: expected a store to find it in, got the file {record}")
        return record.read_bytes()
    assert block is not None
    with open_store(record) as tier:
        return find_record(tier, block)


def _list_records(tier: DiskTier, as_json: bool, keys: Sequence[RecordKey]) -> None:
    rows: list[dict[str, Any]] = []
    for name, num_bytes in tier.list_records():
        row: dict[str, Any] = {"block_hash": name.block_hash.hex(), "bytes": num_bytes}
        try:
            data = read_record(tier, name, num_bytes)
        except TierError as error:
            rows.append(row | {"problem": str(error)})
            continue
        if data is not None:  # evicted meanwhile
            rows.append(row | _summarise(data, keys))
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("block hash", "bytes", "codecs", "dtype", "tokens", "group"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        block_hash, num_bytes = row.pop("block_hash"), row.pop("bytes")
        cells = (escape(str(value)) for value in row.values())  # which may be bytes of anyone's
        table.add_row(block_hash, f"{num_bytes:,}", *cells)
    Console().print(table)
    click.echo(f"{len(rows)} records")


def _summarise(record: bytes, keys: Sequence[RecordKey]) -> dict[str, Any]:
    try:
        layout = read_header(plain_record(record, keys)).key.layout
    except (BlockCorrupted, KeyNeeded) as error:
        return {"problem": str(error)}
    return {
        "codecs": ", ".join(dict.fromkeys(layout.codecs)),
        "dtype": layout.dtype,
        "block_size": layout.block_size,
        "layer_group": layout.layer_group,
    }
