"""A model's KV as a codec gives it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvkernels import BlockFormat, KVLayout, KVPool, decode_blocks, encode_blocks

BLOCK_SIZE = 64

Stored = BlockFormat | torch.dtype
"""How KV is kept: as a codec writes it, or as numbers of a dtype."""


@dataclass(frozen=True)
class Prefix:
    """What a model computed for the first tokens of a text.

    Attributes:
        pool: Its KV, block after block.
        num_tokens: A whole number of blocks.
    """

    pool: KVPool
    num_tokens: int


@torch.inference_mode()
def compute_prefix(model: Any, tokens: torch.Tensor) -> Prefix:
    """Run the model over `[num_tokens]`, a whole number of blocks, and keep its KV."""
    num_tokens = len(tokens)
    if num_tokens == 0 or num_tokens % BLOCK_SIZE:
        raise ValueError(f"tokens: expected a multiple of {BLOCK_SIZE}, got {num_tokens}")
    cache = new_cache()
    model(input_ids=tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    num_heads, _, head_dim = layers[0].shape[1:]
    layout = KVLayout(len(layers), num_heads, head_dim, BLOCK_SIZE, layers[0].dtype)
    pool = KVPool(layout, num_tokens // BLOCK_SIZE)
    for index, layer in enumerate(layers):  # [2, num_heads, num_tokens, head_dim]
        blocks = layer.unflatten(2, (pool.num_blocks, BLOCK_SIZE))
        pool.data[:, index] = blocks.permute(2, 0, 1, 3, 4)
    return Prefix(pool, num_tokens)


def new_cache() -> Any:
    """An empty cache that keeps every token of every layer, also of sliding windows."""
    from transformers import DynamicCache

    return DynamicCache()


@torch.inference_mode()
def restore(prefix: Prefix, stored: Stored | None) -> tuple[Any, int]:
    """A cache of the prefix that was stored and read again, or of the prefix as it is.

    Also how many of its blocks the codec did not hold, and were written raw.
    """
    data, num_raw = prefix.pool.data, 0
    if isinstance(stored, torch.dtype):
        data = data.to(stored).to(data.dtype)
    elif stored is not None:
        target = KVPool(prefix.pool.layout, prefix.pool.num_blocks)
        ids = torch.arange(prefix.pool.num_blocks)
        encoded = encode_blocks(prefix.pool, ids, stored)
        if not decode_blocks(encoded, target, ids).all():
            raise RuntimeError("expected blocks with the sums just written, got others")
        data, num_raw = target.data, int(encoded.is_raw.sum())
    cache = new_cache()
    for layer in range(prefix.pool.layout.num_layers):
        keys, values = data[:, layer].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None]
        cache.update(keys.contiguous(), values.contiguous(), layer)
    return cache, num_raw
