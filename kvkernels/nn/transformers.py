"""Hugging Face models on kvkernels: the attention function, installing it, and the cache.

Importing this module imports transformers and changes nothing in it; `register` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from kvkernels import ops
from kvkernels.checks import check_inference
from kvkernels.errors import UnsupportedError
from kvkernels.nn import failed_passes
from kvkernels.nn.batch_invariance import is_batch_invariant
from kvkernels.nn.dense import as_pool
from kvkernels.nn.forward_patch import install_lock
from kvkernels.nn.paged_kv import PagedKV, equal_bounds, merge_tokens
from kvkernels.nn.transformers_cache import PagedCache
from kvkernels.nn.transformers_compat import AttentionInterface, AttentionMaskInterface
from kvkernels.nn.transformers_mask import MaskStandIn, find_window, make_mask

__all__ = [
    "IMPLEMENTATION",
    "PagedCache",
    "PagedKV",
    "attend",
    "install",
    "paged_attention",
    "register",
    "uninstall",
]

IMPLEMENTATION = "kvkernels"

# Arguments a model may hand to its attention function, and the feature each asks for.
_UNSERVED_ARGUMENTS = {
    "head_mask": "a head mask",
    "position_bias": "a position bias",
    "output_attentions": "attention weights as an output",
    "cache": "the continuous batching of transformers",
    "indices": "a choice of keys for each token (sparse attention)",
    "block_indices": "a choice of key blocks for each token (sparse attention)",
}

# Arguments that change nothing here: what the model was called with, and the bounds of packed
# sequences, which the mask or the cache tells us as well.
_IDLE_ARGUMENTS = {
    *("is_causal", "position_ids", "cache_position", "use_cache", "token_type_ids", "return_dict"),
    *("output_hidden_states", "output_router_logits", "num_items_in_batch", "deterministic"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
}


@dataclass
class _Installed:
    previous: dict[str, str]  # in the form that `set_attn_implementation` takes
    num_users: int = 0


_installed: WeakKeyDictionary[torch.nn.Module, _Installed] = WeakKeyDictionary()


def register() -> None:
    """Make `attn_implementation="kvkernels"` known to transformers. Idempotent."""
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, make_mask)


def install(model: Any) -> None:
    """Let a model's text attention layers run on kvkernels, until `uninstall`.

    Installed twice, a model stays so until it is uninstalled twice. Models that share a
    configuration share its attention, until the last of them is uninstalled.

    Args:
        model: A `transformers.PreTrainedModel`.

    Raises:
        UnsupportedError: If its attention cannot be replaced; it is left as it was.
    """
    with install_lock:
        if model not in _installed:
            shared = _shared_before(model.config)
            _installed[model] = _Installed(_replace_attention(model) | shared)
            failed_passes.install(model)
        _installed[model].num_users += 1


def uninstall(model: Any) -> None:
    """Give a model back the attention it had before `install`; without one, nothing changes."""
    with install_lock:
        installed = _installed.get(model)
        if installed is None:
            return
        installed.num_users -= 1
        if installed.num_users == 0:
            del _installed[model]
            failed_passes.uninstall(model)
            parts, shared = _parts(model.config), _shared_before(model.config)
            model.set_attn_implementation(
                {
                    key: parts[key]._attn_implementation if key in shared else previous
                    for key, previous in installed.previous.items()
                }
            )


@contextmanager
def paged_attention(model: Any) -> Iterator[Any]:
    """Run a model on kvkernels inside a `with` block; yields the model."""
    install(model)
    try:
        yield model
    finally:
        uninstall(model)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | PagedKV,
    value: torch.Tensor | PagedKV,
    attention_mask: MaskStandIn | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Invariant of the batch where its model is (`kvkernels.nn.batch_invariance`). Under
    `torch.autocast` it computes in the dtype of that, as PyTorch's own attention, or, with keys in
    a pool, in the pool's.

    Args:
        module: The layer.
        query: ``[batch, num_heads, num_new, head_dim]``.
        key: A `PagedKV`, or ``[batch, num_kv_heads, num_keys, head_dim]`` from any cache that
            grows or from none.
        value: Like ``key``.
        attention_mask: What `make_mask` gave; None is causal.
        scaling: Multiplies scores before softmax.
        dropout: Must be zero.
        sliding_window: A token sees itself and so many tokens before it, less one.
        softcap: Bounds scores, as in Gemma 2.
        s_aux: ``[num_heads]``: logits of attention sinks, as in gpt-oss.

    Returns:
        ``[batch, num_new, num_heads, head_dim]``, and None for the weights.

    Raises:
        UnsupportedError: If the layer asks for what no kernel serves; the feature is named.
        ValueError: If shapes, dtypes or windows disagree, or a tensor requires grad.
    """
    _refuse_unserved(module, dropout, kwargs)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = _cast(query, key, value)
    num_keys = None if isinstance(key, PagedKV) else key.shape[2]
    window = find_window(attention_mask, sliding_window, num_keys)
    if s_aux is not None:
        check_inference("s_aux", s_aux)
    is_invariant = is_batch_invariant(module)
    # A cache that dropped old tokens passes on the last keys only. Their order of summation has to
    # follow their true positions, so that bits do not depend on what was dropped.
    first_key = getattr(attention_mask, "first_key", 0) if is_invariant else 0
    batch_size, num_heads, num_new, head_dim = query.shape
    out = ops.paged_attention(
        merge_tokens(query),
        *_find_keys(query, key, value, window, first_key),
        sm_scale=scaling,
        window=window,
        soft_cap=softcap,
        sinks=None if s_aux is None else s_aux.detach().float(),
        batch_invariant=is_invariant,
    )
    assert isinstance(out, torch.Tensor)  # a pair only where the log-sum-exp was asked for
    return out.view(batch_size, num_new, num_heads, head_dim), None


