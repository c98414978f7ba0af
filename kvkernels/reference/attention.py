"""Meaning of paged attention and of merging two partial attentions."""

import torch


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    sm_scale: float,
    causal: bool,
    window: int,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a block-table cache; see `kvkernels.paged_attention`.

    `window` 0 means none. Works in the dtype of `query`, float64 included, so that one function
    gives both the exact meaning and what plain PyTorch makes of it in low precision.
    """
    num_tokens, num_heads, _ = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.arange(num_tokens + 1, dtype=torch.int32)
    out = torch.zeros_like(query)
    lse = query.new_full((num_tokens, num_heads), -torch.inf, dtype=torch.float32)
    for seq, seq_len in enumerate(seq_lens.tolist()):
        first, last = cu_seqlens_q[seq].item(), cu_seqlens_q[seq + 1].item()
        if first == last:
            continue
        positions = torch.arange(first, last, device=query.device) - last + seq_len
        keys_at = torch.arange(seq_len, device=query.device)
        # A block that no query can see is never read: its table entry may be anything.
        start = 0
        if window:
            start = max(0, int(positions[0]) - window + 1) // block_size * block_size
        keys_at = keys_at[start:]
        visible = torch.ones(len(positions), len(keys_at), dtype=torch.bool, device=query.device)
        if causal:
            visible &= keys_at[None, :] <= positions[:, None]
        if window:
            visible &= keys_at[None, :] > positions[:, None] - window
        blocks = block_table[seq, keys_at // block_size].long()
        offsets = keys_at % block_size
        group = num_heads // num_kv_heads
        key = key_cache[blocks, :, offsets].repeat_interleave(group, dim=1)
        value = value_cache[blocks, :, offsets].repeat_interleave(group, dim=1)
        # A slot nobody sees may hold NaN, which a weight of zero would not silence.
        unseen = ~visible.any(dim=0)
        key, value = key.clone(), value.clone()
        key[unseen], value[unseen] = 0, 0
        scores = torch.einsum("qhd,khd->hqk", query[first:last], key) * sm_scale
        scores = scores.masked_fill(~visible, -torch.inf)
        seq_lse = torch.logsumexp(scores.to(torch.promote_types(scores.dtype, torch.float32)), -1)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, value)
        lse[first:last] = seq_lse.transpose(0, 1).to(torch.float32)
    return out, lse if return_lse else lse.new_empty((0, num_heads))


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys; see `kvkernels.merge_attention`."""
    lse = torch.logaddexp(lse_a, lse_b)
    # Both empty: -inf - -inf is NaN, and the union of nothing is zero.
    weight_a = torch.exp(lse_a - lse).nan_to_num(0.0)[..., None]
    weight_b = torch.exp(lse_b - lse).nan_to_num(0.0)[..., None]
    wide_a = out_a.to(torch.promote_types(out_a.dtype, torch.float32))
    wide_b = out_b.to(wide_a.dtype)
    # A partial over no keys contributes nothing, whatever its output holds.
    part_a = torch.where(weight_a > 0, wide_a * weight_a, 0.0)
    part_b = torch.where(weight_b > 0, wide_b * weight_b, 0.0)
    return (part_a + part_b).to(out_a.dtype), lse
