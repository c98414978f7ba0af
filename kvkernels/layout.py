"""What one block of KV looks like: its shape, dtype and size."""

from __future__ import annotations

import math
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
        latent_dim: None where keys and values lie apart. With multi-head latent attention a token
            has one row of `head_dim` channels instead: these first ones, its latent, are a key and
            a value at once, and the others a key's rotary part.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int = DEFAULT_BLOCK_SIZE
    dtype: torch.dtype = torch.bfloat16
    latent_dim: int | None = None

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
        latent = self.latent_dim
        if latent is not None and (not isinstance(latent, int) or not 1 <= latent <= self.head_dim):
            raise ValueError(f"latent_dim: expected 1 to {self.head_dim}, got {latent!r}")

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        num_layers: int | None = None,
        block_size: int = DEFAULT_BLOCK_SIZE,
        dtype: torch.dtype | None = None,
    ) -> KVLayout:
        """The layout of a Hugging Face model's KV; of latents where it has a `kv_lora_rank`.

        Args:
            config: A `transformers` text configuration (its attributes are read by name).
            num_layers: Layers in the group; default all of the model's.
            block_size: Tokens in a block.
            dtype: Default the configuration's own dtype.

        Raises:
            ValueError: If the configuration lacks a needed attribute or a value is out of range.
        """
        latent_dim = getattr(config, "kv_lora_rank", None)
        needed = ["num_hidden_layers", "num_attention_heads"]
        needed += [] if latent_dim is None else ["qk_rope_head_dim"]
        for name in needed:
            if getattr(config, name, None) is None:
                raise ValueError(f"config: expected an attribute {name}, got {type(config)}")
        num_heads = config.num_attention_heads
        num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        if latent_dim is not None:
            num_kv_heads, head_dim = 1, latent_dim + config.qk_rope_head_dim
        # Asking for the older name where there is the newer one logs a warning.
        own_dtype = getattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", None)
        return cls(
            num_layers=num_layers if num_layers is not None else config.num_hidden_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype or own_dtype or torch.float32,
            latent_dim=latent_dim,
        )

    @property
    def num_planes(self) -> int:
        """Rows that a token has in a layer: 2, a key and a value, or 1 that is both."""
        return 2 if self.latent_dim is None else 1

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """`[num_layers, num_planes, num_kv_heads, block_size, head_dim]`."""
        rows = (self.num_planes, self.num_kv_heads, self.block_size)
        return (self.num_layers, *rows, self.head_dim)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one block, keys and values."""
        return math.prod(self.block_shape[1:]) * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.num_layers * self.layer_bytes
