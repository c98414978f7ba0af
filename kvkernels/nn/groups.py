"""Layer groups: which layers of a model share one pool, read from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvkernels.allocator import BlockAllocator
from kvkernels.errors import UnsupportedError
from kvkernels.layout import KVLayout
from kvkernels.pool import KVPool


@dataclass(frozen=True)
class LayerGroupSpec:
    """Layers whose KV has one shape and one reach.

    Attributes:
        layout: Of the group's blocks.
        layers: The model's layer numbers, ascending.
        window: A token sees itself and the `window - 1` tokens before it; None for all.
    """

    layout: KVLayout
    layers: tuple[int, ...]
    window: int | None


class PagedGroup:
    """A layer group with the pool its keys and values lie in and the blocks' owner.

    Args:
        pool: Holds the group's blocks; as many layers as `layers`.
        allocator: Counts who uses the pool's blocks.
        layers: The model's layer numbers, in the order of the pool's layers.
        window: Reach of the group's attention; None for all tokens.

    Raises:
        ValueError: If the pool's layers or blocks are not as many as `layers` and `allocator` say.
    """

    def __init__(
        self,
        pool: KVPool,
        allocator: BlockAllocator,
        layers: Sequence[int],
        window: int | None = None,
    ) -> None:
        if len(layers) != pool.layout.num_layers:
            raise ValueError(
                f"layers: expected {pool.layout.num_layers} (the pool's layers), got {len(layers)}"
            )
        if allocator.num_blocks != pool.num_blocks:
            raise ValueError(
                f"allocator: expected {pool.num_blocks} blocks (the pool's), got"
                f" {allocator.num_blocks}"
            )
        self.pool = pool
        self.allocator = allocator
        self.layers = tuple(layers)
        self.window = window
        # Views made once: a request would otherwise pay for two of them in every layer.
        self.key_caches = [pool.key_cache(layer) for layer in range(len(layers))]
        self.value_caches = [pool.value_cache(layer) for layer in range(len(layers))]


def layer_groups(
    config: Any, block_size: int, dtype: torch.dtype | None = None
) -> list[LayerGroupSpec]:
    """The layer groups of a Hugging Face model, the one that reaches furthest first.

    Args:
        config: The model's configuration; of a model of several parts, its text part counts.
        block_size: Tokens in a block.
        dtype: Of keys and values; default the configuration's own.

    Raises:
        UnsupportedError: If the model needs attention that no kernel serves; the feature is named.
        ValueError: If the configuration lacks a needed attribute or a value is out of range.
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    feature = _unserved_feature(config)
    if feature is not None:
        raise UnsupportedError(f"config: expected attention that a kernel serves, got {feature}")
    members: dict[int | None, list[int]] = {}
    for layer, window in enumerate(_layer_windows(config)):
        members.setdefault(window, []).append(layer)
    furthest_first = sorted(
        members, key=lambda window: -window if window is not None else float("-inf")
    )
    return [
        LayerGroupSpec(
            layout=KVLayout.from_config(
                config, num_layers=len(members[window]), block_size=block_size, dtype=dtype
            ),
            layers=tuple(members[window]),
            window=window,
        )
        for window in furthest_first
    ]


# Models whose layers see all tokens, though their configuration has a window.
_WITHOUT_WINDOW = ("moshi",)


def _layer_windows(config: Any) -> list[int | None]:
    window = getattr(config, "sliding_window", None)
    is_used = getattr(config, "use_sliding_window", True) is not False
    if not is_used or getattr(config, "model_type", None) in _WITHOUT_WINDOW:
        window = None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return [window] * config.num_hidden_layers
    windows: list[int | None] = []
    for layer_type in layer_types[: config.num_hidden_layers]:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(
                f"config: expected layers of full or sliding attention, got {layer_type}"
            )
        windows.append(window if layer_type == "sliding_attention" else None)
    return windows


def _unserved_feature(config: Any) -> str | None:
    """Name of the first feature in the configuration that no kernel serves."""
    own_value_dim = getattr(config, "v_head_dim", None)
    features = {
        "an encoder-decoder model": getattr(config, "is_encoder_decoder", False),
        "layers that share another layer's KV": getattr(config, "num_kv_shared_layers", None),
        "another shape of KV in each layer": getattr(config, "is_heterogeneous", False),
        "bidirectional attention": (
            getattr(config, "use_bidirectional_attention", False)
            or getattr(config, "is_causal", True) is False
        ),
        "chunked attention": getattr(config, "attention_chunk_size", None),
        "multi-head latent attention": getattr(config, "kv_lora_rank", None),
        "values narrower than keys": (
            own_value_dim is not None and own_value_dim != getattr(config, "head_dim", None)
        ),
        "ALiBi": getattr(config, "alibi", False),
    }
    features |= {
        f"position embeddings that change with the prompt's length (rope type {rope_type})": True
        for rope_type in _rope_types(config) & {"dynamic", "longrope"}
    }
    return next((name for name, is_used in features.items() if is_used), None)


def _rope_types(config: Any) -> set[str]:
    """The types of rotary position embedding a model uses, of every kind of layer."""
    found = set()
    for name in ("rope_parameters", "rope_scaling"):  # transformers 5, 4.57
        parameters = getattr(config, name, None) or {}
        by_layer_type = [part for part in parameters.values() if isinstance(part, dict)]
        for part in (parameters, *by_layer_type):
            found |= {part[key] for key in ("rope_type", "type") if key in part}
    return found
