"""`kvkernels key`: makes a key for a shared store."""

from __future__ import annotations

from pathlib import Path

import click

from prefixstore.keys import write_key


@click.command("key")
@click.argument("file", type=click.Path(path_type=Path))
def make_key(file: Path) -> None:
    """Write a new key to FILE, which only its owner may read.

    It serves as auth_key or as seal_key of a tier: 32 random bytes, as hexadecimal digits. A file
    that is there already is left alone.
    """
    write_key(file)
    click.echo(f"{file}: a new key; tiers take it as auth_key={file} or seal_key={file}")
