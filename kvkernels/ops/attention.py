"""Attention that reads the block-table cache where it lies, and the union of two attentions."""

import math

import torch

from kvkernels import native
from kvkernels.checks import (
    FLOAT_DTYPES,
    check_caches,
    check_device,
    check_dtype,
    check_inference,
    check_last_stride,
    check_shape,
)
from kvkernels.ops.library import LIBRARY
from kvkernels.reference import attention as reference


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    *,
    sm_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from each sequence's newest tokens to all of its cached tokens.

    One call serves decode (one query a sequence), prefill (as many queries as tokens), extend
    (new tokens after cached ones) and any mix. The new tokens' keys and values must be in the
    cache already (`store_kv`).

    The last query of a sequence stands at position ``seq_len - 1``, the one before it at
    ``seq_len - 2``, and so on. A query that sees no key (an empty sequence, or a position below
    zero) gives zeros and a log-sum-exp of minus infinity.

    Under ``torch.compile(dynamic=True)``, a graph over several layers of one pool takes the pool's
    ``data`` and slices it inside, as `KVPool.key_cache` does: PyTorch cannot trace with dynamic
    shapes when it gets several layers' views as inputs.

    Args:
        query: ``[num_tokens, num_heads, head_dim]``, the sequences one after another, last
            stride 1; float32, float16 or bfloat16.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_dim]``, dtype of ``query``; any
            strides with the last one 1. ``num_heads`` is a multiple of ``num_kv_heads``.
        value_cache: Like ``key_cache``.
        block_table: ``[num_seqs, max_blocks_per_seq]``, int32, last stride 1: a sequence's block
            ids in order. Entries past its length, or wholly before its window, are never read.
        seq_lens: ``[num_seqs]``, int32: tokens in each sequence, cached and new.
        cu_seqlens_q: ``[num_seqs + 1]``, int32: running sum of the numbers of queries, from 0 to
            ``num_tokens``. Default one query a sequence.
        sm_scale: Multiplies scores before softmax; finite. Default ``head_dim ** -0.5``.
        causal: Whether a query sees only keys at its own position and before.
        window: Whether a query at position p sees only keys after ``p - window``; None for all.
        return_lse: Whether to return the log-sum-exp too.

    Returns:
        ``[num_tokens, num_heads, head_dim]`` in the dtype of ``query``; with ``return_lse`` a pair
        of it and ``[num_tokens, num_heads]``, float32: natural logarithm of the sum of the
        exponentials of the scaled scores.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree, a tensor requires grad, or (on
            the CPU; on a GPU looking would stop the stream) a length or a block id in use is out
            of range.
    """
    check_caches(key_cache, value_cache)
    num_kv_heads, _, head_dim = key_cache.shape[1:]
    check_shape("query", query, (None, None, head_dim))
    num_tokens, num_heads, _ = query.shape
    if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"query: expected num_heads to be a multiple of num_kv_heads {num_kv_heads},"
            f" got {num_heads}"
        )
    check_dtype("query", query, key_cache.dtype)
    check_last_stride("query", query)
    check_shape("seq_lens", seq_lens, (None,))
    num_seqs = seq_lens.shape[0]
    check_shape("block_table", block_table, (num_seqs, None))
    check_dtype("block_table", block_table, torch.int32)
    check_last_stride("block_table", block_table)
    check_dtype("seq_lens", seq_lens, torch.int32)
    check_last_stride("seq_lens", seq_lens)
    if cu_seqlens_q is not None:
        check_shape("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,))
        check_dtype("cu_seqlens_q", cu_seqlens_q, torch.int32)
        check_last_stride("cu_seqlens_q", cu_seqlens_q)
        check_device("cu_seqlens_q", cu_seqlens_q, query.device)
    elif num_tokens != num_seqs:
        raise ValueError(
            f"query: expected one token for each of {num_seqs} sequences without cu_seqlens_q,"
            f" got {num_tokens}"
        )
    for name, tensor in (
        ("key_cache", key_cache),
        ("block_table", block_table),
        ("seq_lens", seq_lens),
    ):
        check_device(name, tensor, query.device)
    check_inference("query", query)
    if window is not None and (not isinstance(window, int) or not 1 <= window < 1 << 63):
        raise ValueError(
            f"window: expected an integer of 1 or more, or None for no window, got {window!r}"
        )
    if not isinstance(causal, bool):
        raise ValueError(f"causal: expected True or False, got {causal!r}")
    if sm_scale is not None and not (
        isinstance(sm_scale, (int, float)) and -math.inf < sm_scale < math.inf
    ):
        raise ValueError(f"sm_scale: expected a finite number or None, got {sm_scale!r}")
    out, lse = torch.ops.kvkernels.paged_attention.default(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        cu_seqlens_q,
        head_dim**-0.5 if sm_scale is None else sm_scale,
        causal,
        window or 0,
        return_lse,
    )
    return (out, lse) if return_lse else out


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over the union of two disjoint sets of keys, from the attention over each.

    Exact up to rounding: each output is weighted by its share of the softmax sum.

    Args:
        out_a: ``[num_tokens, num_heads, head_dim]``, contiguous; float32, float16 or bfloat16.
        lse_a: ``[num_tokens, num_heads]``, float32, contiguous, natural logarithm; minus infinity
            where no key was seen, and then ``out_a`` is not read as a number.
        out_b: Like ``out_a``.
        lse_b: Like ``lse_a``.

    Returns:
        The merged output, like ``out_a``, and log-sum-exp, like ``lse_a``.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree or a tensor requires grad.
    """
    check_shape("out_a", out_a, (None, None, None))
    num_tokens, num_heads, head_dim = out_a.shape
    check_dtype("out_a", out_a, *FLOAT_DTYPES)
    check_shape("out_b", out_b, (num_tokens, num_heads, head_dim))
    check_dtype("out_b", out_b, out_a.dtype)
    check_shape("lse_a", lse_a, (num_tokens, num_heads))
    check_shape("lse_b", lse_b, (num_tokens, num_heads))
    check_dtype("lse_a", lse_a, torch.float32)
    check_dtype("lse_b", lse_b, torch.float32)
    for name, tensor in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        check_device(name, tensor, out_a.device)
        check_inference(name, tensor)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got {tensor.stride()}")
    return torch.ops.kvkernels.merge_attention.default(out_a, lse_a, out_b, lse_b)


