"""Checks of what `paged_attention` is given: each error names the argument."""

from __future__ import annotations

import torch

from kvkernels.checks import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_inference,
    check_last_stride,
    check_shape,
)
from kvkernels.quantized_cache import KIND_SHIFT, QuantizedCache
from kvkernels.scoring import MAX_TREE_TOKENS, Scoring
from kvkernels.signatures import CheckedCalls

_FLOAT32 = torch.finfo(torch.float32)

_checked = CheckedCalls()


def check_kinds(int8_cache: QuantizedCache | None, int4_cache: QuantizedCache | None) -> None:
    """Raise ValueError unless what there is of quantised blocks is a `QuantizedCache`."""
    for name, cache in (("int8_cache", int8_cache), ("int4_cache", int4_cache)):
        if cache is not None and not isinstance(cache, QuantizedCache):
            raise ValueError(f"{name}: expected a QuantizedCache, got {type(cache).__name__}")


def check_attention_inputs(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    int8_cache: QuantizedCache | None,
    int4_cache: QuantizedCache | None,
) -> None:
    """Raise ValueError unless shapes, dtypes, devices and strides agree."""
    tensors = (
        *(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q),
        *(int8_cache or (None,)),
        *(int4_cache or (None,)),
    )
    if _checked.has(tensors):
        return
    check_dtype("query", query, *FLOAT_DTYPES)
    _check_caches(query, key_cache, value_cache)
    num_kv_heads, _, head_dim = key_cache.shape[1:]
    check_shape("query", query, (None, None, head_dim))
    num_tokens, num_heads, _ = query.shape
    if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"query: expected num_heads to be a multiple of num_kv_heads {num_kv_heads},"
            f" got {num_heads}"
        )
    check_last_stride("query", query)
    check_inference("query", query)
    check_shape("seq_lens", seq_lens, (None,))
    num_seqs = seq_lens.shape[0]
    check_shape("block_table", block_table, (num_seqs, None))
    if cu_seqlens_q is not None:
        check_shape("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,))
        if num_seqs == 0 and num_tokens > 0:
            raise ValueError(f"query: expected no tokens without sequences, got {num_tokens}")
    elif num_tokens != num_seqs:
        raise ValueError(
            f"query: expected one token for each of {num_seqs} sequences without cu_seqlens_q,"
            f" got {num_tokens}"
        )
    check_device("key_cache", key_cache, query.device)
    for name, tensor in (
        ("block_table", block_table),
        ("seq_lens", seq_lens),
        ("cu_seqlens_q", cu_seqlens_q),
    ):
        if tensor is not None:
            check_dtype(name, tensor, torch.int32)
            check_last_stride(name, tensor)
            check_device(name, tensor, query.device)
    if int8_cache is not None:
        _check_quantized_cache("int8_cache", int8_cache, key_cache, value_cache, 1)
    if int4_cache is not None:
        _check_quantized_cache("int4_cache", int4_cache, key_cache, value_cache, 2)
    _checked.add(tensors)


def _check_caches(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    check_shape("key_cache", key_cache, (None, None, None, None))
    check_shape("value_cache", value_cache, (*key_cache.shape[:3], None))
    check_dtype("key_cache", key_cache, query.dtype, torch.float8_e4m3fn)
    check_dtype("value_cache", value_cache, key_cache.dtype)
    check_device("value_cache", value_cache, key_cache.device)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_last_stride(name, cache)
        check_inference(name, cache)
        if cache.shape[3] == 0:
            raise ValueError(f"{name}: expected a head_dim of 1 or more, got 0")
    if key_cache.shape[2] == 0:
        raise ValueError("key_cache: expected at least one slot in a block, got block_size 0")


def _check_quantized_cache(
    name: str,
    cache: QuantizedCache,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    codes_per_byte: int,
) -> None:
    """Raise ValueError unless `cache` holds blocks like those of the two caches."""
    num_kv_heads, block_size, head_dim = key_cache.shape[1:]
    value_dim = value_cache.shape[3]
    num_blocks = cache.key_codes.shape[0] if cache.key_codes.dim() else 0
    for width in (head_dim, value_dim):
        if width % codes_per_byte:
            raise ValueError(f"{name}: expected an even head_dim, got {width}")
    shapes = {
        "key_codes": (num_blocks, num_kv_heads, block_size, head_dim // codes_per_byte),
        "key_scales": (num_blocks, num_kv_heads, None, head_dim, 2),
        "value_codes": (num_blocks, num_kv_heads, block_size, value_dim // codes_per_byte),
        "value_scales": (num_blocks, num_kv_heads, block_size, None, 2),
    }
    for field, shape in shapes.items():
        part = getattr(cache, field)
        full_name = f"{name}.{field}"
        check_shape(full_name, part, shape)
        check_dtype(full_name, part, torch.float16 if "scales" in field else torch.uint8)
        check_device(full_name, part, key_cache.device)
        if part.numel() and not part[0, 0].is_contiguous():
            raise ValueError(f"{full_name}: expected dense heads, got strides {part.stride()}")
    for field, whole, groups in (
        ("key_scales", block_size, cache.key_scales.shape[2]),
        ("value_scales", value_dim, cache.value_scales.shape[3]),
    ):
        if groups == 0 or whole % groups:
            raise ValueError(f"{name}.{field}: expected groups that divide {whole}, got {groups}")


def check_scoring(
    query: torch.Tensor,
    sm_scale: float | None,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the rules of scoring make sense and fit `query`."""
    if query.dim() != 3:  # on a GPU the other checks come later
        check_shape("query", query, (None, None, None))
    num_tokens, num_heads, _ = query.shape
    if window is not None and (not isinstance(window, int) or not 1 <= window < 1 << 63):
        raise ValueError(
            f"window: expected an integer of 1 or more, or None for no window, got {window!r}"
        )
    if not isinstance(causal, bool):
        raise ValueError(f"causal: expected True or False, got {causal!r}")
    if sm_scale is not None and not _is_finite(sm_scale):
        raise ValueError(f"sm_scale: expected a finite float32 number or None, got {sm_scale!r}")
    if soft_cap is not None and not (_is_finite(soft_cap) and soft_cap >= _FLOAT32.tiny):
        raise ValueError(f"soft_cap: expected a positive float32 number or None, got {soft_cap!r}")
    for name, tensor, size, dtype in (
        ("sinks", sinks, num_heads, torch.float32),
        ("alibi_slopes", alibi_slopes, num_heads, torch.float32),
        ("tree_mask", tree_mask, num_tokens, torch.int32),
    ):
        if tensor is not None:
            check_shape(name, tensor, (size,))
            check_dtype(name, tensor, dtype)
            check_device(name, tensor, query.device)
            check_last_stride(name, tensor)
            check_inference(name, tensor)
    if tree_mask is not None and not causal:
        raise ValueError("tree_mask: expected causal=True with a tree mask, got causal=False")


def _is_finite(value: object) -> bool:
    """As a float32, which is what kernels compute with."""
    return isinstance(value, (int, float)) and _FLOAT32.min <= value <= _FLOAT32.max


def check_index_values(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    scoring: Scoring,
    return_lse: bool,
    int8_cache: QuantizedCache | None,
    int4_cache: QuantizedCache | None,
    batch_invariant: bool,
) -> None:
    """Check what lies inside the index tensors, as the native kernel does for itself."""
    num_tokens, (num_blocks, _, block_size, _) = query.shape[0], key_cache.shape
    counts = [num_blocks]
    counts += [cache.key_codes.shape[0] if cache else 0 for cache in (int8_cache, int4_cache)]
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
        if scoring.tree_mask is not None and num_queries > MAX_TREE_TOKENS:
            raise ValueError(
                f"tree_mask: expected at most {MAX_TREE_TOKENS} queries a sequence, got"
                f" {num_queries} for sequence {seq}"
            )
        if num_queries == 0:
            continue
        start = 0
        if scoring.window:
            start = max(0, seq_len - num_queries - scoring.window + 1) // block_size
        used = block_table[seq, start : -(-seq_len // block_size)]
        _check_blocks(used.tolist(), counts, seq)


def _check_blocks(entries: list[int], counts: list[int], seq: int) -> None:
    for entry in entries:
        kind, block = entry >> KIND_SHIFT, entry & ((1 << KIND_SHIFT) - 1)
        if 0 <= kind < len(counts) and block < counts[kind]:
            continue
        name = {1: "int8 ", 2: "int4 "}.get(kind, "")
        if name and counts[kind] == 0:
            raise ValueError(
                f"block_table: expected no {name}block without such a cache, got one for sequence"
                f" {seq}"
            )
        raise ValueError(
            f"block_table: expected {name}block ids 0 to {counts[kind if name else 0] - 1}, got"
            f" {block if name else entry} for sequence {seq}"
        )
