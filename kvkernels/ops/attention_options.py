"""What calls of attention may say by keyword, for type checkers; see `paged_attention`."""

from __future__ import annotations

from typing import TypedDict

import torch

from kvkernels.quantized_cache import QuantizedCache


class SharedOptions(TypedDict, total=False):
    """Those of `shared_prefix_attention` too."""

    sm_scale: float | None
    causal: bool
    soft_cap: float | None
    sinks: torch.Tensor | None
    tree_mask: torch.Tensor | None
    int8_cache: QuantizedCache | None
    int4_cache: QuantizedCache | None
    batch_invariant: bool


class AttentionOptions(SharedOptions, total=False):
    """Those of `paged_attention`, but for ``return_lse``, which tells its result's type."""

    window: int | None
    alibi_slopes: torch.Tensor | None
