"""Launchers of the attention kernels, with the signatures of `kvkernels.reference.attention`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvkernels.quantized_cache import QuantizedCache
from kvkernels.scoring import Scoring
from kvkernels.triton_kernels.calls import Call
from kvkernels.triton_kernels.decode import plan_decode
from kvkernels.triton_kernels.launch import device_of
from kvkernels.triton_kernels.merge import plan_merge
from kvkernels.triton_kernels.prefill import plan_prefill
from kvkernels.triton_kernels.replay import Replays, addresses, signature

_NUM_INPUTS = 6  # tensors from query to cu_seqlens_q, before those of scoring and codes
_NUM_SCORING_NUMBERS = 4  # fields of `Scoring` before its tensors
_NO_CACHE = (None,) * len(QuantizedCache._fields)
_OUTPUTS = ("out_ptr", "lse_ptr")
attention_replays = Replays(
    (
        "query_ptr",
        *["float_cache"] * 2,
        "block_table_ptr",
        "seq_lens_ptr",
        "cu_seqlens_q_ptr",
        *("sinks_ptr", "slopes_ptr", "tree_mask_ptr"),
        *["int8_cache"] * 4,
        *["int4_cache"] * 4,
        *_OUTPUTS,
    )
)
_merge_replays = Replays(("out_a_ptr", "lse_a_ptr", "out_b_ptr", "lse_b_ptr", *_OUTPUTS))


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
    *,
    check: Callable[..., None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a block-table cache; see `kvkernels.paged_attention`.

    Looks at shapes only and never at values, so it neither stops the stream nor breaks a captured
    graph: lengths, tables and caches may change between replays.

    With `batch_invariant` a sequence's result is the same, bit for bit, in every batch of calls
    without `cu_seqlens_q`, and in every batch of calls with it. Between the two it may differ: one
    query alone has kernels that split its keys.

    `check` is given the tensors of the call but those of `scoring`, unless they are laid out like
    those of a call before.

    Raises:
        UnsupportedError: If a head is wider than 576, blocks or scales are cut finer than the
            kernels' tiles, or the device is older than Ampere.
    """
    tensors = (
        *(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q),
        *scoring[_NUM_SCORING_NUMBERS:],
        *(int8_cache or _NO_CACHE),
        *(int4_cache or _NO_CACHE),
    )
    pointers = addresses(tensors)
    # Keys and values start together; see `Call.is_latent`
    has_one_start = pointers[1] == pointers[2]
    numbers = (*scoring[:_NUM_SCORING_NUMBERS], return_lse, batch_invariant, has_one_start)
    key = signature(tensors, pointers, numbers)
    replay = attention_replays.find(key)
    if replay is None and check is not None:
        check(*tensors[:_NUM_INPUTS], int8_cache, int4_cache)
    num_tokens, num_heads, _ = query.shape
    out = query.new_empty((num_tokens, num_heads, value_cache.shape[3]))
    lse = query.new_empty((num_tokens if return_lse else 0, num_heads), dtype=torch.float32)
    if replay is not None:
        replay.run((*pointers, out.data_ptr(), lse.data_ptr()), query)
        return out, lse
    if query.numel() == 0:
        return out, lse
    call = Call(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        cu_seqlens_q,
        scoring,
        int8_cache,
        int4_cache,
        batch_invariant,
    )
    plan = plan_decode if cu_seqlens_q is None else plan_prefill
    attention_replays.run(key, plan(call, out, lse, device_of(query)), query)
    return out, lse


def merge_attention(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    check: Callable[..., None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys; see `kvkernels.merge_attention`.

    `check` is given the tensors, unless they are laid out like those of a call before.
    """
    tensors = (out_a, lse_a, out_b, lse_b)
    pointers = addresses(tensors)
    key = signature(tensors, pointers, ())
    replay = _merge_replays.find(key)
    if replay is None and check is not None:
        check(*tensors)
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    if replay is not None:
        replay.run((*pointers, out.data_ptr(), lse.data_ptr()), out_a)
    elif out.numel():
        _merge_replays.run(key, plan_merge(*tensors, out, lse), out_a)
    return out, lse
