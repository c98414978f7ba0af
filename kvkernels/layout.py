"""What one block of KV looks like: its shape, dtype and size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvkernels.checks import FLOAT_DTYPES

DEFAULT_BLOCK_SIZE = 64
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class KVLayout:
    """Shape and dtype of a block: `block_size` tokens of all layers of one layer group.

    Attributes:
        num_layers: Layers in the group.
        num_kv_heads: Key-value heads of a layer.
        head_dim: Width of one head, in elements.
        block_size: Tokens in a block; one of 16, 32, 64, 128, 256.
        dtype: float32, float16 or bfloat16.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int = DEFAULT_BLOCK_SIZE
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size: expected one of {BLOCK_SIZES}, got {self.block_size!r}")
        if self.dtype not in FLOAT_DTYPES:
            wanted = " or ".join(str(dtype) for dtype in FLOAT_DTYPES)
            raise ValueError(f"dtype: expected {wanted}, got {self.dtype}")

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        num_layers: int | None = None,
        block_size: int = DEFAULT_BLOCK_SIZE,
        dtype: torch.dtype | None = None,
    ) -> KVLayout:
        """The layout of a Hugging Face model's KV.

        Args:
            config: A `transformers` text configuration (its attributes are read by name).
            num_layers: Layers in the group; default all of the model's.
            block_size: Tokens in a block.
            dtype: Default the configuration's own dtype.

        Raises:
            ValueError: If the configuration lacks a needed attribute or a value is out of range.
        """
        for name in ("num_hidden_layers", "num_attention_heads"):
            if getattr(config, name, None) is None:
                raise ValueError(f"config: expected an attribute {name}, got {type(config)}")
        num_heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        own_dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        return cls(
            num_layers=num_layers if num_layers is not None else config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype or own_dtype or torch.float32,
        )

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """`[num_layers, 2, num_kv_heads, block_size, head_dim]`."""
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one block, keys and values."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.num_layers * self.layer_bytes
