"""What passes between a paged cache and the attention function, and how shapes are turned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvkernels.errors import UnsupportedError
from kvkernels.nn.module import PagedBatch

_NOT_A_TENSOR = (
    "key: expected layers that hand the keys of a paged cache on to kvkernels' attention function,"
    " got one that computes with them. Either the model's attention is another: call"
    " kvkernels.nn.transformers.install(model). Or its layers change keys or values themselves"
    " after they are stored, and no kernel serves that"
)


@dataclass
class PagedKV:
    """What the attention function gets in place of key and value tensors: one layer of a pool."""

    key_cache: torch.Tensor
    value_cache: torch.Tensor
    batch: PagedBatch
    window: int | None

    # Both methods below are reached when a layer, or another attention function, takes the handle
    # for a tensor.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedError(_NOT_A_TENSOR)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(_NOT_A_TENSOR)


def merge_tokens(states: torch.Tensor) -> torch.Tensor:
    """`[batch, heads, num_new, head_dim]` as `[batch * num_new, heads, head_dim]`.

    Projections lay tokens before heads, so this is a view in the models seen so far.
    """
    batch_size, heads, num_new, head_dim = states.shape
    return states.transpose(1, 2).reshape(batch_size * num_new, heads, head_dim)


def equal_bounds(batch_size: int, num_new: int, device: torch.device) -> torch.Tensor | None:
    """`cu_seqlens_q` of sequences with `num_new` queries each."""
    if num_new == 1:
        return None
    return torch.arange(batch_size + 1, dtype=torch.int32, device=device) * num_new
