"""Meaning of paged attention and of merging two partial attentions."""

import torch

from kvkernels.quantized_cache import KIND_SHIFT, KINDS, QuantizedCache
from kvkernels.reference.quantize import dequantize_keys, dequantize_values
from kvkernels.scoring import Scoring


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    scoring: Scoring,
    return_lse: bool,
    int8_cache: QuantizedCache | None = None,
    int4_cache: QuantizedCache | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a block-table cache; see `kvkernels.paged_attention`.

    Works in the dtype of `query`, float64 included, so that one function gives both the exact
    meaning and what plain PyTorch makes of it in low precision. Always invariant of the batch.
    """
    num_tokens, num_heads, _ = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.arange(num_tokens + 1, dtype=torch.int32)
    out = query.new_zeros(num_tokens, num_heads, value_cache.shape[-1])
    lse = query.new_full((num_tokens, num_heads), -torch.inf, dtype=torch.float32)
    caches = (key_cache, value_cache, int8_cache, int4_cache)
    for seq, seq_len in enumerate(seq_lens.tolist()):
        first, last = int(cu_seqlens_q[seq]), int(cu_seqlens_q[seq + 1])
        if first == last:
            continue
        # A block that no query can see is never read: its table entry may be anything.
        start = 0
        if scoring.window:
            lowest = seq_len - (last - first) - scoring.window + 1
            start = max(0, lowest) // block_size * block_size
        blocks = block_table[seq, start // block_size : -(-seq_len // block_size)]
        key, value = _gather(blocks, caches, query.dtype)
        key, value = key[: seq_len - start], value[: seq_len - start]
        visible, distance = _relate(seq_len, start, first, last, scoring, query.device)
        # A slot nobody sees may hold NaN, which a weight of zero would not silence.
        unseen = ~visible.any(dim=0)
        key[unseen], value[unseen] = 0, 0
        group = num_heads // num_kv_heads
        key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[first:last], key) * scoring.sm_scale
        if scoring.soft_cap:
            scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
        wide = torch.promote_types(scores.dtype, torch.float32)
        if scoring.alibi_slopes is not None:
            slopes = scoring.alibi_slopes.to(wide)[:, None, None]
            scores = (scores.to(wide) - slopes * distance.to(wide)).to(scores.dtype)
        scores = scores.masked_fill(~visible, -torch.inf)
        if scoring.sinks is not None:
            sinks = scoring.sinks.to(scores.dtype)[:, None, None].expand(-1, last - first, 1)
            scores = torch.cat([scores, sinks], dim=-1)
        seq_lse = torch.logsumexp(scores.to(wide), -1)
        # Rows that see no key: softmax would make NaN of them. Other rows keep a NaN of their
        # scores.
        sees_nothing = (scores == -torch.inf).all(dim=-1, keepdim=True)
        weights = torch.softmax(scores, dim=-1).masked_fill(sees_nothing, 0.0)[..., : key.shape[0]]
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, value)
        lse[first:last] = seq_lse.transpose(0, 1).to(torch.float32)
    return out, lse if return_lse else lse.new_empty((0, num_heads))


def _gather(
    blocks: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor, QuantizedCache | None, QuantizedCache | None],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some table entries, `[num_tokens, num_kv_heads, head_dim]`, copied."""
    key_cache, value_cache, int8_cache, int4_cache = caches
    kinds = blocks >> KIND_SHIFT
    ids = (blocks & ((1 << KIND_SHIFT) - 1)).long()
    keys = key_cache.new_zeros((len(blocks), *key_cache.shape[1:]), dtype=dtype)
    values = value_cache.new_zeros((len(blocks), *value_cache.shape[1:]), dtype=dtype)
    for kind, cache in ((KINDS["int8"], int8_cache), (KINDS["int4"], int4_cache)):
        if cache is not None:
            chosen = QuantizedCache(*(part[ids[kinds == kind]] for part in cache))
            keys[kinds == kind] = dequantize_keys(chosen.key_codes, chosen.key_scales, dtype)
            values[kinds == kind] = dequantize_values(
                chosen.value_codes, chosen.value_scales, values.shape[-1], dtype
            )
    keys[kinds == 0] = key_cache[ids[kinds == 0]].to(dtype)
    values[kinds == 0] = value_cache[ids[kinds == 0]].to(dtype)
    return keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)


def _relate(
    seq_len: int, start: int, first: int, last: int, scoring: Scoring, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the keys from `start` on each query sees, and how far they are apart."""
    num_queries = last - first
    positions = torch.arange(seq_len - num_queries, seq_len, device=device)
    keys_at = torch.arange(start, seq_len, device=device)
    visible = torch.ones(num_queries, seq_len - start, dtype=torch.bool, device=device)
    if scoring.tree_mask is not None:
        bits = torch.arange(num_queries, device=device)
        sees = ((scoring.tree_mask[first:last, None] >> bits) & 1).bool()
        depths = (sees & ~torch.eye(num_queries, dtype=torch.bool, device=device)).sum(1)
        positions = seq_len - num_queries + depths
        # Only the last keys are new tokens; a sequence may even have fewer tokens than queries.
        kept = min(num_queries, seq_len - start)
        keys_at[seq_len - start - kept :] = positions[num_queries - kept :]
        visible[:, seq_len - start - kept :] = sees[:, num_queries - kept :]
    elif scoring.causal:
        visible &= keys_at[None, :] <= positions[:, None]
    if scoring.window:
        visible &= keys_at[None, :] > positions[:, None] - scoring.window
    return visible, (positions[:, None] - keys_at[None, :]).abs()


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys; see `kvkernels.merge_attention`."""
    lse = torch.logaddexp(lse_a, lse_b)
    # Both empty: -inf - -inf is NaN, and the union of nothing is zero.
    is_empty = lse == -torch.inf
    weight_a = torch.exp(lse_a - lse).masked_fill(is_empty, 0.0)[..., None]
    weight_b = torch.exp(lse_b - lse).masked_fill(is_empty, 0.0)[..., None]
    wide_a = out_a.to(torch.promote_types(out_a.dtype, torch.float32))
    wide_b = out_b.to(wide_a.dtype)
    # A partial over no keys contributes nothing, whatever its output holds.
    part_a = torch.where(weight_a == 0, 0.0, wide_a * weight_a)
    part_b = torch.where(weight_b == 0, 0.0, wide_b * weight_b)
    return (part_a + part_b).to(out_a.dtype), lse
