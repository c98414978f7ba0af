"""Which codecs the blocks of a cache are written with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvkernels import KVLayout
from kvkernels.nn import PagedGroup
from prefixstore.config import CacheConfig
from prefixstore.errors import ConfigError
from prefixstore.record_layout import DTYPES, LOSSLESS, RecordLayout


def record_layouts(
    groups: Sequence[PagedGroup], config: CacheConfig
) -> list[tuple[RecordLayout, ...]]:
    """For each layer group the layouts of its records: of the first blocks, then of all others.

    Raises:
        ConfigError: If `config.codec` names no codec, or one that does not fit the model.
    """
    codec, num_layers = config.codec, sum(len(group.layers) for group in groups)
    if not isinstance(codec, str) and len(codec) != num_layers:
        raise ConfigError(
            f"codec: expected one name or {num_layers}, one a layer, got {len(codec)}"
        )
    layouts = []
    for number, group in enumerate(groups):
        names = (codec,) if isinstance(codec, str) else [codec[layer] for layer in group.layers]
        try:
            layout = replace(record_layout(group.pool.layout, number), codecs=tuple(names))
        except ValueError as error:
            raise ConfigError(f"codec: {error}") from None
        layouts.append((layout.lossless,) * config.exact_blocks + (layout,))
    return layouts


def record_layout(layout: KVLayout, layer_group: int) -> RecordLayout:
    """How a pool's blocks are called in a raw record."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return RecordLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        dtype=names[layout.dtype],
        layer_group=layer_group,
        latent_dim=layout.latent_dim,
    )


def describe_loss(layouts: Sequence[Sequence[RecordLayout]]) -> str:
    """What is lost where, in a form that is the same whenever the same is lost; empty if nothing.

    Args:
        layouts: From `record_layouts`.
    """
    codecs = [[layout.codecs for layout in group] for group in layouts]
    if all(LOSSLESS.issuperset(names) for group in codecs for names in group):
        return ""
    return repr(codecs)
