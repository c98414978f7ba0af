"""Quantises blocks of one pool into another."""

from __future__ import annotations

import torch

from kvkernels.pool import KVPool
from kvkernels.quantized_pool import QuantizedPool
from kvkernels.reference.quantize import LARGEST, quantize_keys, quantize_values


def quantize_blocks(
    pool: KVPool, block_ids: torch.Tensor, target: QuantizedPool, target_ids: torch.Tensor
) -> None:
    """Write quantised copies of full blocks of `pool` into blocks of `target`.

    Args:
        pool: Holds the blocks; its layout is that of `target`, up to the dtype.
        block_ids: ``[num_blocks]``, int64, which blocks of `pool`. Every slot must hold numbers,
            not NaN or infinity, of magnitudes up to 65408: float16 then holds what is restored.
        target: Gets the copies, in all layers.
        target_ids: ``[num_blocks]``, int64, distinct: where in `target` they go.

    Raises:
        ValueError: If the layouts or the ids disagree, or an element is not finite or too large;
            nothing is written then.
    """
    shapes = (pool.layout.block_shape, target.layout.block_shape)
    if shapes[0] != shapes[1]:
        raise ValueError(f"target: expected blocks of shape {shapes[0]}, got {shapes[1]}")
    for name, ids, num_blocks in (
        ("block_ids", block_ids, pool.num_blocks),
        ("target_ids", target_ids, target.num_blocks),
    ):
        if ids.dtype != torch.int64 or ids.shape != block_ids.shape or ids.dim() != 1:
            raise ValueError(
                f"{name}: expected int64 ids of shape {list(block_ids.shape)[:1]}, got"
                f" {ids.dtype} of shape {list(ids.shape)}"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_blocks:
            raise ValueError(
                f"{name}: expected 0 to {num_blocks - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
    if target_ids.unique().numel() != target_ids.numel():
        raise ValueError("target_ids: expected distinct ids, got one twice")
    blocks = pool.data[block_ids]
    largest = blocks.abs().amax().item() if blocks.numel() else 0.0
    if not largest <= LARGEST:
        raise ValueError(
            f"block_ids: expected elements that float16 holds, of magnitudes up to {LARGEST:.0f},"
            f" got {largest}"
        )
    for layer in range(pool.layout.num_layers):
        cache = target.cache(layer)
        keys, values = blocks[:, layer].unbind(1)
        parts = (
            *quantize_keys(keys, target.num_bits, cache.key_scales.shape[2]),
            *quantize_values(values, target.num_bits, cache.value_scales.shape[3]),
        )
        for whole, part in zip(cache, parts, strict=True):
            whole[target_ids] = part
