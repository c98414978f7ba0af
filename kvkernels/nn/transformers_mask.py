"""What layers get in place of a mask tensor: which keys their tokens see, in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvkernels.errors import UnsupportedAttributeError, UnsupportedError
from kvkernels.nn.transformers_compat import check_mask_span, mask_window, without_idle_packing


@dataclass(frozen=True)
class MaskStandIn:
    """The mask of a layer whose tokens see the tokens before them, or the last of those.

    Attributes:
        window: A token sees itself and the `window - 1` tokens before it; None for all.
        num_keys: That attention will get.
        first_key: Position of the first of them.
        refusal: Why no kernel serves the mask; None where one does. A model may make a mask that
            none of its layers uses, so it is they who are refused.
    """

    window: int | None
    num_keys: int
    first_key: int
    refusal: str | None = None

    def contiguous(self) -> MaskStandIn:
        """Itself: `generate` asks this of the masks it makes for a static cache."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> MaskStandIn:
        """Itself: accelerate asks this of what goes into a layer whose weights lie elsewhere."""
        return self

    # All methods below are reached when a layer computes with the mask itself.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedAttributeError(self.refusal or _NOT_A_TENSOR)

    def __getitem__(self, index: Any) -> Any:
        raise UnsupportedError(self.refusal or _NOT_A_TENSOR)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(_NOT_A_TENSOR)


_NOT_A_TENSOR = (
    "attention_mask: expected layers that hand it to the attention function alone, got one that"
    " computes with it itself"
)


def find_window(mask: Any, window: int | None, num_keys: int | None = None) -> int | None:
    """How many of the last tokens the tokens of a layer see; None for all.

    Args:
        mask: What the layer hands on as its mask; None is causal.
        window: What the layer itself says.
        num_keys: Of the layer; None where they lie in a pool.

    Raises:
        UnsupportedError: If no kernel serves the mask, or it is that of other keys.
    """
    if mask is None:
        return window
    if not isinstance(mask, MaskStandIn):
        raise UnsupportedError("attention_mask: expected none or a causal one, got a custom mask")
    if mask.refusal is not None:
        raise UnsupportedError(mask.refusal)
    if num_keys is not None and num_keys != mask.num_keys:
        raise UnsupportedError(
            f"key: expected {mask.num_keys} keys (those of the mask), got {num_keys}, as where"
            " a layer adds compressed keys to its tokens'"
        )
    return window if mask.window is None else mask.window


def make_mask(
    *,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Any,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    q_offset: int | torch.Tensor | None = None,
    q_length: int | None = None,
    **_: Any,
) -> MaskStandIn:
    """In place of a mask tensor, as transformers asks for one.

    Padding, a static cache and every mask but a causal one, with a window or without, is refused.
    """
    try:
        check_mask_span(attention_mask, kv_length, kv_offset, q_offset, q_length)
        _check_padding(attention_mask)
        window = _find_window(mask_function, config, allow_is_causal_skip)
    except UnsupportedError as error:
        return MaskStandIn(None, kv_length, kv_offset, str(error))
    return MaskStandIn(window, kv_length, kv_offset)


def _check_padding(attention_mask: torch.Tensor | None) -> None:
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedError(
            "attention_mask: expected sequences of one length, got padding; run them one by one"
        )


def _find_window(mask_function: Any, config: Any, is_plain: bool) -> int | None:
    """The window of a mask; transformers calls it plain if nothing was put on top of it."""
    if not is_plain:
        mask_function = without_idle_packing(mask_function)
        if mask_function is None:
            raise UnsupportedError(
                "attention_mask: expected a causal or sliding-window mask, got packed sequences,"
                " bidirectional attention, a static cache or another overlay"
            )
    return mask_window(mask_function, config)
