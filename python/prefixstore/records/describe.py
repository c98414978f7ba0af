"""What a record says of itself, as data and as tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefixstore.errors import BlockCorrupted
from prefixstore.record import RecordHeader, read_header, verify

_SHOWN_TOKENS = 16


def describe(record: bytes) -> dict[str, Any]:
    """A record's header as plain data, and what is wrong with the rest.

    Raises:
        BlockCorrupted: If the header itself is not that of a record.
    """
    header = read_header(record)
    try:
        verify(record)
        problem = None
    except BlockCorrupted as error:
        problem = str(error)
    key = header.key
    layout = key.layout
    return {
        "layout": asdict(layout) | {"codecs": list(layout.block_format.codecs)},
        "identity": key.identity.hex(),
        "block_hash": key.block_hash.hex(),
        "parent_hash": key.parent_hash.hex(),
        "tokens": key.tokens.tolist(),
        "header_bytes": layout.header_bytes,
        "payload_bytes": layout.payload_bytes,
        "record_bytes": layout.record_bytes,
        "block_bytes": layout.block_bytes,
        "layers": _describe_layers(header),
        "problem": problem,
    }


def _describe_layers(header: RecordHeader) -> list[dict[str, Any]]:
    codecs = header.key.layout.block_format.codecs
    return [
        {
            "codec": codec,
            "offset": int(entry["offset"]),
            "bytes": int(entry["bytes"]),
            "sum": f"{int(entry['sum']):016x}",
            "weighted_sum": f"{int(entry['weighted']):016x}",
        }
        for codec, entry in zip(codecs, header.table, strict=True)
    ]


def print_record(console: Console, described: dict[str, Any]) -> None:
    """Print what `describe` gave, and the record's protection beside it."""
    layout = described["layout"]
    tokens = described["tokens"]
    shown = " ".join(map(str, tokens[:_SHOWN_TOKENS]))
    rest = len(tokens) - _SHOWN_TOKENS
    ratio = described["block_bytes"] / described["record_bytes"]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in (
        ("block hash", described["block_hash"]),
        ("parent hash", described["parent_hash"]),
        ("identity", described["identity"]),
        (
            "block",
            f"{layout['block_size']} tokens, {layout['num_layers']} layers of"
            f" {layout['num_kv_heads']} heads of {layout['head_dim']}"
            + (f" (latents of {layout['latent_dim']})" if layout["latent_dim"] else "")
            + f", {layout['dtype']}, layer group {layout['layer_group']}",
        ),
        ("codec", ", ".join(dict.fromkeys(layout["codecs"]))),
        (
            "bytes",
            f"{described['record_bytes']:,} = header {described['header_bytes']:,} + payload"
            f" {described['payload_bytes']:,}; {ratio:.2f} times smaller than the block",
        ),
        ("tokens", shown + (f" ... {rest} more" if rest > 0 else "")),
        ("protection", described["protection"]),
        ("checks", described["problem"] or "every byte is as it was written"),
    ):
        table.add_row(name, escape(value))  # which may hold bytes of anyone's
    console.print(table)


def print_layers(console: Console, described: dict[str, Any]) -> None:
    """Print the layer table."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("layer", "codec", "offset", "bytes", "sum", "weighted sum"):
        table.add_column(name, justify="left" if name == "codec" else "right", no_wrap=True)
    for number, layer in enumerate(described["layers"]):
        table.add_row(
            str(number),
            layer["codec"],
            f"{layer['offset']:,}",
            f"{layer['bytes']:,}",
            layer["sum"],
            layer["weighted_sum"],
        )
    console.print(table)
