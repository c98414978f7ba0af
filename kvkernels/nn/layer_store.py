"""A layer's new keys and values on their way into the pool, and the handle attention gets."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType

import torch

from kvkernels.errors import UnsupportedError
from kvkernels.nn.groups import PagedGroup
from kvkernels.nn.long_pass import LongPass
from kvkernels.nn.module import PagedBatch
from kvkernels.nn.paged_kv import PagedKV, merge_tokens
from kvkernels.ops import store_kv

_NONE: Mapping[int, LongPass] = MappingProxyType({})


class LayerStore:
    """The layers of a model, visited once each and in order by every forward pass.

    Args:
        groups: All layers of the model, each in one group.

    Raises:
        ValueError: If the groups do not make up a model's layers.
    """

    def __init__(self, groups: Sequence[PagedGroup]) -> None:
        self._groups = tuple(groups)
        self._places = _layer_places(self._groups)
        self._next_layer = 0
        self._first_calls: dict[int, Hashable] = {}  # by group: of a layer that was stored

    @property
    def num_layers(self) -> int:
        """Layers of the model, in all groups."""
        return len(self._places)

    def group_of(self, layer_idx: int) -> PagedGroup:
        """The layer group of one of the model's layers."""
        return self._groups[self._places[layer_idx][0]]

    def begin(self) -> None:
        """A forward pass begins: layer 0 is next."""
        self._next_layer = 0
        self._first_calls.clear()

    @property
    def is_done(self) -> bool:
        """Whether the forward pass has stored all layers."""
        return self._next_layer == len(self._places)

    def store(
        self,
        batches: Sequence[PagedBatch],
        layer_idx: int,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        long_passes: Mapping[int, LongPass] = _NONE,
        call: Hashable = None,
    ) -> PagedKV:
        """Store a layer's new keys and values, ``[batch, num_kv_heads, num_new, head_dim]`` each.

        Under `torch.autocast` they may be of any dtype, and are stored in the pool's.

        Args:
            batches: Of each group: where the new tokens go.
            layer_idx: The model's layer.
            key_states: New keys.
            value_states: New values.
            long_passes: By group, where the pool keeps a part of the pass only.
            call: Of a caller that asks `next_place` about further layers: see there.

        Raises:
            UnsupportedError: If it is not the layer's turn.
            ValueError: If shapes or dtypes do not fit the pool, or a tensor requires grad.
        """
        self._check_turn(layer_idx)
        place = self._place(batches, layer_idx)
        key, value = merge_tokens(key_states), merge_tokens(value_states)
        if torch.is_autocast_enabled(key.device.type):
            key, value = key.to(place.key_cache.dtype), value.to(place.value_cache.dtype)
        store_kv(key, value, place.key_cache, place.value_cache, place.batch.slot_mapping)
        self._next_layer = layer_idx + 1
        group_index, layer = self._places[layer_idx]
        if layer == 0:
            self._first_calls[group_index] = call
        if group_index in long_passes:
            return long_passes[group_index].store(layer, key, value)
        return place

    def next_place(
        self, batches: Sequence[PagedBatch], layer_idx: int, call: Hashable
    ) -> PagedKV | None:
        """Where a caller that checks nothing may store a layer's new keys and values itself.

        That is where `store` and attention have checked the first layer of the group, and this one
        differs in nothing.

        Args:
            batches: Of each group: where the new tokens go.
            layer_idx: The model's layer.
            call: What layers may differ in: shapes, dtypes, a window. That of the group's first
                layer was given to `store`.

        Returns:
            None if `store` is to store the layer.

        Raises:
            UnsupportedError: If it is not the layer's turn.
        """
        self._check_turn(layer_idx)
        group_index, layer = self._places[layer_idx]
        if layer > 0 and self._first_calls.get(group_index) == call:
            self._next_layer = layer_idx + 1
            return self._place(batches, layer_idx)
        return None

    def _check_turn(self, layer_idx: int) -> None:
        if layer_idx != self._next_layer:
            raise UnsupportedError(
                f"layer_idx: expected {self._next_layer} (every layer once, in order), got"
                f" {layer_idx}"
            )

    def _place(self, batches: Sequence[PagedBatch], layer_idx: int) -> PagedKV:
        group_index, layer = self._places[layer_idx]
        group = self._groups[group_index]
        key_cache, value_cache = group.key_caches[layer], group.value_caches[layer]
        return PagedKV(key_cache, value_cache, batches[group_index], group.window)


def _layer_places(groups: Sequence[PagedGroup]) -> list[tuple[int, int]]:
    """For each layer of the model, its group's number and its number within that."""
    places = {
        layer: (index, position)
        for index, group in enumerate(groups)
        for position, layer in enumerate(group.layers)
    }
    num_layers = sum(len(group.layers) for group in groups)
    if not groups or sorted(places) != list(range(num_layers)):
        raise ValueError(
            "groups: expected every layer from 0 once, got"
            f" {sorted(layer for group in groups for layer in group.layers)}"
        )
    return [places[layer] for layer in range(num_layers)]
