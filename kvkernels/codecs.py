"""How a block is written outside the pool: the codecs, and where their parts lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kvkernels.layout import KVLayout

LAYER_ALIGNMENT = 64
NUM_ESCAPES = 16  # of each head and side: exponents that "l12" keeps apart
UNUSED_ESCAPE = 0xFFFFFFFF

_PART_ALIGNMENT = 4  # checksums go over words
_MAX_HEAD_DIM = 1024  # of codecs other than raw


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
    """A dense array inside a layer: `shape` items of `dtype` from byte `offset` on."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SideFormat:
    """How the keys or the values of a layer are written.

    Attributes:
        bits: Of a code; 16 for "as it is", whatever the dtype, and 12 for "l12".
        num_groups: Sets of scales: of tokens for keys, of channels for values; 0 without scales.
        parts: The arrays, in order.
    """

    bits: int
    num_groups: int
    parts: tuple[Part, ...]

    @property
    def end(self) -> int:
        return self.parts[-1].offset + self.parts[-1].num_bytes


@dataclass(frozen=True)
class LayerFormat:
    """How a layer is written: `num_bytes` from byte `offset` of the payload on."""

    codec: Codec
    offset: int
    num_bytes: int
    keys: SideFormat
    values: SideFormat


class BlockFormat:
    """How a block is written: the payload of its record.

    A payload is one layer after the other, each on a multiple of 64 bytes::

        layer 0 | keys: codes, scales | values: codes, scales | zeros
        layer 1 | ...

    Args:
        layout: Of the pool's blocks.
        codecs: A codec's name for all layers, or one for each.

    Raises:
        ValueError: If there is no such codec, or it does not fit the layout: "l12" wants bfloat16,
            codes of 4 or 2 bits a head_dim that fills bytes.
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

    @cached_property
    def table(self) -> torch.Tensor:
        """``[num_layers, 14]``, int64, for kernels: where layers lie and how they are written.

        Offset and bytes of a layer; then for keys and for values bits, number of groups, and the
        offsets of up to four parts from the layer's start.
        """
        return torch.tensor(
            [
                (layer.offset, layer.num_bytes, *_numbers(layer.keys), *_numbers(layer.values))
                for layer in self.layers
            ]
        )

    @cached_property
    def raw(self) -> BlockFormat:
        """The format that holds any block of this layout as it is."""
        return BlockFormat(self.layout, "raw")

    def __repr__(self) -> str:
        names = sorted(set(self.codecs))
        return f"BlockFormat({self.layout}, {names[0] if len(names) == 1 else self.codecs})"


def _numbers(side: SideFormat) -> tuple[int, ...]:
    offsets = [part.offset for part in side.parts]
    return (side.bits, side.num_groups, *offsets, *[0] * (4 - len(offsets)))


def _find(name: str) -> Codec:
    if name not in CODECS:
        raise ValueError(f"codecs: expected one of {tuple(CODECS)}, got {name!r}")
    return CODECS[name]


def _format_layer(layout: KVLayout, codec: Codec) -> LayerFormat:
    """The format of a layer at the payload's start."""
    if codec.name == "l12" and layout.dtype != torch.bfloat16:
        raise ValueError(f"codecs: expected blocks of bfloat16 for l12, got {layout.dtype}")
    num_bits = [bits for bits in (codec.key_bits, codec.value_bits) if bits < 16]
    channels = max((8 // math.gcd(8, bits) for bits in num_bits), default=1)
    if layout.head_dim % channels:
        raise ValueError(
            f"codecs: expected a head_dim that is a multiple of {channels} for {codec.name}, got"
            f" {layout.head_dim}"
        )
    if num_bits and layout.head_dim > _MAX_HEAD_DIM:
        raise ValueError(
            f"codecs: expected a head_dim of at most {_MAX_HEAD_DIM} for {codec.name}, got"
            f" {layout.head_dim}"
        )
    keys = _format_side(layout, "key", codec.key_bits, codec.key_group, 0)
    values = _format_side(layout, "value", codec.value_bits, codec.value_group, keys.end)
    return LayerFormat(codec, 0, _align(values.end, LAYER_ALIGNMENT), keys, values)


def _format_side(
    layout: KVLayout, name: str, bits: int, group: int | None, start: int
) -> SideFormat:
    heads, size, dim = layout.num_kv_heads, layout.block_size, layout.head_dim
    rows = (heads, size)
    if bits == 16:
        return SideFormat(16, 0, tuple(_place(start, (f"{name}s", (*rows, dim), layout.dtype))))
    if bits == 12:
        parts = _place(
            start,
            (f"{name}_low", (*rows, dim), torch.uint8),
            (f"{name}_exponents", (*rows, dim // 2), torch.uint8),
            (f"{name}_escapes", (heads, NUM_ESCAPES), torch.int32),
            (f"{name}_tops", (heads, dim), torch.uint8),
        )
        return SideFormat(12, 0, tuple(parts))
    length = size if name == "key" else dim
    num_groups = length // math.gcd(length, group or length)
    scales = (heads, num_groups, dim, 2) if name == "key" else (*rows, num_groups, 2)
    parts = _place(
        start,
        (f"{name}_codes", (*rows, dim * bits // 8), torch.uint8),
        (f"{name}_scales", scales, torch.float16),
    )
    return SideFormat(bits, num_groups, tuple(parts))


def _place(start: int, *parts: tuple[str, tuple[int, ...], torch.dtype]) -> Iterator[Part]:
    for name, shape, dtype in parts:
        part = Part(name, shape, dtype, _align(start, _PART_ALIGNMENT))
        yield part
        start = part.offset + part.num_bytes


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
