"""Turns checked tensors into addresses, sizes and strides for the C++ kernels."""

import torch

try:
    import _kvkernels
except ModuleNotFoundError:  # only when the extension is absent: a broken build raises
    _kvkernels = None

is_available = _kvkernels is not None and hasattr(_kvkernels, "paged_attention")


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    raise NotImplementedError


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
    raise NotImplementedError


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError
