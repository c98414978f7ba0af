"""How much of a prompt can be had: a pure function of which blocks are available.

A model may have several layer groups. A full-attention group needs every block of a prefix; a
sliding-window group needs only those the next token can still see::

    block            0    1    2    3    4    5
    full group       x    x    x    x    x    .
    sliding group    .    .    x    x    .    .      window of two blocks
    usable prefix    4 blocks: full has 0..3, sliding has the last two of them
"""

from collections.abc import Sequence

import numpy as np


def first_block_needed(num_blocks: int, block_size: int, window: int | None) -> int:
    """First block that the token after `num_blocks` whole blocks can see.

    A query at position p sees the keys after `p - window`.
    """
    if window is None:
        return 0
    return max(0, num_blocks * block_size - window + 1) // block_size


def num_window_blocks(block_size: int, window: int) -> int:
    """Blocks before the end of a block that the next token can see."""
    return -(-(window - 1) // block_size)


def longest_prefix(
    available: Sequence[np.ndarray], block_size: int, windows: Sequence[int | None]
) -> int:
    """Blocks of the longest prefix for which every group has the blocks it needs.

    Args:
        available: Per group, `[num_blocks]` bool: whether that block is to be had.
        block_size: Tokens in a block.
        windows: Per group, its sliding window in tokens, or None for full attention.
    """
    # missing[g][i]: how many of the first i blocks group g lacks; a range is complete when the
    # counts at its two ends agree.
    missing = [np.concatenate(([0], np.cumsum(~group))) for group in available]
    for num_blocks in range(len(available[0]), 0, -1):
        if all(
            counts[num_blocks] == counts[first_block_needed(num_blocks, block_size, window)]
            for counts, window in zip(missing, windows, strict=True)
        ):
            return num_blocks
    return 0
