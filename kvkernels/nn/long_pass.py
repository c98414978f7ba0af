"""A forward pass over more tokens than a sliding group's pool is to take."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvkernels.nn.block_tables import BlockTables
from kvkernels.nn.module import PagedBatch
from kvkernels.nn.paged_kv import PagedKV
from kvkernels.ops import store_kv
from kvkernels.pool import KVPool


class LongPass:
    """Where one layer after another of a sliding group keeps all keys and values of a pass.

    Attention needs those of the whole pass, and of the window before it; but one layer at a time,
    and of what it leaves behind later tokens see the last window only::

        block       0  1  2  3  4  5  6  7  8      window of two blocks, three tokens in block 3
        pool        .  .  x  x  .  .  x  x  x      before the pass; after it the last three
        staging     .  .  x  x  x  x  x  x  x      copied from the pool, and new

    So a prompt of any length takes two windows of the pool, and one layer's keys and values.

    Args:
        tables: Of the group, grown for the pass.
        batch: Of the pass over the pool.
        num_tokens: Of each sequence before the pass.
        num_new: Of each sequence in it, more than one.
    """

    def __init__(
        self, tables: BlockTables, batch: PagedBatch, num_tokens: int, num_new: int
    ) -> None:
        group, size = tables.group, tables.block_size
        num_seqs, num_blocks = len(tables.ids), tables.num_blocks
        first = tables.first_seen(num_tokens)
        before = -(-num_tokens // size)  # blocks with tokens from before the pass
        device = group.pool.device
        self._group = group
        self._pool = KVPool(
            replace(group.pool.layout, num_layers=1), num_seqs * (num_blocks - first), device
        )
        table = torch.full((num_seqs, num_blocks), -1, dtype=torch.int32, device=device)
        staged = torch.arange(self._pool.num_blocks, dtype=torch.int32, device=device)
        table[:, first:] = staged.view(num_seqs, -1)
        self._copied_from = tables.table[:, first:before].flatten().long()
        self._copied_to = table[:, first:before].flatten().long()
        positions = torch.arange(num_tokens, num_tokens + num_new, device=device)
        slots = table[:, positions // size].long() * size + positions % size
        self._batch = replace(batch, block_table=table, slot_mapping=slots.flatten())

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> PagedKV:
        """What attention reads in a layer; good until the next one is stored.

        Args:
            layer: Its number in the group.
            key: New keys, ``[num_tokens, num_kv_heads, head_dim]``.
            value: New values, like `key`.
        """
        self._pool.data[self._copied_to, 0] = self._group.pool.data[self._copied_from, layer]
        key_cache, value_cache = self._pool.key_cache(0), self._pool.value_cache(0)
        store_kv(key, value, key_cache, value_cache, self._batch.slot_mapping)
        return PagedKV(key_cache, value_cache, self._batch, self._group.window)
