"""A `transformers.Cache` for one forward pass over sequences of any lengths, in one row."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from kvkernels.nn.groups import PagedGroup
from kvkernels.nn.module import PagedBatch
from kvkernels.nn.paged_kv import PagedKV
from kvkernels.nn.pool_cache import PoolCache
from kvkernels.nn.transformers_compat import num_queries


class BatchCache(PoolCache):
    """Where the tokens of one forward pass lie: what continuous batching gives a model.

    The model is called with ``input_ids`` and ``position_ids`` of shape ``[1, num_tokens]``: the
    new tokens of all sequences, one sequence after another. Each token sees its own sequence alone,
    as the batches say. The caller reserves blocks, and counts tokens once the pass is over.

    ::

        sequence   0          1    2
        tokens     x x x x    x    x x        input_ids [1, 7]
        positions  0 1 2 3    9    4 5        position_ids [1, 7]

    Args:
        groups: All layers of the model, each in one group.
        batches: Of each group, the same tokens.
        before_layer: Called with each layer's number before it is attended to, as by whoever waits
            for restored blocks layer by layer.

    Raises:
        ValueError: If the groups do not make up a model's layers, or there is not one batch each.
    """

    def __init__(
        self,
        groups: Sequence[PagedGroup],
        batches: Sequence[PagedBatch],
        before_layer: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(groups)
        if len(batches) != len(groups):
            raise ValueError(f"batches: expected {len(groups)} (one a group), got {len(batches)}")
        self._batches = tuple(batches)
        self._before_layer = before_layer

    # See `PoolCache`.
    @torch.compiler.disable
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        call: Hashable = None,
        **kwargs: Any,
    ) -> tuple[PagedKV, PagedKV]:
        """Store a layer's new keys and values, ``[1, num_kv_heads, num_tokens, head_dim]`` each.

        Models' own layers pass other arguments, too; `call` comes from replaced ones, see
        `LayerStore.store`.

        Returns:
            A handle, twice, that the "kvkernels" attention function takes for key and value.

        Raises:
            UnsupportedError: If the model does not visit its layers once each and in order.
            ValueError: If shapes or dtypes do not fit the pool.
        """
        if self._before_layer is not None:
            self._before_layer(layer_idx)
        handle = self._layers.store(self._batches, layer_idx, key_states, value_states, call=call)
        return handle, handle

    def next_place(self, layer_idx: int, call: Hashable) -> PagedKV | None:
        """See `LayerStore.next_place`; None if the layer is to go through `update`."""
        place = self._layers.next_place(self._batches, layer_idx, call)
        if place is not None and self._before_layer is not None:
            self._before_layer(layer_idx)
        return place

    @property
    def is_done(self) -> bool:
        """Whether the pass has stored its tokens in all layers."""
        return self._layers.is_done

    # Models ask these for their masks. The packed row counts as one sequence that starts at zero:
    # attention takes positions, lengths and windows from the batches.

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        return 0

    def get_mask_sizes(self, query: int | torch.Tensor, layer_idx: int) -> tuple[int, int]:
        return num_queries(query), 0

    def __repr__(self) -> str:
        return f"BatchCache(num_tokens={len(self._batches[0].slot_mapping)})"
