"""A model's KV as a codec gives it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Restored:
    """A prefix as each of several formats gives it back.

    Attributes:
        data: Distinct contents of the prefix's pool; the first is the prefix as it is.
        rows: Which of `data` each format gave, by the format's name.
        num_raw: Blocks that the codec did not hold, and were written raw, by the format's name.
    """

    data: list[torch.Tensor]
    rows: dict[str, int]
    num_raw: dict[str, int]


@torch.inference_mode()
def restore(prefix: Prefix, formats: Mapping[str, Stored | None]) -> Restored:
    """Store a prefix in every format, and read it again; None leaves it as it is."""
    restored = Restored([prefix.pool.data], {}, {})
    for name, stored in formats.items():
        data, restored.num_raw[name] = _store_and_read(prefix.pool, stored)
        same = (i for i, other in enumerate(restored.data) if _are_same_bits(data, other))
        row = next(same, len(restored.data))
        if row == len(restored.data):
            restored.data.append(data)
        restored.rows[name] = row
    return restored


def _store_and_read(pool: KVPool, stored: Stored | None) -> tuple[torch.Tensor, int]:
    """What comes back, and how many blocks were written raw."""
    if stored is None:
        return pool.data, 0
    if isinstance(stored, torch.dtype):
        return pool.data.to(stored).to(pool.data.dtype), 0
    target = KVPool(pool.layout, pool.num_blocks)
    ids = torch.arange(pool.num_blocks)
    encoded = encode_blocks(pool, ids, stored)
    if not decode_blocks(encoded, target, ids).all():
        raise RuntimeError("expected blocks with the sums just written, got others")
    return target.data, int(encoded.is_raw.sum())


def _are_same_bits(data: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(data.view(torch.uint8), other.view(torch.uint8))


def fill_cache(contents: Sequence[torch.Tensor]) -> Any:
    """A cache with a row for each of a prefix's contents."""
    cache = new_cache()
    for layer in range(contents[0].shape[1]):
        # of each [num_blocks, 2, num_heads, BLOCK_SIZE, head_dim]
        sides = [data[:, layer].permute(1, 2, 0, 3, 4).flatten(2, 3) for data in contents]
        keys, values = torch.stack(sides, dim=1)
        cache.update(keys, values, layer)
    return cache
