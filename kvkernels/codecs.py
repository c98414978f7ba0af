"""How a block is written outside the pool: the codecs, and where their parts lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kvkernels.layout import KVLayout

LAYER_ALIGNMENT = 64
NUM_ESCAPES = 16  # per head, for keys and for values: exponents that "l12" lists apart
UNUSED_ESCAPE = 0xFFFFFFFF

_PART_ALIGNMENT = 4  # checksums go over words
_MAX_HEAD_DIM = 1024  # of codecs other than raw
_TABLE_WIDTH = 3 + 2 * 10


@dataclass(frozen=True)
class Codec:
    """A way to write a layer.

    Attributes:
        name: What callers and options call it.
        code: What a record calls it.
        key_bits: Of a key's code; 16 for "as it is", 12 for "l12".
        value_bits: The same of a value's.
        key_group: Neighbouring tokens of a key's channel that share a scale; None for all.
        value_group: Neighbouring channels of a value that share a scale; None for all.
    """

    name: str
    code: int
    key_bits: int
    value_bits: int
    key_group: int | None = None
    value_group: int | None = None


CODECS = {
    codec.name: codec
    for codec in (
        Codec("raw", 1, 16, 16),
        Codec("l12", 2, 12, 12),
        Codec("q8", 3, 8, 8),
        Codec("k8v4", 4, 8, 4, None, 64),
        Codec("q4", 5, 4, 4, 32, 32),
        Codec("k4v2", 6, 4, 2, 64, 64),
        Codec("q2", 7, 2, 2, 64, 64),
    )
}


@dataclass(frozen=True)
class Part:
    """A dense array inside a side: `shape` items of `dtype` from byte `offset` of the layer on."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the part, without padding behind it."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SideFormat:
    """How one side of a layer is written: its keys, its values, or a part of its latents.

    Attributes:
        plane: Where in the pool: 0 for keys and latents, 1 for values.
        channels: Which of a row's channels.
        is_key: Whether tokens of a channel share a scale, or channels of a token.
        bits: Of a code; 16 for "as it is", whatever the dtype, and 12 for "l12".
        num_groups: Sets of scales: of tokens for keys, of channels for values; 0 without scales.
        parts: The arrays, in order.
    """

    plane: int
    channels: range
    is_key: bool
    bits: int
    num_groups: int
    parts: tuple[Part, ...]

    @property
    def end(self) -> int:
        """Where its last part ends, in bytes from the start of the layer."""
        return self.parts[-1].offset + self.parts[-1].num_bytes


@dataclass(frozen=True)
class LayerFormat:
    """How a layer is written: `num_bytes` from byte `offset` of the payload on."""

    codec: Codec
    offset: int
    num_bytes: int
    sides: tuple[SideFormat, ...]

    @property
    def is_raw(self) -> bool:
        """Whether the layer's bytes are those in the pool."""
        return all(side.bits == 16 for side in self.sides)


class BlockFormat:
    """How a block is written: the payload of its record.

    A payload is one layer after the other, each on a multiple of 64 bytes::

        layer 0 | keys: codes, scales | values: codes, scales | zeros
        layer 1 | ...

    Of latents, codes and scales are those of keys, and the rotary part follows as it is::

        layer 0 | latents: codes, scales | rotary parts | zeros

    Without loss ("raw", "l12") a whole row is written like a key.

    Args:
        layout: Of the pool's blocks.
        codecs: A codec's name for all layers, or one for each.

    Raises:
        ValueError: If there is no such codec, or it does not fit the layout: "l12" wants bfloat16,
            codes of 4 or 2 bits a head_dim, or a latent_dim, that fills bytes.
    """

    def __init__(self, layout: KVLayout, codecs: str | Sequence[str]) -> None:
        names = [codecs] * layout.num_layers if isinstance(codecs, str) else list(codecs)
        if len(names) != layout.num_layers:
            raise ValueError(
                f"codecs: expected one name or {layout.num_layers}, one a layer, got {len(names)}"
            )
        self.layout = layout
        formats = {name: _format_layer(layout, _find(name)) for name in dict.fromkeys(names)}
        ends = list(itertools.accumulate(formats[name].num_bytes for name in names))
        self.layers = tuple(
            replace(formats[name], offset=end - formats[name].num_bytes)
            for name, end in zip(names, ends, strict=True)
        )
        self.payload_bytes = ends[-1]

    @property
    def codecs(self) -> tuple[str, ...]:
        """The name of each layer's codec."""
        return tuple(layer.codec.name for layer in self.layers)

    def cut(self, layers: range) -> slice:
        """The bytes of a payload that hold some neighbouring layers, at least one."""
        first, last = self.layers[layers[0]], self.layers[layers[-1]]
        return slice(first.offset, last.offset + last.num_bytes)

    @cached_property
    def table(self) -> torch.Tensor:
        """``[num_layers, 23]``, int64, for kernels: where layers lie and how they are written.

        Offset, bytes and number of sides of a layer; then for each of two sides plane, first
        channel and number of channels, whether it is of keys, bits, number of groups, and the
        offsets of up to four parts from the layer's start. Zeros where there is but one side.
        """
        rows = [
            [layer.offset, layer.num_bytes, len(layer.sides)]
            + [number for side in layer.sides for number in _numbers(side)]
            for layer in self.layers
        ]
        return torch.tensor([row + [0] * (_TABLE_WIDTH - len(row)) for row in rows], device="cpu")

    @cached_property
    def raw(self) -> BlockFormat:
        """The format that holds any block of this layout as it is."""
        return BlockFormat(self.layout, "raw")

    def __repr__(self) -> str:
        names = sorted(set(self.codecs))
        return f"BlockFormat({self.layout}, {names[0] if len(names) == 1 else self.codecs})"


