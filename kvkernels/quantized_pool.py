"""A pool of quantised blocks."""

from __future__ import annotations

import math

import torch

from kvkernels import native
from kvkernels.layout import KVLayout
from kvkernels.quantized_cache import MAX_BLOCKS_OF_A_KIND, QuantizedCache

_NUM_BITS = {"int8": 8, "int4": 4}
_LAYER_ALIGNMENT = 64
# Of int4: how many tokens of one key channel, or channels of one token's value, share a scale.
_INT4_GROUP = 32


class QuantizedPool:
    """Blocks of one kind on one device, block-major like `KVPool`.

    ::

        data [num_blocks, num_layers, layer_bytes], uint8
              block 0 | layer 0 | key codes | key scales | value codes | value scales | padding
                      | layer 1 | ...

    With blocks of 64 tokens and heads of 128, int8 takes 8.4 bits an element and int4 5 bits.

    Args:
        layout: Shape of a block, as it is before it is quantised.
        kind: "int8" or "int4".
        num_blocks: Blocks to hold.
        device: Where; default the CPU.

    Raises:
        ValueError: If an argument is out of range, the layout is of latents, or int4 is asked for
            an odd head_dim.
    """

    def __init__(
        self,
        layout: KVLayout,
        kind: str,
        num_blocks: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if kind not in _NUM_BITS:
            raise ValueError(f"kind: expected one of {tuple(_NUM_BITS)}, got {kind!r}")
        if not isinstance(num_blocks, int) or not 1 <= num_blocks <= MAX_BLOCKS_OF_A_KIND:
            raise ValueError(
                f"num_blocks: expected 1 to {MAX_BLOCKS_OF_A_KIND}, got {num_blocks!r}"
            )
        if layout.latent_dim is not None:
            raise ValueError(f"layout: expected keys and values, got latents: {layout}")
        if kind == "int4" and layout.head_dim % 2:
            raise ValueError(f"layout: expected an even head_dim for int4, got {layout.head_dim}")
        self.layout = layout
        self.kind = kind
        self.num_blocks = num_blocks
        self.num_bits = _NUM_BITS[kind]
        heads, size, width = layout.num_kv_heads, layout.block_size, layout.head_dim
        token_group = size if kind == "int8" else math.gcd(size, _INT4_GROUP)
        channel_group = width if kind == "int8" else math.gcd(width, _INT4_GROUP)
        code_bytes = width * self.num_bits // 8
        self._shapes = (
            (heads, size, code_bytes),
            (heads, size // token_group, width, 2),
            (heads, size, code_bytes),
            (heads, size, width // channel_group, 2),
        )
        self._sizes = [
            math.prod(shape) * (1 if len(shape) == 3 else torch.float16.itemsize)
            for shape in self._shapes
        ]
        self.layer_bytes = -(-sum(self._sizes) // _LAYER_ALIGNMENT) * _LAYER_ALIGNMENT
        self.data = native.empty_pool(
            (num_blocks, layout.num_layers, self.layer_bytes), dtype=torch.uint8, device=device
        )

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all blocks, used or not."""
        return self.data.numel()

    def cache(self, layer: int) -> QuantizedCache:
        """Views of one layer's blocks."""
        if not 0 <= layer < self.layout.num_layers:
            raise ValueError(f"layer: expected 0 to {self.layout.num_layers - 1}, got {layer}")
        parts = []
        first = 0
        for shape, size in zip(self._shapes, self._sizes, strict=True):
            part = self.data[:, layer, first : first + size]
            part = part if len(shape) == 3 else part.view(torch.float16)
            parts.append(part.unflatten(1, shape))
            first += size
        return QuantizedCache(*parts)
