"""Pool blocks as host buffers: in place on the CPU, by way of a copy on any other device."""

import numpy as np
import torch

from kvkernels import KVPool


def block_buffer(pool: KVPool, block_id: int, *, read: bool = False) -> np.ndarray:
    """A host buffer of one block, `[block_bytes]` uint8.

    On the CPU it is the block itself. Elsewhere it is a buffer of its own: with `read` filled
    from the block, without it to be filled and then handed to `fill_block`.
    """
    block = pool.block_data(block_id)
    if pool.device.type == "cpu":
        return block.numpy()
    if read:
        return block.cpu().numpy()
    return np.empty(pool.layout.block_bytes, dtype=np.uint8)


def fill_block(pool: KVPool, block_id: int, buffer: np.ndarray) -> None:
    """Copy a buffer from `block_buffer` into its block, unless it is the block itself."""
    if pool.device.type != "cpu":
        pool.block_data(block_id).copy_(torch.from_numpy(buffer))