def _numbers(side: SideFormat) -> tuple[int, ...]:
    offsets = [part.offset for part in side.parts]
    place = (side.plane, side.channels.start, len(side.channels))
    method = (side.is_key, side.bits, side.num_groups)
    return (*place, *method, *offsets, *[0] * (4 - len(offsets)))


def _find(name: str) -> Codec:
    if name not in CODECS:
        raise ValueError(f"codecs: expected one of {tuple(CODECS)}, got {name!r}")
    return CODECS[name]


def _format_layer(layout: KVLayout, codec: Codec) -> LayerFormat:
    """The format of a layer at the payload's start."""
    if codec.name == "l12" and layout.dtype != torch.bfloat16:
        raise ValueError(f"codecs: expected blocks of bfloat16 for l12, got {layout.dtype}")
    if codec.name != "raw" and layout.head_dim > _MAX_HEAD_DIM:
        raise ValueError(
            f"codecs: expected a head_dim of at most {_MAX_HEAD_DIM} for {codec.name}, got"
            f" {layout.head_dim}"
        )
    sides: list[SideFormat] = []
    end = 0
    for plane, channels, is_key, bits, group in _sides(layout, codec):
        per_byte = 8 // math.gcd(8, bits)
        if len(channels) % per_byte:
            what = "head_dim" if len(channels) == layout.head_dim else "latent_dim"
            raise ValueError(
                f"codecs: expected a {what} that is a multiple of {per_byte} for {codec.name}, got"
                f" {len(channels)}"
            )
        rows = (layout.num_kv_heads, layout.block_size)
        num_groups, arrays = _arrays(rows, len(channels), is_key, bits, group, layout.dtype)
        parts = tuple(_place(end, arrays))
        sides.append(SideFormat(plane, channels, is_key, bits, num_groups, parts))
        end = sides[-1].end
    return LayerFormat(codec, 0, _align(end, LAYER_ALIGNMENT), tuple(sides))


def _sides(layout: KVLayout, codec: Codec) -> list[tuple[int, range, bool, int, int | None]]:
    """Plane, channels, whether they are of keys, bits and group of a layer's sides."""
    row, key = range(layout.head_dim), (True, codec.key_bits, codec.key_group)
    if layout.latent_dim is None:
        return [(0, row, *key), (1, row, False, codec.value_bits, codec.value_group)]
    if codec.key_bits >= 12:
        return [(0, row, *key)]
    latent, rotary = row[: layout.latent_dim], row[layout.latent_dim :]
    # The rotary channels are few, and quantising them costs much accuracy.
    return [(0, latent, *key)] + ([(0, rotary, True, 16, None)] if rotary else [])


_Array = tuple[str, tuple[int, ...], torch.dtype]


def _arrays(
    rows: tuple[int, int],
    dim: int,
    is_key: bool,
    bits: int,
    group: int | None,
    dtype: torch.dtype,
) -> tuple[int, list[_Array]]:
    """Sets of scales, and the arrays, of `[num_kv_heads, block_size]` rows of `dim` channels."""
    num_heads, block_size = rows
    if bits == 16:
        return 0, [("numbers", (*rows, dim), dtype)]
    if bits == 12:
        return 0, [
            ("low", (*rows, dim), torch.uint8),
            ("exponents", (*rows, dim // 2), torch.uint8),
            ("escapes", (num_heads, NUM_ESCAPES), torch.int32),
            ("tops", (num_heads, dim), torch.uint8),
        ]
    length = block_size if is_key else dim
    num_groups = length // math.gcd(length, group or length)
    scales = (num_heads, num_groups, dim, 2) if is_key else (*rows, num_groups, 2)
    return num_groups, [
        ("codes", (*rows, dim * bits // 8), torch.uint8),
        ("scales", scales, torch.float16),
    ]


def _place(start: int, arrays: Iterable[_Array]) -> Iterator[Part]:
    for name, shape, dtype in arrays:
        part = Part(name, shape, dtype, _align(start, _PART_ALIGNMENT))
        yield part
        start = part.offset + part.num_bytes


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
