"""What the modules of a model hold besides their weights that changes what they compute.

A model is compared with one that is built of the same configuration: what is equal in both, the
configuration tells already. The rest was set by hand, or by a library of adapters::

    model.layers.0.self_attn           scaling 0.25                  as built: not mentioned
    model.layers.1.self_attn           scaling 0.5                   set by hand
    model.layers.2                     control, a tensor             of a class of somebody's
    model.layers.1.self_attn.q_proj    a LoRA layer, "a" is active   its weights do not tell that
    model.rotary_emb                   inv_freq, 4 times as low      not saved with the weights
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch

from prefixstore.errors import ConfigError
from prefixstore.module_fields import (
    Unknown,
    class_name,
    describe,
    is_whole_model,
    leaves,
    own_fields,
)

logger = logging.getLogger(__name__)

# Options of an adapter that do not change its arithmetic: where it came from, and how it was made.
_IRRELEVANT_OPTIONS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "parent_library",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)

# Whose objects and functions a whole model may hold without computing anything else.
_LIBRARIES = frozenset(
    {"accelerate", "huggingface_hub", "kvkernels", "peft", "prefixstore", "torch", "transformers"}
)

# Relative, since two processors may compute frequencies that differ in the last bits.
_BUFFER_TOLERANCE = 1e-6


def state_beside_weights(
    model: torch.nn.Module,
) -> Iterator[tuple[str, bytes | torch.Tensor | None]]:
    """Names and values of all that is not as the model's configuration makes it.

    Of each module its class and attributes, and with an adapter what says which one is active and
    how; of each buffer that is not saved its values. None for what nobody knows the effect of: of
    such an object that the configuration makes as well, only what is seen of it is compared.
    """
    built = _as_built(model)
    names = _names_within(model)
    built_names = _names_within(built[""]) if built else {}
    for name, module in model.named_modules():
        as_built = _state(built[name], built_names) if name in built else {}
        yield from _differences(name, _state(module, names), as_built)
    for name, buffer in model.named_buffers():
        owner_name, _, own_name = name.rpartition(".")
        if own_name in model.get_submodule(owner_name)._non_persistent_buffers_set:
            twin = built.get(owner_name)
            expected = None if twin is None else twin._buffers.get(own_name)
            if expected is None or not _agrees(buffer, expected):
                yield f"buffer {name}", buffer
    adapters = getattr(model, "peft_config", None)
    if adapters:
        options = {name: _options(config) for name, config in dict(adapters).items()}
        yield "adapters", _as_text(options).encode()


def check_evaluates(model: torch.nn.Module) -> None:
    """Raise ConfigError if part of a model is in training mode: dropout would be in its KV."""
    for name, module in model.named_modules():
        if module.training:
            where = f" in {name}" if name and not model.training else ""
            raise ConfigError(
                f"model: expected evaluation mode, got training mode{where}; call model.eval()"
            )


def has_adapter(module: torch.nn.Module) -> bool:
    """Whether it is a layer of PEFT, or one that is made alike."""
    return isinstance(getattr(module, "merged_adapters", None), list)


def _as_built(model: torch.nn.Module) -> Mapping[str, torch.nn.Module]:
    """The modules of a model of the same configuration, without weights; none if that fails.

    Buffers that are not saved have the values that transformers 5 gives them after loading, or
    NaN, which agrees with nothing.
    """
    config = copy.deepcopy(getattr(model, "config", None))
    if config is None:
        return {}
    try:
        config._attn_implementation = "eager"  # other implementations may need a device
        with torch.device("meta"):
            built = type(model)(config)
        for module in built.modules():
            if module._non_persistent_buffers_set:
                _fill_buffers(module)
                built._init_weights(module)  # type: ignore[operator]
    except Exception as error:  # of whatever class
        logger.info("model: all of its modules count, for none can be built to compare: %s", error)
        return {}
    return dict(built.named_modules())


def _fill_buffers(module: torch.nn.Module) -> None:
    for name in module._non_persistent_buffers_set:
        buffer = module._buffers[name]
        if buffer is not None and buffer.is_floating_point():
            module._buffers[name] = torch.full_like(buffer, torch.nan, device="cpu")


def _agrees(buffer: torch.Tensor, expected: torch.Tensor) -> bool:
    if buffer.is_meta or expected.is_meta or buffer.shape != expected.shape:
        return False
    if buffer.dim() == 0:  # scalars have the dtype of the model
        expected = expected.to(buffer.dtype)
    return buffer.dtype == expected.dtype and torch.allclose(
        buffer.detach().cpu().double(), expected.double(), rtol=_BUFFER_TOLERANCE, atol=0.0
    )


def _differences(
    name: str, state: Mapping[str, Any], expected: Mapping[str, Any]
) -> Iterator[tuple[str, bytes | torch.Tensor | None]]:
    """What of a module's state is not as expected, as `state_beside_weights` has it."""
    if state["class"] != expected.get("class"):
        expected = {}
    texts: dict[str, Any] = dict.fromkeys(expected.keys() - state.keys())
    for own_name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield f"tensor {name}{own_name}", value
        elif own_name not in expected or value != expected[own_name]:
            if isinstance(value, Unknown):
                yield f"{name}{own_name}", None
            else:
                texts[own_name] = value
    if texts:
        yield f"module {name}", _as_text(texts).encode()


def _state(module: torch.nn.Module, names: Mapping[int, str]) -> dict[str, Any]:
    """Class, attributes and adapters of a module.

    Args:
        module: Part of a model.
        names: See `_names_within`, of the model.
    """
    state: dict[str, Any] = {"class": class_name(module)}
    if has_adapter(module):
        return state | {"adapter": _adapter_state(module)}
    for own_name, field in own_fields(module).items():
        for name, value in leaves(f".{own_name}", field):
            known = names.get(id(value))
            state[name] = describe(value) if known is None else known
            # A library's object on the whole model refers to all of it: its class alone counts.
            if isinstance(state[name], Unknown) and is_whole_model(module) and _is_librarys(value):
                state[name] = state[name].class_name
    return state


def _is_librarys(value: Any) -> bool:
    """Whether an object, or a function, was written by those who wrote the models."""
    module_name = getattr(value, "__module__", None) or type(value).__module__
    return module_name.partition(".")[0] in _LIBRARIES


def _names_within(model: torch.nn.Module) -> dict[int, str]:
    """What a model's modules and weights are called, by `id`: other modules may hold them too."""
    parts = (model.named_modules(), model.named_parameters(), model.named_buffers())
    return {id(part): f"the model's {name}" for name, part in chain.from_iterable(parts)}


def _adapter_state(module: torch.nn.Module) -> dict[str, Any]:
    """Which adapters a layer computes with, and how much of each."""
    own = {
        name: _plain(value)
        for name, value in vars(module).items()
        if name[0] != "_" and name not in ("forward", "training")  # which caches and callers change
    }
    # PEFT keeps them under private names, or in the class.
    return own | {
        name: _plain(getattr(module, name, None))
        for name in ("active_adapters", "disable_adapters", "merged_adapters")
    }


def _options(config: Any) -> dict[str, Any]:
    """What an adapter was configured with."""
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
    return {
        name: _plain(value) for name, value in fields.items() if name not in _IRRELEVANT_OPTIONS
    }


def _plain(value: Any) -> Any:
    """A value as JSON has it, the same in every process; of an object its class alone."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(one) for one in value), key=repr)
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.tolist()]
    return class_name(value)


def _as_text(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, default=str)
