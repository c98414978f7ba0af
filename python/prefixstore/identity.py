"""The identity of a model's KV: a digest of all that must be equal for blocks to be valid."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import torch

from kvkernels import KVLayout
from kvkernels.checks import has_memory
from prefixstore.errors import ConfigError
from prefixstore.foreign_code import find_foreign_code
from prefixstore.module_fields import IRRELEVANT_SETTINGS, class_name, describe, leaves
from prefixstore.module_state import state_beside_weights

logger = logging.getLogger(__name__)

IDENTITY_BYTES = 16

# Goes up when the meaning of stored bytes changes (the record format, the fields below), so that
# old records become misses.
_SCHEME = b"kvkernels identity 1, record 1"

# Large enough that hashlib's own cost vanishes, small enough to share a big tensor among threads.
_CHUNK_BYTES = 16 << 20

# hashlib releases the interpreter lock. Two threads nearly halve the time on two cores; more would
# only crowd out the model.
_NUM_THREADS = 2

# PyTorch's name for what a module saves besides its weights (`get_extra_state`).
_EXTRA_STATE = "_extra_state"


def model_identity(
    model: torch.nn.Module,
    layouts: KVLayout | Sequence[KVLayout],
    salt: str | bytes = b"",
) -> bytes:
    """Digest of weights, attention configuration, dtypes, layouts and salt, 16 bytes.

    Two models that share a name differ, two names of one model agree. Adapters count as they are
    now: their weights, which of them are active, and how much; so does whatever else in the modules
    is not as the configuration makes it, see `state_beside_weights`. What a forward hook does, or a
    forward that a module was given, or an object in an attribute, nobody knows: the digest of a
    model that has one is of no other, nor the same again (see `foreign_code`, `module_fields`).

    It holds for one version of this library, and of the model library as far as that adds fields
    to the configuration.

    Args:
        model: A `transformers.PreTrainedModel`, or any module with its weights loaded; `config`
            is read if it is there.
        layouts: Of every layer group, in order.
        salt: A tenant's namespace.

    Raises:
        ConfigError: If a weight is no tensor, has no values yet (the "meta" device), or keeps them
            in other tensors, as some libraries' quantised weights do.
    """
    if isinstance(layouts, KVLayout):
        layouts = [layouts]
    digest = blake2b(digest_size=IDENTITY_BYTES)
    _add(digest, "scheme", _SCHEME)
    _add(digest, "model", type(model).__name__.encode())
    _add(digest, "config", _config_text(getattr(model, "config", None)).encode())
    for layout in layouts:
        _add(digest, "layout", _layout_text(layout).encode())
    _add(digest, "salt", salt.encode() if isinstance(salt, str) else salt)
    for name, weight_digest in _weight_digests(model):
        _add(digest, f"weight {name}", weight_digest)
    foreign = find_foreign_code(model)
    for name, state in state_beside_weights(model):
        if isinstance(state, torch.Tensor):
            state = _tensor_digest(name, state)
        if state is None:
            foreign = foreign or f"an object whose effect is not known, {name}"
        else:
            _add(digest, name, state)
    if foreign is not None:
        logger.warning("model: %s: its KV is of use to this cache alone", foreign)
        _add(digest, "hooks", os.urandom(IDENTITY_BYTES))
    return digest.digest()


def _add(digest: Any, label: str, value: bytes) -> None:
    """Feed one labelled field; with its length, so that neighbours cannot run together."""
    name = label.encode()
    digest.update(len(name).to_bytes(4, "little") + name)
    digest.update(len(value).to_bytes(8, "little") + value)


def _layout_text(layout: KVLayout) -> str:
    text = (
        f"{layout.num_layers} layers, {layout.num_kv_heads} heads of {layout.head_dim},"
        f" blocks of {layout.block_size} {layout.dtype}"
    )
    return text if layout.latent_dim is None else f"{text}, latents of {layout.latent_dim}"


def _config_text(config: Any) -> str:
    if config is None:
        return ""
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
    return json.dumps(_relevant(fields), sort_keys=True, default=str)


def _relevant(fields: Any) -> Any:
    if isinstance(fields, Mapping):
        return {
            str(key): _relevant(value)
            for key, value in fields.items()
            if key not in IRRELEVANT_SETTINGS
        }
    if isinstance(fields, list | tuple):
        return [_relevant(value) for value in fields]
    return fields


def _weight_digests(model: torch.nn.Module) -> Iterator[tuple[str, bytes]]:
    """Name and digest of every parameter and persistent buffer, in the order of their names.

    So of what modules save besides, which may consist of other things than tensors.
    """
    weights: dict[str, Any] = {}
    for saved_name, value in model.state_dict(keep_vars=True).items():
        if saved_name.rpartition(".")[2] == _EXTRA_STATE:
            for name, leaf in leaves(saved_name, value):
                weights[name] = _extra_tensor(name, leaf)
        else:
            weights[saved_name] = value
    weights = dict(sorted(weights.items()))
    for name, weight in weights.items():
        _check_loaded(name, weight)
    # Tied weights are one object under two names: hashed once.
    distinct = {id(weight): weight for weight in weights.values()}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        digests = {
            key: (weight, pool.map(_chunk_digest, _chunks(weight)))
            for key, weight in distinct.items()
        }
        finished = {
            key: _weight_digest(weight, b"".join(chunks))
            for key, (weight, chunks) in digests.items()
        }
    for name, weight in weights.items():
        yield name, finished[id(weight)]


def _extra_tensor(name: str, leaf: Any) -> torch.Tensor:
    """A part of what a module saves besides its weights, with the bytes of a text if it is none."""
    if isinstance(leaf, torch.Tensor):
        return leaf
    text = describe(leaf)
    if not isinstance(text, str):
        raise ConfigError(
            "model: expected extra state of tensors, numbers, texts and containers of these, got"
            f" {class_name(leaf)} for {name}"
        )
    return torch.tensor([*text.encode()], dtype=torch.uint8)


def _check_loaded(name: str, weight: Any) -> None:
    if not isinstance(weight, torch.Tensor):
        raise ConfigError(
            f"model: expected weights that are tensors, got {class_name(weight)} for {name}"
        )
    if weight.is_meta:
        raise ConfigError(f"model: expected loaded weights, got a tensor without values for {name}")
    if not has_memory(weight):
        raise ConfigError(
            "model: expected weights with memory of their own, got a"
            f" {type(weight).__name__} without for {name}"
        )


def _tensor_digest(name: str, tensor: torch.Tensor) -> bytes:
    _check_loaded(name, tensor)
    return _weight_digest(tensor, b"".join(map(_chunk_digest, _chunks(tensor))))


def _weight_digest(weight: torch.Tensor, chunk_digests: bytes) -> bytes:
    digest = blake2b(digest_size=IDENTITY_BYTES)
    _add(digest, "shape", f"{weight.dtype} {tuple(weight.shape)}".encode())
    _add(digest, "values", chunk_digests)
    return digest.digest()


def _chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Slices of at most a chunk's bytes, in row-major order."""
    flat = weight.detach().reshape(-1)
    step = _CHUNK_BYTES // flat.element_size()
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step]


def _chunk_digest(chunk: torch.Tensor) -> bytes:
    data = chunk.cpu().contiguous().view(torch.uint8).numpy().data
    return blake2b(data, digest_size=IDENTITY_BYTES).digest()


def stored_identity(identity: bytes, salt: str, codecs: str = "") -> bytes:
    """The identity of a model's KV in the tiers.

    Args:
        identity: Of the model.
        salt: A tenant's namespace: blocks of two salts never meet.
        codecs: How blocks are written, where that changes them; empty where it does not. KV
            computed over a prefix that was restored with a loss carries that loss, whatever codec
            it is written with, and must not be taken for exact.
    """
    digest = blake2b(identity, digest_size=IDENTITY_BYTES)
    _add(digest, "salt", salt.encode())
    if codecs:
        _add(digest, "codecs", codecs.encode())
    return digest.digest()
