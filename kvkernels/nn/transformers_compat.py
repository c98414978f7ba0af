"""What differs between the supported versions of transformers (4.57 and 5.x), in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import causal_mask_function

from kvkernels.errors import UnsupportedError

try:
    from transformers.utils import output_capturing
except ImportError:  # 4.57
    _of_captures: dict[str, Any] = {}
else:
    _of_captures = vars(output_capturing)

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "check_mask_span",
    "is_idle_capture",
    "mask_window",
    "num_queries",
    "without_idle_packing",
]


def is_idle_capture(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook is one with which transformers 5 captures outputs, and none are now.

    A model keeps them from the first pass on that was asked for hidden states or attentions. 4.57
    leaves none.
    """
    collector = _of_captures.get("_active_collector")
    if collector is None or getattr(hook, "__globals__", None) is not _of_captures:
        return False
    return not collector.get()


def num_queries(query: int | torch.Tensor) -> int:
    """New tokens of a forward pass: 5.x passes their number, 4.57 their positions."""
    return query if isinstance(query, int) else query.shape[0]


def check_mask_span(
    attention_mask: torch.Tensor | None,
    kv_length: int,
    kv_offset: int,
    q_offset: int | torch.Tensor | None,
    q_length: int | None,
) -> None:
    """Raise UnsupportedError where more keys come than tokens were seen, as from a static cache.

    4.57 gives no `q_offset` and `q_length`; there a static cache is known by the mask it forbids
    to skip. In 5.x its `q_offset` is a tensor.
    """
    num_keys = kv_length + kv_offset
    if attention_mask is not None and attention_mask.shape[-1] != num_keys:
        raise UnsupportedError(
            f"attention_mask: expected {num_keys} tokens (cached and new; no static cache), got"
            f" {attention_mask.shape[-1]}"
        )
    if q_offset is None or q_length is None:
        return
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != num_keys:
        raise UnsupportedError("past_key_values: expected a cache that grows, got a static cache")


def mask_window(mask_function: Callable[..., Any], config: Any) -> int | None:
    """The sliding window that a mask function describes; None for a plain causal one.

    transformers builds a sliding mask as an anonymous closure, so it is tried at the places where
    it differs from every other mask that transformers builds.

    Raises:
        UnsupportedError: If it is neither.
    """
    if mask_function is causal_mask_function:
        return None
    window = getattr(config, "sliding_window", None)
    if window is not None:
        query = torch.tensor([[window], [2 * window - 1], [3 * window + 1]])
        key = query + torch.tensor([-window, 1 - window, 0, 1])
        zero = torch.zeros((), dtype=torch.int64)
        is_seen = mask_function(zero, zero, query, key)
        # keys: before the window | its first token | the query itself | after it
        if torch.equal(is_seen, torch.tensor([[False, True, True, False]]).expand(3, 4)):
            return window
    raise UnsupportedError("attention_mask: expected a causal or sliding-window mask, got another")


# Depends on the values of a tensor, which a compiled graph cannot look at.
@torch.compiler.disable
def without_idle_packing(mask_function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The mask function without the part for packed sequences, where there are none.

    4.57 adds that part to every forward pass without a cache, 5.x where several sequences share a
    row and wherever it is compiled, as it cannot tell there. Its tensor numbers them, from zero.

    Returns:
        None if sequences are packed or other parts make up the mask.
    """
    parts = _enclosed(mask_function).get("mask_functions", ())
    if len(parts) != 2:
        return None
    # 4.57: the mask, then the packing; 5.x the other way round
    for rest, packing in (parts, parts[::-1]):
        packed = _enclosed(packing).get("packed_sequence_mask")
        if isinstance(packed, torch.Tensor) and not bool(packed.any()):
            # 5.x wraps the mask to restart positions at each sequence; with one sequence that
            # changes nothing.
            return _enclosed(rest).get("mask_function", rest)
    return None


def _enclosed(function: Callable[..., Any]) -> Mapping[str, Any]:
    return inspect.getclosurevars(function).nonlocals
