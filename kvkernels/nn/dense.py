"""Dense keys and values seen as a block pool, for models that run without a `PagedCache`."""

from __future__ import annotations

import torch

# key_cache, value_cache, block_table
DensePool = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def as_pool(key: torch.Tensor, value: torch.Tensor, first_key: int = 0) -> DensePool:
    """The pool that attention reads fastest, or reads by position.

    Args:
        key: ``[batch, num_kv_heads, num_keys, head_dim]``, last stride 1.
        value: Like ``key``.
        first_key: Position of the first key in its sequence; no block holds those before it.
    """
    if first_key:
        key_cache, value_cache, block_table = tokens_as_blocks(key, value)
        return (
            key_cache,
            value_cache,
            torch.nn.functional.pad(block_table, (first_key, 0), value=-1),
        )
    return tokens_as_blocks(key, value) if key.is_cuda else sequences_as_blocks(key, value)


def sequences_as_blocks(key: torch.Tensor, value: torch.Tensor) -> DensePool:
    """A pool in which each sequence is one block; nothing is copied.

    Args:
        key: ``[batch, num_kv_heads, num_keys, head_dim]``, last stride 1.
        value: Like ``key``.
    """
    batch_size = key.shape[0]
    block_table = torch.arange(batch_size, dtype=torch.int32, device=key.device)[:, None]
    return key, value, block_table


def tokens_as_blocks(key: torch.Tensor, value: torch.Tensor) -> DensePool:
    """A pool in which each token is one block; copies only what is not contiguous.

    For the Triton kernels: they are compiled for a block size, so that must not follow the
    sequence, which grows with every token.

    Args:
        key: ``[batch, num_kv_heads, num_keys, head_dim]``.
        value: Like ``key``.
    """
    batch_size, num_kv_heads, num_keys, head_dim = key.shape
    # Blocks of one token that overlap: the id is the row, of `head_dim` numbers, where the token's
    # first head lies, and the stride from head to head is `num_keys` rows. Ids that would mix two
    # sequences' heads appear in no table.
    per_sequence = num_kv_heads * num_keys
    shape = ((batch_size - 1) * per_sequence + num_keys, num_kv_heads, 1, head_dim)
    strides = (head_dim, num_keys * head_dim, head_dim, 1)
    starts = torch.arange(batch_size, dtype=torch.int32, device=key.device) * per_sequence
    tokens = torch.arange(num_keys, dtype=torch.int32, device=key.device)
    return (
        key.contiguous().as_strided(shape, strides),
        value.contiguous().as_strided(shape, strides),
        starts[:, None] + tokens,
    )
