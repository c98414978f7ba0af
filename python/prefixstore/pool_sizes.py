"""How many blocks the pool of each layer group holds.

A sequence holds all its tokens in a group of full attention, and one window of them in a sliding
one. So do cached prefixes, at each place where prompts end: a sliding group's pool need not grow
with the context::

    Gemma 3 270M, pool_tokens = 32768, blocks of 64
    full group (3 layers)       512 blocks
    sliding group (15 layers)   152 blocks: 16 windows of 512 tokens, 16 blocks, and a chunk of 512
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch

from kvkernels.nn import LayerGroupSpec
from prefixstore.config import CacheConfig, physical_memory_bytes
from prefixstore.errors import ConfigError
from prefixstore.residency import num_window_blocks

_SHARE = 8  # a sliding group holds one token for each 8 of the full groups,
_NUM_WINDOWS = 16  # but at least this many windows: of running and of cached sequences,
_CHUNK_TOKENS = 512  # and the tokens of one chunk


def pool_sizes(
    config: CacheConfig,
    model_config: Any,
    specs: Sequence[LayerGroupSpec],
    device: torch.device,
) -> list[int]:
    """Blocks of each group's pool.

    Args:
        config: What was chosen.
        model_config: Of a Hugging Face model.
        specs: Of its layer groups.
        device: Where the pools are to lie: its memory bounds them.

    Raises:
        ConfigError: If the model's configuration names no context to choose a size by, the memory
            is too small for one block, or a sliding group would have too few for one sequence.
    """
    windows = [spec.window for spec in specs]
    if config.pool_tokens is not None:
        return _sizes(config, windows, -(-config.pool_tokens // config.block_size))
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        raise ConfigError(
            "pool_tokens: expected a number, for the model's configuration names no"
            " max_position_embeddings to choose one by; got None"
        )
    wanted = max(1, 4 * context // config.block_size)

    def total_bytes(num_blocks: int) -> int:
        sizes = _sizes(config, windows, num_blocks)
        return sum(n * spec.layout.block_bytes for n, spec in zip(sizes, specs, strict=True))

    # `total_bytes` rises with the number of blocks, so bisection finds the most that memory
    # affords.
    memory_bytes = _memory_bytes(device)
    budget = memory_bytes // 4
    affordable = bisect_right(range(1, wanted + 1), budget, key=total_bytes)
    if affordable == 0:
        raise ConfigError(
            f"pool_tokens: expected room for one block of {total_bytes(1)} bytes in a quarter"
            f" of the memory, got {memory_bytes} bytes of memory"
        )
    return _sizes(config, windows, affordable)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return physical_memory_bytes()


def least_window_blocks(block_size: int, window: int, chunk_tokens: int = 0) -> int:
    """Blocks of a sliding group that one sequence may hold at the same time.

    The window before what is computed, the window that it ends in or that is loaded meanwhile,
    with each a block of which a part is used; and the chunk.
    """
    return 2 * (num_window_blocks(block_size, window) + 1) + -(-chunk_tokens // block_size)


def _sizes(config: CacheConfig, windows: Sequence[int | None], num_blocks: int) -> list[int]:
    return [
        num_blocks if window is None else _window_pool_blocks(config, window, num_blocks)
        for window in windows
    ]


def _window_pool_blocks(config: CacheConfig, window: int, num_blocks: int) -> int:
    size = config.block_size
    if config.window_pool_tokens is None:
        own = _NUM_WINDOWS * (num_window_blocks(size, window) + 1) + -(-_CHUNK_TOKENS // size)
        return min(num_blocks, max(own, num_blocks // _SHARE))
    chosen = min(num_blocks, -(-config.window_pool_tokens // size))
    least = min(num_blocks, least_window_blocks(size, window))
    if chosen < least:
        raise ConfigError(
            f"window_pool_tokens: expected at least {least * size} (two windows of {window} tokens"
            f" and two blocks), got {config.window_pool_tokens}"
        )
    return chosen
