"""Turns checked tensors into addresses, sizes and strides for the C++ kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

try:
    import _kvkernels
except ModuleNotFoundError:  # only when the extension is absent: a broken build raises
    _kvkernels = None

is_available = _kvkernels is not None and hasattr(_kvkernels, "paged_attention")

# Instruction sets this processor has, best first, and the number C++ knows each by.
_ISAS: dict[str, int] = dict(_kvkernels.attention_paths()) if is_available else {}
_isa = next(iter(_ISAS.values()), 0)

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def available_isas() -> tuple[str, ...]:
    """Names that `use_isa` accepts here, the one in use by default first."""
    return tuple(_ISAS)


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the attention ops on another instruction set than the best one, to test or compare it.

    For the whole process, not only for the calling thread. Where an instruction set does not serve
    a dtype or head_dim, the next lower one does.

    Args:
        name: One of `available_isas()`. "amx_emulated" does what "amx" does in plain C++.

    Raises:
        ValueError: If this processor does not have it.
    """
    global _isa
    if name not in _ISAS:
        raise ValueError(f"name: expected one of {available_isas()}, got {name!r}")
    previous, _isa = _isa, _ISAS[name]
    try:
        yield
    finally:
        _isa = previous


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See `kvkernels.store_kv`."""
    num_tokens, num_kv_heads, head_dim = key.shape
    item = key.element_size()
    _kvkernels.store_kv(
        (
            key.data_ptr(),
            value.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            slot_mapping.data_ptr(),
        ),
        (num_tokens, num_kv_heads, key_cache.shape[0], key_cache.shape[2], head_dim * item),
        [item * s for s in (*key.stride()[:2], *key_cache.stride()[:3])],
        [item * s for s in (*value.stride()[:2], *value_cache.stride()[:3])],
        slot_mapping.stride(0),
        torch.get_num_threads(),
    )


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
    """See `kvkernels.paged_attention`; `window` 0 means none."""
    shape = query.shape
    num_blocks, num_kv_heads, block_size, _ = key_cache.shape
    out = query.new_empty(shape)
    lse = query.new_empty((shape[0] if return_lse else 0, shape[1]), dtype=torch.float32)
    _kvkernels.paged_attention(
        (
            query.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            block_table.data_ptr(),
            seq_lens.data_ptr(),
            0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr(),
            out.data_ptr(),
            lse.data_ptr() if return_lse else 0,
        ),
        (*shape[:2], num_kv_heads, shape[2], *block_table.shape, num_blocks, block_size),
        (
            *query.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            block_table.stride(0),
        ),
        sm_scale,
        causal,
        window,
        _DTYPES[query.dtype],
        _isa,
        torch.get_num_threads(),
    )
    return out, lse


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvkernels.merge_attention`."""
    num_tokens, num_heads, head_dim = out_a.shape
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    tensors = (out_a, lse_a, out_b, lse_b, out, lse)
    _kvkernels.merge_attention(
        [tensor.data_ptr() for tensor in tensors],
        num_tokens * num_heads,
        head_dim,
        _DTYPES[out_a.dtype],
        _isa,
        torch.get_num_threads(),
    )
    return out, lse
