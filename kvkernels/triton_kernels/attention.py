"""Launchers of the attention kernels, with the signatures of `kvkernels.reference.attention`."""

from __future__ import annotations

import torch

from kvkernels.triton_kernels.decode import plan_decode
from kvkernels.triton_kernels.launch import device_of, run
from kvkernels.triton_kernels.merge import plan_merge
from kvkernels.triton_kernels.prefill import plan_prefill


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

    Looks at shapes only and never at values, so it neither stops the stream nor breaks a captured
    graph: lengths, tables and caches may change between replays.

    Raises:
        UnsupportedError: If head_dim is above 256 or the device is older than Ampere.
    """
    out = query.new_empty(query.shape)
    lse = query.new_empty(
        (query.shape[0] if return_lse else 0, query.shape[1]), dtype=torch.float32
    )
    if query.numel() == 0:
        return out, lse
    arguments = (query, key_cache, value_cache, block_table, seq_lens)
    device = device_of(query)
    if cu_seqlens_q is None:
        # The one query stands at the end, where causal or not makes no difference.
        launches = plan_decode(*arguments, out, lse, sm_scale, window, device)
    else:
        launches = plan_prefill(
            *arguments, cu_seqlens_q, out, lse, sm_scale, causal, window, device
        )
    run(launches, query)
    return out, lse


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys; see `kvkernels.merge_attention`."""
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    if out.numel():
        run(plan_merge(out_a, lse_a, out_b, lse_b, out, lse), out_a)
    return out, lse
