"""The shape of a record: what its block looks like, how it is written, and how long that is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from kvkernels import BlockFormat, KVLayout
from prefixstore.record_header import FIXED_BYTES, MAX_HEADER_BYTES, MAX_RECORD_BYTES

TABLE_ENTRY_BYTES = 24
ALIGNMENT = 64

LOSSLESS = frozenset({"raw", "l12"})  # codecs that give back every bit
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RecordLayout:
    """Shape of the block in a record, and how it is written.

    Attributes:
        num_layers: Layers in the group.
        num_kv_heads: Key-value heads of a layer.
        head_dim: Width of one head, in elements.
        block_size: Tokens in the block; one of 16, 32, 64, 128, 256.
        dtype: Of the block in the pool: "float32", "float16" or "bfloat16".
        layer_group: Which of the model's layer groups, from 0.
        codecs: A codec's name for each layer; a tuple of one, or a name alone, is for all layers.
            Of equal names one is kept, so that equal layouts compare equal.
        latent_dim: Leading channels of a row that are keys and values at once, where a token has
            one row instead of a key and a value; see `KVLayout`.

    Raises:
        ValueError: If a value is out of range, a codec is unknown or does not fit the block, or
            no record holds such a block.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    layer_group: int = 0
    codecs: tuple[str, ...] = ("raw",)
    latent_dim: int | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("num_layers", 1),
            ("num_kv_heads", 1),
            ("head_dim", 1),
            ("block_size", 1),
            ("layer_group", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= 0xFFFF:
                raise ValueError(f"{name}: expected an integer {least} to 65535, got {value!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {self.dtype!r}")
        names = (self.codecs,) if isinstance(self.codecs, str) else tuple(self.codecs)
        object.__setattr__(self, "codecs", names[:1] if len(set(names)) == 1 else names)
        if self.header_bytes > MAX_HEADER_BYTES:
            raise ValueError(
                f"num_layers, block_size: expected at most {MAX_HEADER_BYTES} header bytes,"
                f" got {self.header_bytes}"
            )
        if self.max_record_bytes > MAX_RECORD_BYTES:
            raise ValueError(
                f"layout: expected records of at most {MAX_RECORD_BYTES} bytes,"
                f" got {self.max_record_bytes}"
            )

    @cached_property
    def block_format(self) -> BlockFormat:
        """Where the parts of the payload lie."""
        layout = KVLayout(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            self.block_size,
            DTYPES[self.dtype],
            self.latent_dim,
        )
        return BlockFormat(layout, self.codecs[0] if len(self.codecs) == 1 else self.codecs)

    @cached_property
    def raw(self) -> RecordLayout:
        """The same block written as it is."""
        return self if self.is_raw else replace(self, codecs=("raw",))

    @property
    def is_raw(self) -> bool:
        """Whether all layers are written as they are."""
        return self.codecs == ("raw",)

    @property
    def block_bytes(self) -> int:
        """Bytes of the block as it lies in the pool."""
        return self.block_format.layout.block_bytes

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of all layers as they are written."""
        return self.block_format.payload_bytes

    @cached_property
    def table_end(self) -> int:
        """Bytes before the list of codecs, or the padding where one codec serves all layers."""
        return FIXED_BYTES + 4 * self.block_size + TABLE_ENTRY_BYTES * self.num_layers

    @cached_property
    def header_bytes(self) -> int:
        """Bytes before the payload: header, token ids, layer table, codecs and padding."""
        num_listed = self.num_layers if len(self.codecs) > 1 else 0
        return -(-(self.table_end + num_listed) // ALIGNMENT) * ALIGNMENT

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of the whole record."""
        return self.header_bytes + self.payload_bytes

    @property
    def encode_bytes(self) -> int:
        """Bytes that writing a record takes: it may turn out to be a raw one."""
        return self.header_bytes + max(self.payload_bytes, self.raw.payload_bytes)

    @cached_property
    def max_record_bytes(self) -> int:
        """Bytes that reading a record takes: the longest that `accepts` accepts."""
        names = {*LOSSLESS, *self.codecs} if self._fits("l12") else {"raw", *self.codecs}
        formats = [BlockFormat(self.block_format.layout, name) for name in names]
        longest = max(one.layers[0].num_bytes for one in formats)
        listed = -(-(self.table_end + self.num_layers) // ALIGNMENT) * ALIGNMENT
        return listed + self.num_layers * longest

    def accepts(self, found: RecordLayout) -> bool:
        """Whether a record of another layout does for this one: it loses nothing, or no more."""
        return found.raw == self.raw and all(
            name == own or name in LOSSLESS
            for name, own in zip(found.block_format.codecs, self.block_format.codecs, strict=True)
        )

    @cached_property
    def lossless(self) -> RecordLayout:
        """The layout whose blocks come back bit for bit, and as small as that can be."""
        if LOSSLESS.issuperset(self.codecs):
            return self
        return replace(self, codecs=("l12",)) if self._fits("l12") else self.raw

    def _fits(self, codec: str) -> bool:
        try:
            BlockFormat(self.block_format.layout, codec)
        except ValueError:
            return False
        return True

    @cached_property
    def layer_places(self) -> np.ndarray:
        """``[num_layers, 2]``, u32: where each layer starts in the record, and its bytes."""
        layers = self.block_format.layers
        places = [(self.header_bytes + layer.offset, layer.num_bytes) for layer in layers]
        return np.array(places, dtype="<u4")
