"""Attention over a block pool as a plain `torch.nn.Module`, for models of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvkernels.nn.batch_invariance import is_batch_invariant
from kvkernels.ops import paged_attention, store_kv


@dataclass(frozen=True)
class PagedBatch:
    """Where the tokens of one forward pass lie in the pool; shared by all layers of a group.

    Attributes:
        block_table: ``[num_seqs, max_blocks_per_seq]``, int32: a sequence's block ids in order.
        seq_lens: ``[num_seqs]``, int32: tokens in each sequence, cached and new.
        cu_seqlens_q: ``[num_seqs + 1]``, int32: running sum of the numbers of new tokens; None
            stands for one new token in each sequence.
        slot_mapping: ``[num_tokens]``, int64: slot of each new token, the sequences one after
            another.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    slot_mapping: torch.Tensor

    @classmethod
    def build(
        cls,
        block_tables: Sequence[Sequence[int]],
        seq_lens: Sequence[int],
        query_lens: Sequence[int],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> PagedBatch:
        """The batch whose sequences each end in some new tokens.

        Args:
            block_tables: Each sequence's block ids in order; enough for its length.
            seq_lens: Tokens in each sequence, cached and new.
            query_lens: New tokens in each sequence: its last ones.
            block_size: Tokens in a block.
            device: Where the tensors are to lie.

        Raises:
            ValueError: If `block_size` is not positive, the numbers of sequences differ, a sequence
                has more new tokens than tokens, or a block table is too short or names no block
                for a new token.
        """
        if block_size < 1:
            raise ValueError(f"block_size: expected a positive integer, got {block_size}")
        num_seqs = len(block_tables)
        for name, lengths in (("seq_lens", seq_lens), ("query_lens", query_lens)):
            if len(lengths) != num_seqs:
                raise ValueError(
                    f"{name}: expected {num_seqs} (one a sequence), got {len(lengths)}"
                )
        slots: list[int] = []
        bounds = [0]
        width = max((len(table) for table in block_tables), default=0)
        for table, seq_len, query_len in zip(block_tables, seq_lens, query_lens, strict=True):
            if not 0 <= query_len <= seq_len:
                raise ValueError(f"query_lens: expected 0 to seq_len {seq_len}, got {query_len}")
            if len(table) * block_size < seq_len:
                raise ValueError(
                    f"block_tables: expected {-(-seq_len // block_size)} blocks for {seq_len}"
                    f" tokens, got {len(table)}"
                )
            new_blocks = table[(seq_len - query_len) // block_size : -(-seq_len // block_size)]
            if query_len and min(new_blocks) < 0:
                raise ValueError(
                    f"block_tables: expected block ids of 0 or more for new tokens, got"
                    f" {min(new_blocks)}"
                )
            slots.extend(
                table[position // block_size] * block_size + position % block_size
                for position in range(seq_len - query_len, seq_len)
            )
            bounds.append(bounds[-1] + query_len)
        padded = [[*table, *[-1] * (width - len(table))] for table in block_tables]
        is_decode = all(query_len == 1 for query_len in query_lens)
        return cls(
            block_table=torch.tensor(padded, dtype=torch.int32, device=device).view(
                num_seqs, width
            ),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            cu_seqlens_q=(
                None if is_decode else torch.tensor(bounds, dtype=torch.int32, device=device)
            ),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        )


class PagedAttention(torch.nn.Module):
    """Causal self-attention over a block pool: stores the new tokens' KV, then attends.

    It has no weights: projections and position embeddings belong to the model. Invariant of the
    batch where its model is (`kvkernels.nn.batch_invariance`).

    Args:
        num_heads: Query heads; a multiple of `num_kv_heads`.
        num_kv_heads: Key-value heads.
        head_dim: Width of one head.
        sm_scale: Multiplies scores before softmax; default `head_dim ** -0.5`.
        window: A token sees itself and the `window - 1` tokens before it; None for all.
        soft_cap: Bounds scaled scores: ``soft_cap * tanh(score / soft_cap)``; None for none.

    Raises:
        ValueError: If a size is not positive or the heads do not divide.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        sm_scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        if num_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads: expected a multiple of num_kv_heads {num_kv_heads}, got {num_heads}"
            )
        if window is not None and window < 1:
            raise ValueError(f"window: expected 1 or more, or None for no window, got {window}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.sm_scale = sm_scale
        self.window = window
        self.soft_cap = soft_cap

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention output of the new tokens.

        Args:
            query: ``[num_tokens, num_heads, head_dim]``, the sequences one after another.
            key: ``[num_tokens, num_kv_heads, head_dim]``; stored into ``key_cache``.
            value: Like ``key``; stored into ``value_cache``.
            key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``, written in place.
            value_cache: Like ``key_cache``.
            batch: Where the tokens lie.
            sinks: ``[num_heads]``, float32: logits of attention sinks, a parameter of the model's.

        Returns:
            ``[num_tokens, num_heads, head_dim]``, dtype of ``query``.

        Raises:
            ValueError: If shapes, dtypes, devices or strides disagree, or a tensor requires grad.
        """
        store_kv(key, value, key_cache, value_cache, batch.slot_mapping)
        out = paged_attention(
            query,
            key_cache,
            value_cache,
            batch.block_table,
            batch.seq_lens,
            batch.cu_seqlens_q,
            sm_scale=self.sm_scale,
            window=self.window,
            soft_cap=self.soft_cap,
            sinks=sinks,
            batch_invariant=is_batch_invariant(self),
        )
        assert isinstance(out, torch.Tensor)  # a pair only where the log-sum-exp was asked for
        return out

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads},"
            f" head_dim={self.head_dim}, window={self.window}"
        )