def _cast(
    query: torch.Tensor, key: torch.Tensor | PagedKV, value: Any
) -> tuple[torch.Tensor, torch.Tensor | PagedKV, Any]:
    """In one dtype, where linear layers and what lies between them give different ones."""
    if isinstance(key, PagedKV):
        return query.to(key.key_cache.dtype), key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _find_keys(
    query: torch.Tensor,
    key: torch.Tensor | PagedKV,
    value: torch.Tensor | PagedKV,
    window: int | None,
    first_key: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """key_cache, value_cache, block_table, seq_lens and cu_seqlens_q of `paged_attention`.

    Of tensors, the first key has position `first_key`.
    """
    if isinstance(key, PagedKV):
        if key.window is not None and (window is None or window > key.window):
            raise ValueError(
                f"sliding_window: expected at most {key.window} (the layer group's), got {window}"
            )
        batch = key.batch
        places = (batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
        return (key.key_cache, key.value_cache, *places)
    if isinstance(value, PagedKV) or key.shape != value.shape:
        raise UnsupportedError("value: expected the shape of key, got another")
    key_cache, value_cache, block_table = as_pool(key, value, first_key)
    seq_lens = torch.full_like(block_table[:, 0], first_key + key.shape[2])
    batch_size, _, num_new, _ = query.shape
    cu_seqlens_q = equal_bounds(batch_size, num_new, query.device)
    return key_cache, value_cache, block_table, seq_lens, cu_seqlens_q


@contextmanager
def observe_attention(
    note: Callable[[torch.nn.Module, dict[str, Any]], None],
) -> Iterator[None]:
    """Be told inside a `with` block which layers attend, and the options they hand on."""

    def observed(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        note(module, options)
        return attend(module, *args, **options)

    AttentionInterface.register(IMPLEMENTATION, observed)
    try:
        yield
    finally:
        AttentionInterface.register(IMPLEMENTATION, attend)


def _parts(config: Any) -> dict[str, Any]:
    """A configuration and those inside it, by the names that `set_attn_implementation` knows."""
    names = getattr(config, "sub_configs", {})
    inside = {name: getattr(config, name, None) for name in names}
    return {"": config} | {name: part for name, part in inside.items() if part is not None}


def _shared_before(config: Any) -> dict[str, str]:
    """Of those parts of it that installed models share, what was there before the first came."""
    originals = {
        id(part): installed.previous[key]
        for model, installed in _installed.items()
        for key, part in _parts(model.config).items()
        if key in installed.previous
    }
    return {
        key: originals[id(part)] for key, part in _parts(config).items() if id(part) in originals
    }


def _replace_attention(model: Any) -> dict[str, str]:
    """Have the text layers' attention looked up under our name; returns what was there before."""
    register()
    previous = _implementations(model.config)
    text_config = model.config.get_text_config(decoder=True)
    wanted = {
        key: IMPLEMENTATION if key == "" or part is text_config else previous[key]
        for key, part in _parts(model.config).items()
    }
    model.set_attn_implementation(wanted)
    if text_config._attn_implementation != IMPLEMENTATION:
        model.set_attn_implementation(previous)
        raise UnsupportedError(
            "model: expected one whose attention is looked up in transformers'"
            f" AttentionInterface, got {type(model).__name__}"
        )
    return previous


def _refuse_unserved(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    for name, feature in _UNSERVED_ARGUMENTS.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise UnsupportedError(f"{name}: expected attention without {feature}, got it")
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in _IDLE_ARGUMENTS:
            raise UnsupportedError(f"{name}: expected no such argument of attention, got one")
    if dropout:
        raise UnsupportedError(f"dropout: expected 0 (inference only), got {dropout}")
    is_causal = kwargs.get("is_causal")
    if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:
        raise UnsupportedError(
            "is_causal: expected causal self-attention, got bidirectional or cross-attention"
        )


def _implementations(config: Any) -> dict[str, str]:
    """A configuration's attention implementations, as `set_attn_implementation` takes them."""
    return {key: part._attn_implementation for key, part in _parts(config).items()}
