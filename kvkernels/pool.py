"""The block pool: one tensor that holds every cached key and value of a layer group."""

from __future__ import annotations

import torch

from kvkernels import native
from kvkernels.checks import check_dtype, check_shape
from kvkernels.layout import KVLayout


class KVPool:
    """Blocks of KV on one device, block-major, so that a block is one contiguous span.

    ::

        data [num_blocks, num_layers, num_planes, num_kv_heads, block_size, head_dim]
              block 0 | layer 0 | K | head 0 | slot 0 .. block_size - 1
                                    | head 1 | ...
                                | V | ...
                      | layer 1 | ...
              block 1 | ...

    With `layout.latent_dim` there is one row instead of K and V: of a token's key of `head_dim`
    channels the first `latent_dim` are its value.

    One span per block means one descriptor per transfer; heads before tokens means a head's tile
    is contiguous for the kernels.

    Args:
        layout: Shape and dtype of a block.
        num_blocks: Blocks to hold.
        device: Where; default the CPU.

    Raises:
        ValueError: If `num_blocks` is not positive.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, device: torch.device | str = "cpu"
    ) -> None:
        if not isinstance(num_blocks, int) or num_blocks < 1:
            raise ValueError(f"num_blocks: expected a positive integer, got {num_blocks!r}")
        self.layout = layout
        self.num_blocks = num_blocks
        self.data = native.empty_pool(
            (num_blocks, *layout.block_shape), dtype=layout.dtype, device=device
        )

    @classmethod
    def over(cls, layout: KVLayout, data: torch.Tensor) -> KVPool:
        """A pool of blocks that lie in someone else's memory, which it keeps alive.

        Args:
            layout: Shape and dtype of a block.
            data: ``[num_blocks, *layout.block_shape]``, contiguous, of `layout.dtype`.

        Raises:
            ValueError: If the shape or dtype is another, or `data` is not contiguous.
        """
        check_shape("data", data, (None, *layout.block_shape))
        check_dtype("data", data, layout.dtype)
        if not data.is_contiguous():
            raise ValueError(f"data: expected a contiguous tensor, got strides {data.stride()}")
        pool = cls.__new__(cls)
        pool.layout, pool.num_blocks, pool.data = layout, len(data), data
        return pool

    @property
    def device(self) -> torch.device:
        """Where the blocks lie."""
        return self.data.device

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all blocks, used or not."""
        return self.num_blocks * self.layout.block_bytes

    def key_cache(self, layer: int) -> torch.Tensor:
        """View of one layer's keys, `[num_blocks, num_kv_heads, block_size, head_dim]`."""
        return self.data[:, self._checked(layer), 0]

    def value_cache(self, layer: int) -> torch.Tensor:
        """View of one layer's values, like `key_cache`; of latents `latent_dim` wide."""
        return self.data[:, self._checked(layer), -1, ..., : self.layout.latent_dim]

    def block_data(self, block_id: int) -> torch.Tensor:
        """View of one block's bytes, `[block_bytes]`, uint8."""
        if not 0 <= block_id < self.num_blocks:
            raise ValueError(f"block_id: expected 0 to {self.num_blocks - 1}, got {block_id}")
        return self.data[block_id].reshape(-1).view(torch.uint8)

    def _checked(self, layer: int) -> int:
        if not 0 <= layer < self.layout.num_layers:
            raise ValueError(f"layer: expected 0 to {self.layout.num_layers - 1}, got {layer}")
        return layer
