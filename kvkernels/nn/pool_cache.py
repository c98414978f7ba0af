"""What a `transformers.Cache` over block pools answers to models, whatever tokens it holds."""

from __future__ import annotations

from collections.abc import Sequence

from kvkernels.nn.groups import PagedGroup
from kvkernels.nn.layer_store import LayerStore
from kvkernels.nn.transformers_compat import Cache


class PoolCache(Cache):
    """A cache whose layers lie in the pools of layer groups.

    Its `update` returns a handle in place of tensors, which models pass on untouched to the
    attention function. It runs between compiled graphs: the compiler merges views of one storage
    that a graph writes, and a pool's layers interleave, so writes would go astray.

    Args:
        groups: All layers of the model, each in one group.

    Raises:
        ValueError: If the groups do not make up a model's layers.
    """

    def __init__(self, groups: Sequence[PagedGroup]) -> None:
        super().__init__(layers=[])  # where the base class would keep its state
        self._layers = LayerStore(groups)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def __len__(self) -> int:
        return self._layers.num_layers

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [self._layers.group_of(layer).window is not None for layer in range(len(self))]

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self)