LIBRARY.define(
    "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table,"
    " Tensor seq_lens, Tensor? cu_seqlens_q, float sm_scale, bool causal, int window,"
    " bool return_lse) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)"
)


def check_index_values(
    num_tokens: int,
    num_blocks: int,
    block_size: int,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    window: int,
) -> None:
    """Check what lies inside the index tensors, as the native kernel does for itself."""
    max_tokens = block_table.shape[1] * block_size
    bounds = range(num_tokens + 1) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens_q: expected to run from 0 to {num_tokens}, got {bounds[0]} to {bounds[-1]}"
        )
    for seq, seq_len in enumerate(seq_lens.tolist()):
        num_queries = bounds[seq + 1] - bounds[seq]
        if num_queries < 0:
            raise ValueError(f"cu_seqlens_q: expected no decrease, got one at sequence {seq}")
        if not 0 <= seq_len <= max_tokens:
            raise ValueError(
                f"seq_lens: expected 0 to {max_tokens} (the table's width), got {seq_len}"
                f" for sequence {seq}"
            )
        if num_queries == 0:
            continue
        start = max(0, seq_len - num_queries - window + 1) // block_size if window else 0
        used = block_table[seq, start : -(-seq_len // block_size)]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < num_blocks:
            raise ValueError(
                f"block_table: expected block ids 0 to {num_blocks - 1}, got"
                f" {int(used.min())} to {int(used.max())} for sequence {seq}"
            )


@torch.library.impl(LIBRARY, "paged_attention", "CPU")
def _paged_attention_cpu(
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
    tensors = (query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q)
    if native.is_available:
        return native.paged_attention(*tensors, sm_scale, causal, window, return_lse)
    num_blocks, _, block_size, _ = key_cache.shape
    check_index_values(
        query.shape[0], num_blocks, block_size, block_table, seq_lens, cu_seqlens_q, window
    )
    return reference.paged_attention(*tensors, sm_scale, causal, window, return_lse)


@torch.library.impl(LIBRARY, "paged_attention", "CUDA")
def _paged_attention_cuda(
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
    from kvkernels.triton_kernels import attention as triton_kernels

    return triton_kernels.paged_attention(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        cu_seqlens_q,
        sm_scale,
        causal,
        window,
        return_lse,
    )


@torch.library.register_fake("kvkernels::paged_attention", lib=LIBRARY)
def _paged_attention_fake(
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
    num_tokens, num_heads, _ = query.shape
    lse_shape = (num_tokens if return_lse else 0, num_heads)
    return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=torch.float32)


@torch.library.impl(LIBRARY, "merge_attention", "CPU")
def _merge_attention_cpu(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    implementation = native if native.is_available else reference
    return implementation.merge_attention(out_a, lse_a, out_b, lse_b)


@torch.library.impl(LIBRARY, "merge_attention", "CUDA")
def _merge_attention_cuda(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from kvkernels.triton_kernels import attention as triton_kernels

    return triton_kernels.merge_attention(out_a, lse_a, out_b, lse_b)


@torch.library.register_fake("kvkernels::merge_attention", lib=LIBRARY)
def _merge_attention_fake(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(out_a), torch.empty_like(lse_a)
