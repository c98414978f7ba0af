"""The group of commands behind `kvkernels`, and how their errors are shown."""

from __future__ import annotations

import errno
import logging
from typing import Any

import click

from kvkernels import UnsupportedError, __version__
from prefixstore.demo.command import demo
from prefixstore.errors import StoreError
from prefixstore.loadtest.command import bench
from prefixstore.quality.command import quality
from prefixstore.records.inspect_command import inspect_record
from prefixstore.records.key_command import make_key
from prefixstore.records.store_commands import store
from prefixstore.records.verify_command import verify_store
from prefixstore.server.command import serve
from prefixstore.testing.command import check


class _Group(click.Group):
    """A group whose commands show the project's own errors, and the system's, as one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (StoreError, UnsupportedError) as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            # A pipe that nobody reads any more is ended quietly by click.
            if error.errno == errno.EPIPE or error.strerror is None:
                raise
            where = "" if error.filename is None else f"{error.filename}: "
            raise click.ClickException(f"{where}{error.strerror}") from error


@click.group(cls=_Group)
@click.version_option(__version__, prog_name="kvkernels")
@click.option("-v", "--verbose", is_flag=True, help="Log what the parts do.")
def kvkernels(verbose: bool) -> None:
    """A verified KV cache for PyTorch language models."""
    if verbose:
        logging.getLogger().setLevel(logging.INFO)


kvkernels.add_command(bench)
kvkernels.add_command(check)
kvkernels.add_command(demo)
kvkernels.add_command(inspect_record)
kvkernels.add_command(make_key)
kvkernels.add_command(quality)
kvkernels.add_command(serve)
kvkernels.add_command(store)
kvkernels.add_command(verify_store)


def run() -> None:
    """Run the command line of this process."""
    kvkernels(prog_name="kvkernels")
